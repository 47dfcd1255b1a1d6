"""Prompts of a user's dataset, and what all kinds of rows share: messages, transcripts, implicit prompts.

A row holds its prompt in one of these ways; the first that is there counts:

    {"prompt": "text"}                                    standard
    {"prompt": [{"role": "user", "content": "text"}]}     conversational
    {"messages": [..., {"role": "user", ...}]}            a last turn of the assistant is dropped
    {"chosen": ..., "rejected": ...}                      implicit: what both begin with

Text that begins with "\\n\\nHuman:" is an hh-rlhf transcript and is read as messages. A text prompt beside
conversational responses (a list in "chosen", "rejected", "completion" or "messages") is the user's message.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from typing import Any

from rlhf.data.rows import Row, read_rows
from rlhf.types import Content, Message, Prompt, prompt_id

logger = logging.getLogger(__name__)

ROLES = ("system", "user", "assistant")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}


def load_prompts(source: str) -> list[Prompt]:
    """The distinct prompts of `source`, in order. A repeated prompt is kept once (its first row), and a
    warning counts the repetitions. `meta` has the columns of the row that did not make the prompt."""
    rows = read_rows(source)
    prompts: dict[int, Prompt] = {}
    for row in rows:
        content, used = _prompt(row)
        meta = {name: value for name, value in row.values.items() if name not in used}
        prompts.setdefault(prompt_id(content), Prompt(content, meta, row.source))
    if dropped := len(rows) - len(prompts):
        logger.warning(
            "%s: dropped %d of %d rows: duplicate prompts (the first of each is kept); %d prompts remain",
            source,
            dropped,
            len(rows),
            len(prompts),
        )
    return list(prompts.values())


def _prompt(row: Row) -> tuple[Content, tuple[str, ...]]:
    """The row's prompt, and the columns it was made from."""
    if has(row, "prompt"):
        return explicit_prompt(row, drop_answer=True), ("prompt",)
    if has(row, "messages"):
        messages = as_messages(row.values["messages"], f"{row.source}: 'messages'")
        return checked(without_answer(messages), row.source), ("messages",)
    if has(row, "chosen", "rejected"):
        return implicit_prompt(row), ("chosen", "rejected")
    raise missing(row, "no prompt", "'prompt', 'messages', or both 'chosen' and 'rejected'")


def has(row: Row, *names: str) -> bool:
    """Whether all these columns have a value (Parquet fills the absent ones with None)."""
    return all(row.values.get(name) is not None for name in names)


def missing(row: Row, what: str, expected: str) -> ValueError:
    found = ", ".join(repr(name) for name in row.values if has(row, name)) or "none"
    return ValueError(f"{row.source}: {what}: expected {expected}; found the keys {found}")


def explicit_prompt(row: Row, drop_answer: bool = False) -> Content:
    """The prompt in the column "prompt". Of a transcript the assistant's last turn is dropped if it is empty
    ("\\n\\nAssistant:"), with `drop_answer` also if it says something."""
    value = row.values["prompt"]
    content = as_content(value, f"{row.source}: 'prompt'")
    if isinstance(content, str):
        others = (row.values.get(name) for name in ("chosen", "rejected", "completion", "messages"))
        if any(isinstance(other, list) for other in others):
            content = [{"role": "user", "content": content}]
    elif is_transcript(value) and (drop_answer or not content[-1]["content"]):
        content = without_answer(content)
    return checked(content, row.source)


def implicit_prompt(row: Row) -> Content:
    """What chosen and rejected both begin with: whole messages, or text up to the end of a word.

    A response is left to each of the two. In text the space before it belongs to the response, and a word
    or number that only begins the same is not split (TRL's `extract_prompt` splits it).
    """
    chosen = as_content(row.values["chosen"], f"{row.source}: 'chosen'")
    rejected = as_content(row.values["rejected"], f"{row.source}: 'rejected'")
    if isinstance(chosen, str) and isinstance(rejected, str):
        return checked(_common_text(chosen, rejected), row.source, "beginning that both share")
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError(f"{row.source}: 'chosen' and 'rejected' must both be text or both be messages")
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    while shared and chosen[shared - 1]["role"] != "user":
        shared -= 1
    if not shared:
        raise ValueError(f"{row.source}: no prompt: 'chosen' and 'rejected' share no turn of the user")
    return checked(chosen[:shared], row.source)


def _common_text(first: str, second: str) -> str:
    end, limit = 0, min(len(first), len(second)) - 1
    while end < limit and first[end] == second[end]:
        end += 1
    while end and _in_word(first[end - 1]) and (_in_word(first[end]) or _in_word(second[end])):
        end -= 1
    return first[: end - 1] if end and first[end - 1] == " " else first[:end]


def _in_word(character: str) -> bool:
    """Of a number, or of a word in a script that puts spaces between words (those have letter case)."""
    return character.isdigit() or character.lower() != character.upper()


def is_transcript(value: Any) -> bool:
    """Whether this is an hh-rlhf transcript: text that begins with "\\n\\nHuman:"."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def parse_transcript(text: str) -> list[Message]:
    r"""The turns of an hh-rlhf transcript, without the space around each.

    >>> parse_transcript("\n\nHuman: Hi!\n\nAssistant: Hello.")
    [{'role': 'user', 'content': 'Hi!'}, {'role': 'assistant', 'content': 'Hello.'}]
    """
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": SPEAKERS[speaker], "content": content.strip()} for speaker, content in turns]


def as_content(value: Any, place: str) -> str | list[Message]:
    """Text, or messages with exactly a role and a content; a transcript becomes messages."""
    if isinstance(value, str):
        return parse_transcript(value) if is_transcript(value) else value
    if not isinstance(value, list):
        raise ValueError(f"{place} must be text or messages, not {value!r:.80}")
    return as_messages(value, place)


def as_messages(value: Any, place: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise ValueError(
            f'{place} must be messages such as [{{"role": "user", "content": "..."}}], not {value!r:.80}'
        )
    return [_message(message, f"{place}, message {number}") for number, message in enumerate(value, start=1)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, Mapping) or not {"role", "content"} <= set(value):
        found = "the keys " + ", ".join(map(repr, value)) if isinstance(value, Mapping) else f"{value!r:.80}"
        raise ValueError(f"{place} must have 'role' and 'content'; found {found}")
    role, content = value["role"], value["content"]
    if role not in ROLES:
        raise ValueError(f"{place}: the role must be 'system', 'user' or 'assistant', not {role!r:.80}")
    if not isinstance(content, str):
        raise ValueError(f"{place}: the content must be text, not {content!r:.80}")
    return {"role": role, "content": content}


def without_answer(messages: list[Message]) -> list[Message]:
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def checked(content: str | list[Message], place: str, what: str = "prompt") -> Content:
    """The content, if it can be answered: it is not empty, and the last of its messages is the user's."""
    if not isinstance(content, str) and content and content[-1]["role"] != "user":
        role = content[-1]["role"]
        raise ValueError(f"{place}: the last message of a prompt must be the user's, not the {role}'s")
    if not content or not (content if isinstance(content, str) else content[-1]["content"]).strip():
        raise ValueError(f"{place}: the {what} is empty; give it text or leave the row out")
    return content
