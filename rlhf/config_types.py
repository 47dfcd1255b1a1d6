"""Values of a configuration against their types, where OmegaConf lets others through."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints


def check_type(key: str, value: Any, hint: Any) -> None:
    """Refuses what OmegaConf lets through: a list within a list of texts, a group that refers to a single value."""
    if get_origin(hint) in (Union, UnionType):
        if value is None:
            return
        hint = next(part for part in get_args(hint) if part is not type(None))
    kind, parts = get_origin(hint) or hint, get_args(hint)
    if kind is not Any and not isinstance(value, kind):
        what = "a group of keys" if is_dataclass(kind) else kind.__name__
        raise ValueError(f"configuration key '{key}' must be {what}, and is {value!r}")
    if kind is list:
        for i, part in enumerate(value):
            check_type(f"{key}[{i}]", part, parts[0])
    elif kind is dict:
        for name, part in value.items():
            check_type(f"{key}.{name}", part, parts[1])
    elif is_dataclass(kind):
        hints = get_type_hints(kind)
        for name, of in ((field.name, hints[field.name]) for field in fields(kind)):
            check_type(f"{key}.{name}".lstrip("."), getattr(value, name), of)
