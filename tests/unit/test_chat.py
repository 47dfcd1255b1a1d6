"""Tokens of prompts, responses and conversations: exact ids under small tokenizers made here."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from tokenizers import decoders as token_decoders

from rlhf.data.chat import ChatFormat

WORDS = ["[UNK]", "<s>", "</s>", "<eot>", "What", "is", "it", "?", "A", "cat", "user:", "assistant:"]
UNK, BOS, EOS, EOT, WHAT, IS, IT, QUESTION, A, CAT, USER, ASSISTANT = range(12)
MESSAGES = [{"role": "user", "content": "What is it ?"}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def word_level(bos=False, eos=False, **names):
    """One token a word; `bos` and `eos`: the tokenizer puts them around every text."""
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    single = ["<s>"] * bos + ["$A"] + ["</s>"] * eos
    core.post_processor = processors.TemplateProcessing(
        single=" ".join(single), special_tokens=[("<s>", BOS), ("</s>", EOS)]
    )
    named = {"unk_token": "[UNK]", "bos_token": "<s>", "eos_token": "</s>"} | names
    named["additional_special_tokens"] = ["<eot>"]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, **{name: word for name, word in named.items() if word is not None}
    )


@pytest.fixture(scope="module")
def bpe():
    """Byte-level BPE with the tokens of ChatML; "<|end|>" is EOS, and no BOS."""
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = token_decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        show_progress=False,
        special_tokens=["<|end|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    lines = ["user assistant Human: Assistant: What is it?", "It is a cat. It is a hat.", "\n\nHuman: it"]
    core.train_from_iterator(lines * 3, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", additional_special_tokens=["<|im_start|>", "<|im_end|>"]
    )


def ids(tokenizer, text):
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("bos", "eos", "prompt", "conversation"),
    [
        (False, False, [WHAT, IS, IT], [WHAT, IS, IT, A, CAT, EOS]),
        (True, False, [BOS, WHAT, IS, IT], [BOS, WHAT, IS, IT, A, CAT, EOS]),
        (True, True, [BOS, WHAT, IS, IT], [BOS, WHAT, IS, IT, A, CAT, EOS]),
    ],
)
def test_text_under_the_tokenizers_special_tokens(bos, eos, prompt, conversation):
    chat = ChatFormat(word_level(bos, eos), "policy")
    assert chat.prompt_tokens("What is it") == prompt
    assert chat.response_tokens("What is it", " A cat") == [A, CAT, EOS]
    assert chat.conversation_tokens("What is it", " A cat") == conversation
    assert chat.end_tokens() == [EOS]


def test_eos_is_not_doubled():
    chat = ChatFormat(word_level(bos=True), "policy")
    assert chat.response_tokens("What", " A cat </s>") == [A, CAT, EOS]
    assert chat.conversation_tokens("What", " A cat </s>") == [BOS, WHAT, A, CAT, EOS]
    assert chat.prompt_tokens("What </s>") == [BOS, WHAT, EOS]  # the user's own stays


def test_an_empty_response_is_eos_alone():
    chat = ChatFormat(word_level(), "policy")
    assert chat.response_tokens("What", "") == [EOS]
    assert chat.conversation_tokens("What ", "") == [WHAT, EOS]


def test_without_eos_a_reward_model_scores_and_a_policy_cannot_learn_to_stop():
    tokenizer = word_level(eos_token=None)
    assert ChatFormat(tokenizer, "reward model 'kind'").conversation_tokens("What", " A cat") == [
        WHAT,
        A,
        CAT,
    ]
    assert ChatFormat(tokenizer, "policy").end_tokens() == []
    with pytest.raises(ValueError, match=r"^policy: responses cannot end: the tokenizer has no EOS token"):
        ChatFormat(tokenizer, "policy").response_tokens("What", " A cat")


def test_an_unknown_word_at_the_end_is_not_an_end_of_turn():
    chat = ChatFormat(word_level(), "policy", PLAIN)
    assert chat.response_tokens("What", " dog") == [UNK, EOS]
    assert chat.response_tokens(MESSAGES, "dog") == [UNK, EOS]
    assert chat.end_tokens() == [EOS]


def test_messages_without_an_end_of_turn_token_get_eos():
    chat = ChatFormat(word_level(bos=True, eos=True), "policy", PLAIN)
    prompt = [USER, WHAT, IS, IT, QUESTION, ASSISTANT]  # a template writes BOS itself or has none
    assert chat.prompt_tokens(MESSAGES) == prompt
    assert chat.response_tokens(MESSAGES, "A cat") == [A, CAT, EOS]
    assert chat.conversation_tokens(MESSAGES, "A cat") == [*prompt, A, CAT]


def test_end_of_turn_token_that_is_not_eos():
    template = PLAIN.replace("{{ m.content }}", "{{ m.content }} <eot>")
    chat = ChatFormat(word_level(), "policy", "{{ bos_token }} " + template)
    prompt = [BOS, USER, WHAT, IS, IT, QUESTION, EOT, ASSISTANT]
    assert chat.prompt_tokens(MESSAGES) == prompt
    assert chat.response_tokens(MESSAGES, "A cat") == [A, CAT, EOT]
    assert chat.conversation_tokens(MESSAGES, "A cat") == [*prompt, A, CAT, EOT]
    assert chat.end_tokens() == [EOS, EOT]


def test_chatml_leaves_out_the_newline_after_the_end_of_turn(bpe):
    chat = ChatFormat(bpe, "policy", CHATML)
    prompt = "<|im_start|>user\nWhat is it ?<|im_end|>\n<|im_start|>assistant\n"
    assert chat.prompt_tokens(MESSAGES) == ids(bpe, prompt)
    assert chat.response_tokens(MESSAGES, "It is a cat.") == ids(bpe, "It is a cat.<|im_end|>")
    assert chat.response_tokens(MESSAGES, "It is\n") == ids(bpe, "It is\n<|im_end|>")
    assert chat.response_tokens(MESSAGES, "") == ids(bpe, "<|im_end|>")
    # A reward model scores the newline, as TRL's RewardTrainer does.
    assert chat.conversation_tokens(MESSAGES, "It is a cat.") == ids(bpe, prompt + "It is a cat.<|im_end|>\n")
    assert chat.end_tokens() == sorted(ids(bpe, "<|end|><|im_end|>"))


def test_the_tokenizers_own_template_and_a_template_file(bpe, tmp_path):
    path = tmp_path / "chatml.jinja"
    path.write_text(CHATML)
    expected = ChatFormat(bpe, "policy", CHATML).prompt_tokens(MESSAGES)
    assert ChatFormat(bpe, "policy", str(path)).prompt_tokens(MESSAGES) == expected
    own = word_level(chat_template=PLAIN)
    assert ChatFormat(own, "policy").prompt_tokens(MESSAGES) == [USER, WHAT, IS, IT, QUESTION, ASSISTANT]


def test_hh_transcripts(bpe):
    chat = ChatFormat(bpe, "policy", "hh")
    talk = [*MESSAGES, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Is it?"}]
    text = "\n\nHuman: What is it ?\n\nAssistant: A cat.\n\nHuman: Is it?\n\nAssistant:"
    end = ids(bpe, "<|end|>")
    assert chat.prompt_tokens(talk) == ids(bpe, text)
    assert chat.response_tokens(talk, "It is.") == ids(bpe, " It is.") + end
    assert chat.response_tokens(talk, " It is.") == ids(bpe, " It is.") + end  # as sampled
    assert chat.conversation_tokens(talk, "It is.") == ids(bpe, text + " It is.") + end
    assert chat.prompt_tokens("It is") == ids(bpe, "It is")
    assert chat.response_tokens("It is", "a") == ids(bpe, "a") + end  # text is not a transcript
    assert chat.end_tokens() == end
    bos = ChatFormat(word_level(bos=True), "policy", "hh")
    assert bos.prompt_tokens(MESSAGES) == [BOS, UNK, WHAT, IS, IT, QUESTION, UNK]
    with pytest.raises(
        ValueError, match=r"^policy: an hh-rlhf transcript has no 'system' turn.*policy.chat_template"
    ):
        chat.prompt_tokens([{"role": "system", "content": "Be kind"}, *MESSAGES])


def test_tool_calls_that_a_template_leaves_out_are_refused(bpe):
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "hat"}}}
    messages = [*MESSAGES, {"role": "assistant", "content": None, "tool_calls": [call]}]
    messages += [{"role": "user", "content": "And?"}]
    with pytest.raises(
        ValueError, match=r"^policy: an hh-rlhf transcript has no tool calls.*policy.chat_template"
    ):
        ChatFormat(bpe, "policy", "hh").prompt_tokens(messages)
    deaf = "{% for m in messages %}<{{ m.role }}>{{ m.content or '' }}{% endfor %}"
    with pytest.raises(ValueError, match=r"^policy: the chat template leaves out tool calls"):
        ChatFormat(bpe, "policy", deaf).prompt_tokens(messages)
    heard = deaf.replace(
        "{% endfor", "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}{% endfor", 1
    )
    told = bpe.decode(ChatFormat(bpe, "policy", heard).prompt_tokens(messages))
    assert "look_up" in told


@pytest.mark.parametrize("template", [CHATML, "hh"])
def test_prompt_and_response_join_to_the_conversation(bpe, template):
    chat = ChatFormat(bpe, "policy", template)
    joined = chat.prompt_tokens(MESSAGES) + chat.response_tokens(MESSAGES, "It is a hat.")
    assert chat.conversation_tokens(MESSAGES, "It is a hat.")[: len(joined)] == joined


@pytest.mark.parametrize(
    ("owner", "key"),
    [("policy", "policy.chat_template"), ("reward model 'kind'", "reward_models.kind.chat_template")],
)
def test_errors_name_the_owner_and_its_key(owner, key):
    chat = ChatFormat(word_level(), owner)
    for call in (
        chat.prompt_tokens,
        lambda m: chat.response_tokens(m, "A"),
        lambda m: chat.conversation_tokens(m, "A"),
    ):
        with pytest.raises(
            ValueError, match=rf"^{owner}: the data is conversational.*no chat template; set {key}="
        ):
            call(MESSAGES)
    with pytest.raises(ValueError, match=rf"^{key}=missing\.jinja: no such file"):
        ChatFormat(word_level(), owner, "missing.jinja")
    refusing = ChatFormat(word_level(), owner, "{{ raise_exception('roles must alternate') }}")
    with pytest.raises(
        ValueError, match=rf"^{owner}: the chat template failed .roles must alternate.; set {key}"
    ):
        refusing.prompt_tokens(MESSAGES)


def test_a_conversation_that_does_not_begin_with_the_prompt():
    template = PLAIN.replace("assistant: {% endif %}", "assistant: is it {% endif %}")
    chat = ChatFormat(word_level(), "policy", template)
    with pytest.raises(ValueError, match=r"^policy: under the chat template") as error:
        chat.response_tokens(MESSAGES, "A cat")
    assert "after 6 tokens the prompt goes on with 'is it' and the conversation with 'A cat'" in str(
        error.value
    )
    assert "set policy.chat_template to" in str(error.value)


@pytest.mark.parametrize(
    "template",
    [
        "hh",
        CHATML.replace("<|im_end|>", "<|over|>"),
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    ],
    ids=["transcript", "a mark that is no token", "empty lines"],
)
def test_what_a_template_writes_around_a_response_is_not_of_its_text(bpe, template):
    chat = ChatFormat(bpe, "policy", template)
    prompt, turn = chat.prompt_tokens(MESSAGES), chat.response_tokens(MESSAGES, "It is a hat.")
    (text,) = chat.response_texts([MESSAGES], [prompt], [0], [turn], set(chat.end_tokens()))
    assert text == "It is a hat."
