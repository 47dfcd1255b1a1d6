"""The response in a column of a row."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.data.messages import as_messages, is_messages, is_transcript, parse_transcript
from rlhf.data.rows import Row
from rlhf.types import Content, Message, Response


def response_of(row: Row, name: str, prompt: Content) -> Response:
    """The response in column `name`: text, or what the assistant says (`spoken`). The prompt's own messages may
    come before."""
    value = row.values[name]
    if (
        isinstance(value, str)
        and not is_messages(value)
        and (isinstance(prompt, str) or not is_transcript(value))
    ):
        return value.strip() if is_transcript(row.values.get("prompt")) else value
    place = f"{row.source}: {name!r}"
    messages = parse_transcript(value) if is_transcript(value) else as_messages(value, place)
    if (role := messages[-1]["role"]) != "assistant":
        raise ValueError(f"{place} must end with the assistant's message, not the {role}'s")
    rest = messages[len(prompt) :] if _begins(messages, prompt) else messages
    if not rest or rest[0]["role"] != "assistant":
        raise ValueError(
            f"{place} must be what the assistant says after the prompt's last message, with or without the "
            "prompt's messages before it"
        )
    response = spoken(rest)
    if not isinstance(response, str) and not isinstance(prompt, str) and prompt[-1]["role"] == "assistant":
        raise ValueError(
            f"{place} must be one message of text, because it continues the prompt's last message"
        )
    return response


def spoken(messages: Sequence[Message]) -> Response:
    """What these messages say after a prompt: text if they are one message of nothing else; several turns, or
    one with tool calls, say, as they are."""
    first = messages[0]
    return first["content"] if len(messages) == 1 and first.keys() == {"role", "content"} else messages


def _begins(messages: Sequence[Message], prompt: Content) -> bool:
    """Whether the prompt's messages come first. A key besides the content that only one of the two has, an id
    say, does not make another message of it."""
    if isinstance(prompt, str) or len(messages) < len(prompt):
        return False
    pairs = zip(messages, prompt, strict=False)
    return all(a.get(key) == b.get(key) for a, b in pairs for key in a.keys() & b.keys() | {"content"})
