"""Messages as users have them: parts, tools, prefills, more keys; what is lost without notice is refused."""

from __future__ import annotations

import datetime
import json
import re

import pytest

from rlhf.data.demonstrations import load_demonstrations
from rlhf.data.messages import said
from rlhf.data.preferences import load_preferences
from rlhf.data.prompts import load_prompts
from rlhf.evaluate.examples import prompt_text
from rlhf.types import prompt_id

HI = {"role": "user", "content": "Hi"}
CALLS = [{"type": "function", "id": "7", "function": {"name": "weather", "arguments": {"city": "Köln"}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": CALLS}
TOOL = {"role": "tool", "content": "12", "name": "weather", "tool_call_id": "7"}
DONE = {"role": "assistant", "content": "12 degrees."}
SURE = {"role": "assistant", "content": "Sure,"}


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*rows):
    with open("data.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return "data.jsonl"


def content(row):
    (prompt,) = load_prompts(write(row))
    return prompt.content


def refuses(load, row, message):
    good = {"prompt": "p", "completion": "c", "chosen": "c", "rejected": "d"}
    with pytest.raises(ValueError, match="^" + re.escape(f"data.jsonl:2: {message}")):
        load(write(good, row))


def test_ids_of_plain_content_are_what_they_always_were():
    talk = [{"role": "system", "content": "Be kind."}, {"content": "Hi é", "role": "user"}]
    assert (prompt_id("Hi é"), prompt_id(talk)) == (9740908456167655566, 12582879792318833210)


def test_every_key_of_a_message_is_part_of_the_id():
    ids = [
        prompt_id([{**HI, **more}]) for more in ({}, {"name": "Ann"}, {"name": "Bo"}, {"x": [1]}, {"x": [2]})
    ]
    assert len(set(ids)) == 5


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [HI, CALL, TOOL]},
        {"messages": [HI, CALL, TOOL, DONE]},
        {"messages": [HI, CALL, TOOL, CALL]},
        {"messages": json.dumps([HI, CALL, TOOL, DONE])},
        {"chosen": [HI, CALL, TOOL, DONE], "rejected": [HI, CALL, TOOL, SURE]},
    ],
)
def test_tool_turns_are_kept_whole(row):
    assert content(row) == [HI, CALL, TOOL]


def test_content_that_is_absent_stays_absent_and_nulls_and_empties_go():
    silent = {"role": "assistant", "tool_calls": CALLS}
    noisy = [{**HI, "name": None, "tool_calls": []}, {**silent, "name": ""}, {**TOOL, "content": ""}]
    assert content({"prompt": noisy}) == [HI, silent, {**TOOL, "content": ""}]
    other = {"type": "function", "function": {"name": "f", "arguments": {"city": None, "n": [1, None]}}}
    (_, call, _) = content({"prompt": [HI, {**CALL, "tool_calls": [other]}, TOOL]})
    assert call["tool_calls"][0]["function"]["arguments"] == {"n": [1, None]}


def test_tool_turns_of_parquet_are_those_of_json():
    import pyarrow
    import pyarrow.parquet

    rows = [{"messages": [HI, CALL, TOOL, DONE]}, {"messages": [{**HI, "content": "Ho"}, DONE]}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), "data.parquet")
    found = [p.content for p in load_prompts("data.parquet")]
    assert found == [p.content for p in load_prompts(write(*rows))]


def test_the_developer_role_a_prefill_and_parts():
    developer = {"role": "developer", "content": "Be brief."}
    assert content({"prompt": [developer, HI, SURE]}) == [developer, HI, SURE]
    parts = [{"type": "text", "text": "H", "image": None}, {"type": "text", "text": "i"}]
    assert content({"prompt": [{"role": "user", "content": parts}]}) == [HI]
    assert prompt_id(content({"prompt": [{"role": "user", "content": parts}]})) == prompt_id([HI])


def test_a_response_may_continue_a_prefill():
    row = {
        "prompt": [HI, SURE],
        "completion": " here.",
        "chosen": [{**DONE, "content": " a"}],
        "rejected": " b",
    }
    assert load_demonstrations(write(row))[0].response == " here."
    (pair,) = load_preferences(write(row))
    assert (pair.prompt, pair.chosen, pair.rejected) == ([HI, SURE], " a", " b")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [{"role": "user", "content": [{"type": "image"}]}],
            "'prompt', message 1, part 1 is of type 'image', and",
        ),
        ([{"role": "user", "content": ["a"]}], '\'prompt\', message 1, part 1 must be {"type": "text"'),
        (
            [{"role": "user", "content": [{"type": "text"}]}],
            "'prompt', message 1, part 1: the content must be text",
        ),
        (
            [HI, {"role": "assistant", "content": None}],
            "'prompt', message 2: the content must be text, not None",
        ),
        ([HI, {"role": "user", "tool_calls": CALLS}], "'prompt', message 2 must have 'role' and 'content'"),
        ([HI, CALL], "the prompt ends with tool calls; give the tools' answers after them"),
        ([HI, {**SURE, "content": " "}], "the prompt is empty"),
        (
            [HI, {"role": "developer", "content": "a"}],
            "the last message of a prompt must be the user's, not the dev",
        ),
        ("[{'role': 'user', 'content': 'Hi'}]", "'prompt' looks like a list of messages, but is not JSON ("),
    ],
)
def test_messages_that_cannot_be_read(messages, message):
    refuses(load_prompts, {"prompt": messages}, message)


