"""Demonstrations (a prompt and the response to imitate) of a user's dataset, for supervised fine-tuning.

{"prompt": "text", "completion": "text"}                          standard
{"prompt": [messages], "completion": [one assistant message]}     conversational
{"messages": [..., {"role": "assistant", ...}]}                   the last turn is the response

A response is one message of text; turns after it, tool calls or reasoning are refused, for they would be lost.
"""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.data.messages import as_messages
from rlhf.data.prompts import checked, explicit_prompt, has, missing
from rlhf.data.responses import response_of, spoken
from rlhf.data.rows import Row, Source, read_rows
from rlhf.types import Content


@dataclass(frozen=True)
class Demonstration:
    """A prompt, the response to imitate, and where they came from ("demonstrations.jsonl:3")."""

    prompt: Content
    response: str
    source: str = ""


def load_demonstrations(source: Source) -> list[Demonstration]:
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
        prompt, response = checked(leading, row), spoken([last])
    else:
        raise missing(row, "no demonstration", "both 'prompt' and 'completion', or 'messages'")
    if not isinstance(response, str):
        keys = ", ".join(repr(key) for key in response[0] if key not in ("role", "content"))
        found = f"{len(response)} messages" if len(response) > 1 else f"the keys {keys}"
        raise ValueError(
            f"{row.source}: a demonstration's response must be one message with nothing but text, and this has "
            f"{found}; leave them out, or the row"
        )
    if not response.strip():
        raise ValueError(f"{row.source}: the response is empty; give it text or leave the row out")
    if row.values.get("label") is False:
        raise ValueError(
            f"{row.source}: 'label' is false: this response is not one to imitate; leave the row out"
        )
    return Demonstration(prompt, response, row.source)
