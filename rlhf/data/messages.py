"""Messages of a conversation, in each of the ways that a column can hold them.

    [{"role": "user", "content": "text"}, ...]                  a list
    [{"role": "user", "content": [{"type": "text", ...}]}]      content in parts: those of text are joined
    '[{"role": "user", "content": "text"}]'                     a list written as JSON, as in CSV
    "\\n\\nHuman: ...\\n\\nAssistant: ..."                          an hh-rlhf transcript

A message keeps all its keys, for chat templates may read them ("tool_calls", "name", "reasoning_content");
one that is null or empty counts as absent, and so does a null within one: Parquet and `datasets` give every
message the keys of all. The content of an assistant's message with tool calls may be null or absent.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rlhf.data.json_text import check_characters, parsed
from rlhf.types import Message

ROLES = ("system", "developer", "user", "assistant", "tool")
SPEAKERS = {"Human": "user", "Assistant": "assistant"}
LIST = re.compile(r"""\s*\[\s*\{\s*["'](role|content)["']\s*:.*\}\s*\]\s*""", re.DOTALL)


def is_transcript(value: Any) -> bool:
    """Whether this is an hh-rlhf transcript: text that begins with "\\n\\nHuman:"."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def is_messages(value: Any) -> bool:
    """Whether this is a list, or text that spells a list of messages and nothing else. (What is no JSON but looks so
    counts: it is refused with a hint.)"""
    if not isinstance(value, str) or LIST.fullmatch(value) is None:
        return isinstance(value, list)
    try:
        return all(isinstance(m, Mapping) and m.get("role") in ROLES for m in parsed(value))
    except ValueError:
        return True


def parse_transcript(text: str) -> list[Message]:
    r"""The turns of an hh-rlhf transcript, without the space around each.

    >>> parse_transcript("\n\nHuman: Hi!\n\nAssistant: Hello.")
    [{'role': 'user', 'content': 'Hi!'}, {'role': 'assistant', 'content': 'Hello.'}]
    """
    _, *parts = re.split(r"\n\n(Human|Assistant):", text)
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": SPEAKERS[speaker], "content": content.strip()} for speaker, content in turns]


def as_content(value: Any, place: str) -> str | list[Message]:
    """Text as it stands, or messages."""
    if is_transcript(value):
        return parse_transcript(value)
    if isinstance(value, str) and not is_messages(value):
        return value
    if not is_messages(value):
        raise ValueError(f"{place} must be text or a list of messages, not {value!r:.80}")
    return as_messages(value, place)


def as_messages(value: Any, place: str) -> list[Message]:
    """The messages of a list, or of the JSON of one."""
    if isinstance(value, str) and is_messages(value):
        try:
            value = parsed(value)
        except ValueError as error:
            raise ValueError(
                f"{place} looks like a list of messages, but is not JSON ({error}); write it with json.dumps"
            ) from error
        check_characters(value, place)
    if not isinstance(value, list) or not value:
        raise ValueError(
            f'{place} must be messages such as [{{"role": "user", "content": "..."}}], not {value!r:.80}'
        )
    return [_message(message, f"{place}, message {number}") for number, message in enumerate(value, start=1)]


def _message(value: Any, place: str) -> Message:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} must have 'role' and 'content'; found {value!r:.80}")
    calls = value.get("role") == "assistant" and bool(value.get("tool_calls"))
    if "role" not in value or not (calls or "content" in value):
        found = ", ".join(map(repr, value))
        raise ValueError(f"{place} must have 'role' and 'content'; found the keys {found}")
    if (role := value["role"]) not in ROLES:
        *most, last = map(repr, ROLES)
        raise ValueError(
            f"{place}: the role must be {', '.join(most)} or {last}, not {role!r:.80}; rename it"
        )
    message: dict[str, Any] = {"role": role}
    if "content" in value:
        silent = calls and value["content"] is None
        message["content"] = None if silent else _text(value["content"], place)
    for key, more in value.items():
        if key not in ("role", "content") and more not in (None, "", [], {}):
            message[key] = _plain(more, f"{place}: {key!r}")
    return message


def _text(content: Any, place: str) -> str:
    if isinstance(content, list):
        return "".join(_part(part, f"{place}, part {number}") for number, part in enumerate(content, start=1))
    if not isinstance(content, str):
        raise ValueError(f"{place}: the content must be text, not {content!r:.80}")
    return content


def _part(part: Any, place: str) -> str:
    if not isinstance(part, Mapping):
        raise ValueError(f'{place} must be {{"type": "text", "text": "..."}}, not {part!r:.80}')
    if (kind := part.get("type")) != "text":
        raise ValueError(f"{place} is of type {kind!r:.80}, and only text can be read; leave the row out")
    return _text(part.get("text"), place)


def _plain(value: Any, place: str) -> Any:
    """A value as JSON can hold it, without the nulls in its objects."""
    if isinstance(value, Mapping):
        return {name: _plain(v, place) for name, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_plain(v, place) for v in value]
    if not isinstance(value, str | int | float | None):
        raise ValueError(
            f"{place} holds a {type(value).__name__}, which is not text; write it as text or leave it out"
        )
    return value


def said(message: Message) -> str:
    """All that a message says, as one text: its content, and its tool calls as JSON."""
    calls = message.get("tool_calls")
    return (message.get("content") or "") + (json.dumps(calls, ensure_ascii=False) if calls else "")
