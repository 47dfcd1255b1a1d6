"""Models of a few thousand parameters, saved as users save theirs."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

WORDS = ["what", "is", "good", "bad", "tea", "bread", "lock", "and", "the", "a", "how", "do", "i", "make"]
WORDS += ["open", "?", ".", "!", "yes", "no"]
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}{% if m.role == 'assistant' %} <eos>{% endif %} "
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    special = ["<pad>", "<eos>", "<unk>", "<|user|>", "<|assistant|>", "<|system|>"]
    vocabulary = {word: i for i, word in enumerate(special + words)}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=special[3:],
    )
    made.chat_template = TEMPLATE
    return made


def config(vocabulary: int, **changes: object) -> LlamaConfig:
    values: dict = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.3,
    }
    return LlamaConfig(**{**values, **changes})


def save_policy(folder: Path, seed: int = 0, **changes: object) -> Path:
    torch.manual_seed(seed)
    made = tokenizer()
    LlamaForCausalLM(config(len(made), **changes)).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


def save_reward_model(
    folder: Path, seed: int, labels: int = 1, words: list[str] = WORDS, **changes: object
) -> Path:
    torch.manual_seed(seed)
    made = tokenizer(words)
    LlamaForSequenceClassification(config(len(made), num_labels=labels, **changes)).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder
