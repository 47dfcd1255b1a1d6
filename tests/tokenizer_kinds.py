"""Small tokenizers of the kinds that models come with, trained here in milliseconds."""

from __future__ import annotations

import json

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

LINES = ["The sky is blue. What is it? It is a cat.", "user assistant system", "naïve café, über"] * 3
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content | trim }} [/INST]"
    "{% else %} {{ m.content | trim }} {{ eos_token }}{% endif %}{% endfor %}"
)


def byte_level(template: str = CHATML) -> PreTrainedTokenizerFast:
    """GPT-2's kind, with the tokens of ChatML; "<think>" and a run of spaces are added and not special."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    core.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=320, show_progress=False, initial_alphabet=alphabet)
    )
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    made.add_tokens([AddedToken(word, normalized=False) for word in ("<think>", "</think>", "    ")])
    made.chat_template = template
    return made


def sentence_piece(spaces: str = "first", bos: bool = True, eos: bool = False) -> PreTrainedTokenizerFast:
    """Llama's kind, with bytes for unknown characters. `spaces`: "legacy" puts a space before every text and after
    every special token, "first" before every text, "never" nowhere."""
    core = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    special = ["<unk>", "<s>", "</s>"]
    singles = [f"<0x{i:02X}>" for i in range(256)]
    core.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=340, show_progress=False, special_tokens=special + singles)
    )
    state = json.loads(core.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    state["pre_tokenizer"] = None
    core = Tokenizer.from_str(json.dumps(state))
    if spaces == "legacy":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=spaces, split=False)
    core.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    core.post_processor = around(bos, eos, 1, 2)
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    made.chat_template = LLAMA
    return made


def unigram() -> PreTrainedTokenizerFast:
    """T5's kind: special tokens are pieces of the vocabulary, and the end token is put after every text."""
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer, core.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<pad>", "</s>", "<unk>", "<s>"]
    core.train_from_iterator(
        [*LINES, "</s> <s> <|m_pd"],
        trainers.UnigramTrainer(
            vocab_size=90, show_progress=False, special_tokens=special, unk_token="<unk>"
        ),
    )
    core.post_processor = around(False, True, 3, 1)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def word_piece() -> PreTrainedTokenizerFast:
    """BERT's kind, in lower case; words are joined to "##" pieces."""
    core = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    core.normalizer, core.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(cleanup=False)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core.train_from_iterator(
        LINES, trainers.WordPieceTrainer(vocab_size=70, show_progress=False, special_tokens=special)
    )
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]"
    )


def around(bos: bool, eos: bool, first: int, last: int) -> processors.TemplateProcessing:
    return processors.TemplateProcessing(
        single=" ".join(["<s>"] * bos + ["$A"] + ["</s>"] * eos),
        special_tokens=[("<s>", first), ("</s>", last)],
    )
