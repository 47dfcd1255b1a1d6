"""Demonstrations (a prompt and the response to imitate) of a user's dataset, for supervised fine-tuning.

{"prompt": "text", "completion": "text"}                          standard
{"prompt": [messages], "completion": [one assistant message]}     conversational
{"messages": [..., {"role": "assistant", ...}]}                   the last turn is the response
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.data.prompts import (
    as_messages,
    checked,
    explicit_prompt,
    has,
    is_transcript,
    missing,
    parse_transcript,
)
from rlhf.data.rows import Row, read_rows
from rlhf.types import Content


@dataclass(frozen=True)
class Demonstration:
    """A prompt, the response to imitate, and where they came from ("demonstrations.jsonl:3")."""

    prompt: Content
    response: str
    source: str = ""


def load_demonstrations(source: str) -> list[Demonstration]:
    """All demonstrations of `source`, in order. A row that holds none is a ValueError naming its line."""
    return [_demonstration(row) for row in read_rows(source)]


def _demonstration(row: Row) -> Demonstration:
    if has(row, "prompt", "completion"):
        prompt = explicit_prompt(row)
        response = response_of(row, "completion", prompt)
    elif has(row, "messages"):
        *leading, last = as_messages(row.values["messages"], f"{row.source}: 'messages'")
        if last["role"] != "assistant":
            role = last["role"]
            raise ValueError(
                f"{row.source}: a demonstration must end with the assistant's message, not the {role}'s"
            )
        prompt, response = checked(leading, row.source), last["content"]
    else:
        raise missing(row, "no demonstration", "both 'prompt' and 'completion', or 'messages'")
    if not response.strip():
        raise ValueError(f"{row.source}: the response is empty; give it text or leave the row out")
    return Demonstration(prompt, response, row.source)


def response_of(row: Row, name: str, prompt: Content) -> str:
    """The response in column `name`: text, one assistant message, or the prompt's messages and that."""
    value = row.values[name]
    if not isinstance(prompt, str) and is_transcript(value):
        messages = parse_transcript(value)
    elif isinstance(value, str):
        return value.strip() if is_transcript(row.values.get("prompt")) else value
    else:
        messages = as_messages(value, f"{row.source}: {name!r}")
    *leading, last = messages
    if last["role"] != "assistant":
        raise ValueError(
            f"{row.source}: {name!r} must end with the assistant's message, not the {last['role']}'s"
        )
    if leading and leading != prompt:
        raise ValueError(
            f"{row.source}: {name!r} must be the prompt's messages and one assistant message after them; "
            f"it leaves the prompt before its last message"
        )
    return last["content"]
