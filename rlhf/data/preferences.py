"""Preferences (a prompt, a chosen and a rejected response) of a user's dataset, for reward models.

{"prompt": "text", "chosen": "text", "rejected": "text"}               standard
{"prompt": [messages], "chosen": [message], "rejected": [message]}     conversational
{"chosen": ..., "rejected": ...}          implicit prompt: what both begin with (text or messages)
{"chosen": "\\n\\nHuman: ...\\n\\nAssistant: ...", "rejected": ...}        hh-rlhf: all but the last turn
"""

from __future__ import annotations

import logging
from dataclasses import dataclass

from rlhf.data.demonstrations import response_of
from rlhf.data.prompts import explicit_prompt, has, implicit_prompt, missing
from rlhf.data.rows import Row, read_rows
from rlhf.types import Content

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preference:
    """Two responses to a prompt, the better one first, and where they came from ("preferences.jsonl:3")."""

    prompt: Content
    chosen: str
    rejected: str
    source: str = ""


def load_preferences(source: str, tolerated_share: float = 0.0) -> list[Preference]:
    """All preferences of `source`, in order.

    A row that holds none (equal responses, conversations that part before the last turn, ...) is a ValueError
    naming file and line. Public datasets have a few: up to `tolerated_share` of all rows such rows are left
    out instead, and a warning counts them.
    """
    rows = read_rows(source)
    preferences, errors = [], []
    for row in rows:
        try:
            preferences.append(_preference(row))
        except ValueError as error:
            errors.append(error)
            if len(errors) > tolerated_share * len(rows):
                raise
    if errors:
        logger.warning("%s: left out %d of %d rows, the first: %s", source, len(errors), len(rows), errors[0])
    return preferences


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
