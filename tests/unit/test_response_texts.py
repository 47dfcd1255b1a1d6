"""The text of a response is what its tokens add to the prompt's text, and leads back to the same tokens."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import AddedToken

from rlhf.data.chat import ChatFormat
from tests.tokenizer_kinds import CHATML, LLAMA, byte_level, sentence_piece, unigram, word_piece
from tests.unit.test_chat import CAT, EOS, PLAIN, A, word_level

KINDS = {
    "byte level": byte_level,
    "legacy": lambda: sentence_piece("legacy"),
    "first": sentence_piece,
    "always": lambda: sentence_piece("always"),
    "never": lambda: sentence_piece("never"),
    "unigram": unigram,
}
USER = [{"role": "user", "content": "What is it?"}]


def texts(chat, content, rows, ends=None):
    prompt = chat.prompt_tokens(content)
    ends = set(chat.end_tokens()) if ends is None else ends
    return chat.response_texts([content], [prompt], [0] * len(rows), rows, ends)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("prompt", "response"),
    [
        ("The sky is", " blue."),
        ("The sky is b", "lue."),  # within a word
        ("The sky is ", "blue."),  # after a space
        ("It is a café", ", a naïve café"),
        ("What is it?", "  It is"),
        ("The sky", ""),
    ],
)
def test_text_after_a_prompt(kind, prompt, response):
    """`prompt_tokens` and `response_tokens` together decode to the text, and `response_texts` gives its part back."""
    tokenizer = KINDS[kind]()
    chat = ChatFormat(tokenizer, "policy")
    tokens = chat.response_tokens(prompt, response)
    assert texts(chat, prompt, [tokens]) == (response,)
    together = chat.prompt_tokens(prompt) + tokens
    assert tokenizer.decode(together, skip_special_tokens=True) == prompt + response
    # As the sampler has it: a row of an array.
    assert texts(chat, prompt, [np.array(tokens, np.int32)]) == (response,)


def test_a_reward_model_reads_the_space_that_was_sampled():
    chat = ChatFormat(sentence_piece(), "policy")
    sampled = [
        *chat.tokenizer("is a cat", add_special_tokens=False)["input_ids"],
        chat.tokenizer.eos_token_id,
    ]
    assert chat.tokenizer.convert_ids_to_tokens(sampled[0]) == "▁is"
    (text,) = texts(chat, "The sky", [sampled])
    assert text == " is a cat"
    assert chat.conversation_tokens("The sky", text) == chat.prompt_tokens("The sky") + sampled


def test_word_pieces_join():
    tokenizer = word_piece()
    tokenizer.eos_token = "[SEP]"
    chat = ChatFormat(tokenizer, "policy")
    whole = tokenizer("the naive", add_special_tokens=False)["input_ids"]
    at = next(i for i in range(1, len(whole)) if tokenizer.convert_ids_to_tokens(whole[i]).startswith("##"))
    (text,) = chat.response_texts(["t"], [whole[:at]], [0], [whole[at:]], set())
    assert tokenizer.decode(whole[:at]) + text == tokenizer.decode(whole)


@pytest.mark.parametrize("spaces", ["first", "legacy"])
@pytest.mark.parametrize("prompt", ["It is 数", "It is"])
def test_a_character_cut_off_at_the_length_limit(spaces, prompt):
    """Byte fallback shows its whole run of bytes as unknown then, the prompt's last character too."""
    chat = ChatFormat(sentence_piece(spaces), "policy")
    tokens = chat.tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in "学数".encode()])
    assert texts(chat, prompt, [tokens]) == ("学数",)
    assert texts(chat, prompt, [tokens[:3]]) == ("学",)
    (text,) = texts(chat, prompt, [tokens[:2]])
    assert set(text) == {"\ufffd"}


def test_a_long_prompt_is_not_decoded_again_for_each_response(monkeypatch):
    chat = ChatFormat(byte_level(), "policy")
    prompt, lengths = chat.prompt_tokens("It is a cat. " * 500), []
    decode = chat.tokenizer.decode
    monkeypatch.setattr(
        chat.tokenizer, "decode", lambda ids, **kw: lengths.append(len(ids)) or decode(ids, **kw)
    )
    chat.response_texts(["x"], [prompt], [0] * 3, [prompt[:5]] * 3, set())
    assert max(lengths) < 50 < len(prompt)


@pytest.mark.parametrize("special", [True, False])
def test_what_ends_a_response_is_cut_off_and_only_that(special):
    tokenizer = byte_level(CHATML.replace("<|im_end|>", "<eot>"))
    tokenizer.add_tokens([AddedToken("<eot>", special=special, normalized=False)])
    chat = ChatFormat(tokenizer, "policy")
    eot, start = tokenizer.convert_tokens_to_ids(["<eot>", "<|im_start|>"])
    is_ = tokenizer(" is")["input_ids"]
    rows = [
        [*is_, eot],
        [*is_, tokenizer.eos_token_id],
        [*is_, start, *is_, eot],
        [*is_, start],
        is_,
        [eot],
        [],
    ]
    said = (" is", " is", " is<|im_start|> is", " is<|im_start|>", " is", "", "")
    assert texts(chat, USER, rows) == said
    # The model's configuration may name more ends than the tokenizer.
    assert texts(chat, USER, [[*is_, start], [*is_, eot]], {start}) == (" is", " is<eot>")


@pytest.mark.parametrize(
    ("make", "template"),
    [
        (sentence_piece, LLAMA),  # spaces before and after what is said
        (lambda: sentence_piece("legacy"), LLAMA),
        (byte_level, CHATML),
        # Two tokens after it, and markup before it, as Phi 3, Command R and Qwen 3 have.
        (byte_level, CHATML.replace("<|im_end|>", "<|im_end|>\n<|end|>")),
        (byte_level, CHATML.replace("{{ m.content }}", "<think>\n\n</think>\n\n{{ m.content }}")),
        (byte_level, CHATML.replace("{{ m.content }}", "{{ m.content }} ###")),
        (byte_level, CHATML.partition("{% if add")[0]),  # no generation prompt
    ],
)
@pytest.mark.parametrize("said", ["It is a cat", "It <|im_start|> is</s><s>", ""])
def test_what_a_template_writes_around_a_response_is_not_of_its_text(make, template, said):
    tokenizer = make()
    tokenizer.chat_template = template
    chat = ChatFormat(tokenizer, "policy")
    tokens = chat.response_tokens(USER, said)
    assert texts(chat, USER, [tokens]) == (said,)


@pytest.mark.parametrize(
    "end", ["assistant:{% endif %}", "assistant: {% endif %}", "assistant:\n{% endif %}"]
)
def test_spaces_that_are_no_tokens(end):
    """Decoding puts a space between words; the prompt's own stands there already, and the template's too."""
    tokenizer = word_level(chat_template=PLAIN.replace("assistant: {% endif %}", end))
    chat = ChatFormat(tokenizer, "policy")
    assert texts(chat, USER, [[A, CAT, EOS]]) == ("A cat",)
    assert texts(chat, "What is", [[A, CAT, EOS]]) == (" A cat",)
    assert texts(chat, "What is ", [[A, CAT, EOS]]) == ("A cat",)


def test_tokens_beyond_the_tokenizer_say_nothing():
    """Embedding tables are padded; a policy can sample what its tokenizer does not know."""
    chat = ChatFormat(byte_level(), "policy")
    is_ = chat.tokenizer(" is")["input_ids"]
    assert texts(chat, "It", [[*is_, 4000, *is_]]) == (" is is",)
