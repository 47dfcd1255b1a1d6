"""JSON that others wrote, as the rest of the program can walk it."""

from __future__ import annotations

import json
from typing import Any

DEEPEST = 64  # levels of lists and objects in each other; real rows have fewer than ten


def parsed(text: str | bytes) -> Any:
    """The value that JSON spells.

    Raises:
        ValueError: it is no JSON or no UTF-8, or nested so deep that walking it would exhaust the stack.
    """
    brackets = ("[", "{") if isinstance(text, str) else (b"[", b"{")
    many = sum(map(text.count, brackets)) > DEEPEST  # type: ignore[arg-type]
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError(f"more than {DEEPEST} lists and objects are nested") from None
    if many and deeper(value, DEEPEST):
        raise ValueError(f"more than {DEEPEST} lists and objects are nested")
    return value


def check_characters(value: Any, place: str) -> None:
    """Refuses a value whose text cannot be written: JSON can spell half of a surrogate pair, which nothing else
    takes."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{place} holds {error.object[error.start]!r}, half of a surrogate pair and no character (a text cut "
            "within an emoji has it); mend the text or leave the row out"
        ) from error


def deeper(value: Any, levels: int) -> bool:
    """Whether lists and objects are nested deeper than so many levels.

    >>> deeper([{"a": 1}], 1), deeper([{"a": 1}], 2)
    (True, False)
    """
    layer = [value]
    for _ in range(levels + 1):
        holders = [part for part in layer if isinstance(part, dict | list)]
        if not holders:
            return False
        layer = [part for h in holders for part in (h.values() if isinstance(h, dict) else h)]
    return True
