"""Which keys of two configurations differ, and which of them make another history."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

HARMLESS = (
    "stages",
    "output_dir",
    "trust_remote_code",
    "logging",
    "hub",
    "resources",
    "recovery",
    "evaluate",
    "evaluators",
    "study",
    "plan",
    "align.steps",
    "align.checkpoint",
    "align.max_skipped",
    "deepspeed.zero_stage",
    "deepspeed.micro_batch_tokens",
    "deepspeed.offload_optimizer",
    "deepspeed.activation_checkpointing",
    "rollout.slots",
)
"""Keys, and groups of them, that may change within a history: they say where, how fast or how far, not what."""


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Of the keys that differ, but for harmless ones, both values.

    >>> differences({"seed": 0, "align": {"steps": 5, "kl_coef": 1}}, {"seed": 0, "align": {"steps": 9, "kl_coef": 2}})
    {'align.kl_coef': (1, 2)}
    """
    left, right = dict(_flat("", before)), dict(_flat("", after))
    keys = [key for key in {**left, **right} if not _harmless(key)]
    return {key: (left.get(key), right.get(key)) for key in keys if left.get(key) != right.get(key)}


def told(found: Mapping[str, tuple[Any, Any]], most: int = 6) -> str:
    """
    >>> told({"align.kl_coef": (0.3, 0.2)})
    'align.kl_coef (0.3 there, 0.2 here)'
    """
    words = [f"{key} ({before!r:.60} there, {after!r:.60} here)" for key, (before, after) in found.items()]
    more = f" and {len(words) - most} more" if len(words) > most else ""
    return ", ".join(words[:most]) + more


def check_same(before: Mapping[str, Any], after: Mapping[str, Any], what: str) -> None:
    """
    Raises:
        ValueError: keys differ that make another history; it names them.
    """
    found = differences(before, after)
    if found:
        raise ValueError(
            f"{what} is of another history: these keys differ: {told(found)}; set them as they were, or begin anew "
            "(align.checkpoint.resume=never)"
        )


def _harmless(key: str) -> bool:
    return any(key == name or key.startswith(f"{name}.") for name in HARMLESS)


def _flat(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for name, part in value.items():
            yield from _flat(f"{key}.{name}" if key else str(name), part)
    else:
        yield key, value
