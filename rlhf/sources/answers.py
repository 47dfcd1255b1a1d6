"""What came back from outside, as numbers: each fault of it is one line that names source, prompt and response."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf.shown import short
from rlhf.sources.source import Batch
from rlhf.types import Response
from rlhf.utility.scales import PROBABILITY, VERDICT, Scale

LARGEST = float(np.finfo(np.float32).max)  # of rewards


def named(batch: Batch, row: int) -> str:
    """A response, and what it answers, as errors call them."""
    return f"prompt {short(batch.prompts[row])}, response {short(text_of(batch.responses[row]))}"


def text_of(response: Response) -> str:
    """What a response says; of several turns the last."""
    return response if isinstance(response, str) else str(response[-1].get("content") or "")


def as_rewards(source: str, given: Any, batch: Batch, nothing: bool = True) -> list[float | None]:
    """One reward for each response: a finite number or, where `nothing` is allowed, None.

    >>> as_rewards("function 'f'", [True, 2, None], Batch(["a", "b", "c"], ["x", "y", "z"]))
    [1.0, 2.0, None]

    Raises:
        ValueError: there are too many or too few, or one is no finite number.
    """
    values = list(given) if _is_sequence(given) else None
    if values is None:
        raise ValueError(
            f"{source} returned {_told(given)} for {len(batch)} responses; it must return a list of numbers, one "
            "for each"
        )
    if len(values) != len(batch):
        raise ValueError(
            f"{source} returned {len(values)} rewards for {len(batch)} responses, the first of {named(batch, 0)}; "
            "it must return one for each"
        )
    return [as_reward(source, value, batch, row, nothing) for row, value in enumerate(values)]


def as_reward(source: str, value: Any, batch: Batch, row: int, nothing: bool = True) -> float | None:
    """As `as_rewards`, of one response."""
    if value is None and nothing:
        return None
    if hasattr(value, "item") and getattr(value, "size", None) != 0 and not getattr(value, "shape", ()):
        value = value.item()  # of numpy or torch
    number = float(value) if isinstance(value, numbers.Real) else float("nan")
    if not abs(number) <= LARGEST:  # NaN neither
        instead = "a finite number, or None where it does not apply" if nothing else "a finite number"
        raise ValueError(
            f"{source} returned {_told(value)} for {named(batch, row)}; it must return {instead}"
        )
    return number


def check_scale_of(source: str, scale: Scale, rewards: np.ndarray, batch: Batch) -> None:
    """
    Raises:
        ValueError: one of the rewards, float32 [B], is not of the scale; it names source, prompt and response.
    """
    found = misfit(scale, rewards)
    if found is not None:
        row, why = found
        raise ValueError(
            f"{source} gave {rewards[row]:g} for {named(batch, row)}, but its scale is {scale.kind}: {why}"
        )


def misfit(scale: Scale, rewards: np.ndarray) -> tuple[int, str] | None:
    """The first of these rewards, float [B], that cannot be of a scale, and why. NaN (it does not apply) can.

    >>> misfit(Scale("probability"), np.array([0.5, np.nan, 1.0]))
    (2, 'with error_rate=0 the log of a probability of 0 or 1, or of its complement, is infinite')
    """
    known, bad, why = ~np.isnan(rewards), np.zeros(len(rewards), bool), ""
    if scale.kind == VERDICT:
        bad, why = known & ~np.isin(rewards, (0, 1)), "a verdict is 0 or 1 (false or true)"
    if scale.kind == PROBABILITY:
        bad, why = known & ~((rewards >= 0) & (rewards <= 1)), "a probability lies within [0, 1]"
        if not bad.any() and scale.error_rate == 0:
            bad = known & np.isin(rewards, (0, 1))
            why = "with error_rate=0 the log of a probability of 0 or 1, or of its complement, is infinite"
    return (int(np.flatnonzero(bad)[0]), why) if bad.any() else None


def _is_sequence(value: Any) -> bool:
    if isinstance(value, Sequence):
        return not isinstance(value, str | bytes)
    return hasattr(value, "tolist") and bool(getattr(value, "shape", ()))


def _told(value: Any) -> str:
    if isinstance(value, float):
        return str(value)
    text = repr(value)
    return f"{text[:60]}{'...' * (len(text) > 60)} ({type(value).__name__})"
