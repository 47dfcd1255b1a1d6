"""The settings of a source as its kind has them. Imports no torch."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf.config_types import check_type
from rlhf.sources.kinds import source_class
from rlhf.sources.source import Source


def typed_source(key: str, given: Any) -> Source:
    """The settings of one reward source, by its kind.

    Raises:
        ValueError: a key is unknown, missing or of the wrong type, or the kind is not known; it names the key.
    """
    if not isinstance(given, dict):
        raise ValueError(f"configuration key '{key}' must be a group of keys, and is {given!r}")
    kind = source_class(key, given.get("kind"))
    missing = [f.name for f in fields(kind) if f.name not in given and _required(f)]
    if missing:
        raise ValueError(
            f"configuration key '{key}.{missing[0]}' is missing: begin with a source of conf/source, as in "
            f"+source@{key}={given['kind']}"
        )
    try:
        found = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), given))
    except (OmegaConfBaseException, OverflowError) as error:
        place = getattr(error, "full_key", None)
        raise ValueError(
            f"configuration key '{key}{f'.{place}' if place else ''}': {str(error).splitlines()[0]}"
        ) from None
    check_type(key, found, kind)
    assert isinstance(found, Source)
    return found


def _required(field: Field) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