def test_text_that_only_begins_like_messages_is_text():
    for text in ('[{"role": "user"}] what is this?', '[{"a": 1}]', "[INST] a [/INST]"):
        assert content({"prompt": text}) == text


def test_a_key_that_json_cannot_hold_is_refused():
    import pyarrow
    import pyarrow.parquet

    row = {"prompt": [{**HI, "at": datetime.datetime(2024, 1, 1)}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), "data.parquet")
    with pytest.raises(ValueError, match=r"^data.parquet, row 1: 'prompt', message 1: 'at' holds a datetime"):
        load_prompts("data.parquet")


@pytest.mark.parametrize(
    ("column", "value", "text_too"),
    [
        ("tools", [{"type": "function"}], False),
        ("chat_template_kwargs", {"enable_thinking": False}, False),
        ("images", ["a.png"], True),
        ("image", "a.png", True),
    ],
)
@pytest.mark.parametrize("load", [load_prompts, load_demonstrations, load_preferences])
def test_columns_that_would_be_lost_are_refused(load, column, value, text_too):
    rest = {"completion": "a", "chosen": "a", "rejected": "b"}
    message = f"the column {column!r} is not given to the models"
    refuses(load, {"prompt": [HI], column: value, **rest}, message)
    assert len(load(write({"prompt": [HI], column: type(value)(), **rest}))) == 1
    if text_too:
        refuses(load, {"prompt": "Hi", column: value, **rest}, message)
    else:
        assert len(load(write({"prompt": "Hi", column: value, **rest}))) == 1


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [HI, CALL]},
            "a demonstration's response must be one message with nothing but text, and this",
        ),
        (
            {"messages": [HI, {**DONE, "reasoning_content": "Hm."}]},
            "a demonstration's response must be one message",
        ),
        (
            {"prompt": [HI], "completion": [CALL, TOOL, DONE]},
            "a demonstration's response must be one message",
        ),
        (
            {"prompt": "a", "completion": "b", "label": False},
            "'label' is false: this response is not one to imitate",
        ),
        (
            {"instruction": "a", "output": "b"},
            "no demonstration: expected both 'prompt' and 'completion', or",
        ),
    ],
)
def test_demonstrations_that_would_lose_something(row, message):
    refuses(load_demonstrations, row, message)


def test_known_formats_are_told_by_their_columns():
    for row, hint in (
        ({"conversations": []}, r"found the keys 'conversations'; turn 'conversations' \(ShareGPT"),
        ({"instruction": "a", "output": "b"}, r"turn 'instruction' and 'input' \(Alpaca\) into 'prompt'"),
        ({"question": "a"}, r"found the keys 'question'; rename or convert the columns"),
    ):
        for load in (load_prompts, load_demonstrations, load_preferences):
            with pytest.raises(ValueError, match=hint):
                load(write(row))


def test_responses_with_tool_calls_or_more_keys_are_messages():
    row = {"chosen": [HI, CALL, TOOL, DONE], "rejected": [HI, {**DONE, "reasoning_content": "Hm."}]}
    (pair,) = load_preferences(write(row))
    assert pair.prompt == [HI]
    assert (pair.chosen, pair.rejected) == ([CALL, TOOL, DONE], [{**DONE, "reasoning_content": "Hm."}])


def test_messages_of_a_given_prompt_may_have_keys_of_their_own():
    row = {"prompt": "Hi", "chosen": [{**HI, "id": 1}, DONE], "rejected": [{**HI, "id": 2}, SURE]}
    (pair,) = load_preferences(write(row))
    assert (pair.prompt, pair.chosen, pair.rejected) == ([HI], "12 degrees.", "Sure,")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": [HI, SURE], "chosen": [DONE, HI, DONE], "rejected": "a"},
            "'chosen' must be one message of text, because it continues the prompt's last message",
        ),
        (
            {"prompt": [HI, SURE], "chosen": [CALL], "rejected": "a"},
            "'chosen' must be one message of text, because",
        ),
        (
            {"prompt": [HI], "chosen": [TOOL, DONE], "rejected": "a"},
            "'chosen' must be what the assistant says after",
        ),
        (
            {"chosen": [HI, {**HI, "content": "a"}, DONE], "rejected": [HI, {**HI, "content": "b"}, DONE]},
            "no prompt: 'chosen' and 'rejected' share no turn of the user that both answer",
        ),
    ],
)
def test_pairs_without_two_responses(row, message):
    refuses(load_preferences, row, message)


def test_tool_calls_are_shown_as_json():
    text = (
        'user: Hi\nassistant: [{"type": "function", "id": "7", "function": {"name": "weather", "arguments": '
    )
    assert prompt_text([HI, CALL, TOOL]) == text + '{"city": "Köln"}}}]\ntool: 12'
    assert said({"role": "assistant", "content": "So: ", "tool_calls": [1]}) == "So: [1]"
