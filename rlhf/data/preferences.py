"""Preferences (a prompt, a chosen and a rejected response) of a user's dataset, for reward models.

{"prompt": "text", "chosen": "text", "rejected": "text"}               standard
{"prompt": [messages], "chosen": [message], "rejected": [message]}     conversational
{"chosen": ..., "rejected": ...}          implicit prompt: what both begin with (text or messages)
{"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}        hh-rlhf: its messages

A response is all that follows the prompt: where two conversations part before their last message, several turns.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from rlhf.data.prompts import explicit_prompt, has, implicit_prompt, missing
from rlhf.data.responses import response_of
from rlhf.data.rows import Row, Source, named, read_rows
from rlhf.types import Content, Response

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Preference:
    """Two responses to a prompt, the better one first, and where they came from ("preferences.jsonl:3")."""

    prompt: Content
    chosen: Response
    rejected: Response
    source: str = ""


def load_preferences(source: Source, tolerated_share: float = 0.0) -> list[Preference]:
    """All preferences of `source`, in order: `made_of_preferences` as they are."""
    return made_of_preferences(source, tolerated_share, lambda preference: preference)


def made_of_preferences(source: Source, tolerated_share: float, make: Callable[[Preference], T]) -> list[T]:
    """What `make` makes of each preference of `source`, in order.

    A row that holds none (equal responses, a missing column, ...), or of which `make` can make nothing (it raises
    a ValueError), is a ValueError that names the row. Public datasets have a few: up to `tolerated_share` of all
    rows such rows are left out instead, and a warning counts them.
    """
    rows = read_rows(source)
    found, errors = [], []
    for row in rows:
        try:
            found.append(make(_preference(row)))
        except ValueError as error:
            errors.append(error)
            if len(errors) > tolerated_share * len(rows):
                raise
    if errors:
        logger.warning(
            "%s: left out %d of %d rows, the first: %s", named(source), len(errors), len(rows), errors[0]
        )
    return found


def _preference(row: Row) -> Preference:
    if not has(row, "chosen", "rejected"):
        raise missing(
            row, "no preference", "'chosen' and 'rejected' (and 'prompt', unless both begin with it)"
        )
    explicit = has(row, "prompt")
    prompt = explicit_prompt(row) if explicit else implicit_prompt(row)
    chosen, rejected = (response_of(row, name, prompt) for name in ("chosen", "rejected"))
    if not explicit and isinstance(prompt, str):
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
    if chosen == rejected:
        raise ValueError(f"{row.source}: 'chosen' and 'rejected' are the same response; leave the row out")
    return Preference(prompt, chosen, rejected, row.source)
