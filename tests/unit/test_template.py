"""Chat templates: which one, what it is given, and what it must not leave out."""

from __future__ import annotations

import pytest
from transformers import LlamaConfig

from rlhf.data.chat import ChatFormat
from tests.tokenizer_kinds import CHATML, byte_level, sentence_piece

USER = {"role": "user", "content": "What is it?"}
ANSWER = {"role": "assistant", "content": "It is a cat."}


def rendered(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_named_templates():
    tokenizer = byte_level()
    tokenizer.chat_template = {"default": CHATML, "short": "{{ messages[-1].content }}<|end|>"}
    assert ChatFormat(tokenizer, "policy").prompt_tokens([USER]) == ChatFormat(
        byte_level(), "policy"
    ).prompt_tokens([USER])
    short = ChatFormat(tokenizer, "policy", "short")
    assert short.prompt_tokens([USER]) == rendered(tokenizer, "What is it?<|end|>")
    with pytest.raises(
        ValueError, match=r"policy.chat_template=shrt: no such file; give default, short, a file"
    ):
        ChatFormat(tokenizer, "policy", "shrt")
    tokenizer.chat_template = {"long": CHATML, "short": CHATML}
    with pytest.raises(
        ValueError, match=r"'kind'.*none is called 'default'.*kind.chat_template to one of long, short"
    ):
        ChatFormat(tokenizer, "reward model 'kind'")


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
def test_a_prefill_is_continued(make):
    tokenizer = make()
    chat = ChatFormat(tokenizer, "policy")
    begun = [USER, {"role": "assistant", "content": "It is"}]
    prompt, response = chat.prompt_tokens(begun), chat.response_tokens(begun, " a cat.")
    assert prompt == tokenizer.apply_chat_template(begun, continue_final_message=True, return_dict=False)
    whole = chat.conversation_tokens([USER], "It is a cat.")
    assert prompt + response == whole[: len(prompt + response)]
    assert chat.conversation_tokens(begun, " a cat.") == whole
    assert chat.response_texts([begun], [prompt], [0], [response], chat.end_tokens()) == (" a cat.",)


def test_a_prefill_whose_last_space_the_template_trims():
    """The response begins with the space then; the message has it already."""
    tokenizer = sentence_piece()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content | trim }}</s>{% endfor %}"
    chat = ChatFormat(tokenizer, "policy")
    begun = [USER, {"role": "assistant", "content": "It is "}]
    prompt, whole = chat.prompt_tokens(begun), chat.conversation_tokens([USER], "It is a cat.")
    assert tokenizer.decode(prompt) == "What is it?</s>It is"
    sampled = whole[len(prompt) :]
    assert chat.response_texts([begun], [prompt], [0], [sampled], chat.end_tokens()) == ("a cat.",)
    assert chat.conversation_tokens(begun, "a cat.") == whole == prompt + sampled


def test_transcripts_continue_a_prefill_too():
    chat = ChatFormat(byte_level(), "policy", "hh")
    begun = [USER, {"role": "assistant", "content": "It is"}]
    text = "\n\nHuman: What is it?\n\nAssistant: It is"
    assert chat.prompt_tokens(begun) == rendered(chat.tokenizer, text)
    assert chat.conversation_tokens(begun, " a cat.") == rendered(chat.tokenizer, text + " a cat.<|end|>")


def test_a_response_of_several_turns():
    tokenizer = byte_level()
    turns = [ANSWER, USER, {"role": "assistant", "content": "A hat."}]
    for template in (None, "hh"):
        chat = ChatFormat(tokenizer, "reward model 'kind'", template)
        assert chat.conversation_tokens([USER], turns) == chat.conversation_tokens(
            [USER, ANSWER, USER], "A hat."
        )
    begun = [USER, {"role": "assistant", "content": "It is"}]
    rest = [{"role": "assistant", "content": " a cat."}, *turns[1:]]
    chat = ChatFormat(tokenizer, "policy")
    assert chat.conversation_tokens(begun, rest) == chat.conversation_tokens([USER, ANSWER, USER], "A hat.")


def test_whole_messages_are_given_to_the_template():
    tokenizer = byte_level(
        "{% for m in messages %}<|im_start|>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}{{ call.function.name }}({{ call.function.arguments | tojson }})"
        "{% endfor %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "<|im_end|>"}}}
    talk = [
        {"role": "developer", "content": "Be kind"},
        USER,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "a cat", "name": "look"},
    ]
    tokens = ChatFormat(tokenizer, "policy").prompt_tokens(talk)
    assert tokenizer.decode(tokens) == tokenizer.apply_chat_template(
        talk, tokenize=False, add_generation_prompt=True
    )
    assert tokens.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 4  # the argument's is text


def test_a_role_that_the_template_leaves_out_is_refused():
    template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'developer' %}")
    chat = ChatFormat(byte_level(template), "policy")
    message = (
        r"^policy: the chat template leaves out the message of the role 'developer'.*policy.chat_template"
    )
    for call in (chat.prompt_tokens, lambda talk: chat.conversation_tokens(talk, "It")):
        with pytest.raises(ValueError, match=message):
            call([{"role": "developer", "content": "Be kind"}, USER])
    chat.prompt_tokens([USER])


def test_a_message_that_is_dropped_where_it_stands_only():
    """Earlier thinking may be left out; that is not the message."""
    template = CHATML.replace("{{ m.content }}", "{{ m.content.split('</think>')[-1] }}")
    chat = ChatFormat(byte_level(template), "policy")
    thought = {"role": "assistant", "content": "<think>What</think>It"}
    assert chat.prompt_tokens([USER, thought, USER]) == chat.prompt_tokens(
        [USER, {"role": "assistant", "content": "It"}, USER]
    )


def test_a_border_within_a_token():
    """Read together, the template's last space would go to the next word. The prompt's tokens stay what they are."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    tokenizer = byte_level(template + "{% if add_generation_prompt %}assistant: {% endif %}")
    chat = ChatFormat(tokenizer, "policy")
    prompt, response = chat.prompt_tokens([USER]), chat.response_tokens([USER], "It is")
    assert prompt == rendered(tokenizer, "user: What is it?<|im_end|>assistant: ")
    assert prompt + response == prompt + rendered(tokenizer, "It is<|im_end|>")
    assert chat.response_texts([[USER]], [prompt], [0], [response], chat.end_tokens()) == ("It is",)


def test_tokens_beyond_the_embedding_table():
    tokenizer = byte_level()
    end, rows = tokenizer.convert_tokens_to_ids("<|im_end|>"), len(tokenizer)
    chat = ChatFormat(tokenizer, "reward model 'kind'")
    for size in (rows, rows + 64):
        chat.check_table(LlamaConfig(vocab_size=size), [[USER]])
    with pytest.raises(
        ValueError,
        match=rf"^reward model 'kind': its tokenizer uses the token '<.im_end.>' \({end}\).*has {end} rows",
    ):
        chat.check_table(LlamaConfig(vocab_size=end), [[USER]])
    # A padding token that was added and is never read does no harm; an added word does.
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    ChatFormat(tokenizer, "policy").check_table(LlamaConfig(vocab_size=rows), [[USER], "text"])
    with pytest.raises(ValueError, match=r"'<pad>'"):
        ChatFormat(tokenizer, "policy").check_table(LlamaConfig(vocab_size=rows), ["a <pad> in plain text"])
    tokenizer.add_tokens(["word"])
    with pytest.raises(ValueError, match=r"'word'"):
        ChatFormat(tokenizer, "policy").check_table(LlamaConfig(vocab_size=rows), [[USER]])
