"""Mean and 95 % interval of a few numbers, such as one number for each seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

COVERED = 0.95


def t_quantile(freedom: int) -> float:
    """The t with P(|T| <= t) = 0.95 for Student's T with so many degrees of freedom.

    The distribution function of an integer number of degrees is a finite sum (Abramowitz and Stegun,
    26.7.3 and 26.7.4), inverted here by bisection of the angle atan(t / sqrt(freedom)).

    >>> round(t_quantile(1), 3), round(t_quantile(4), 3)
    (12.706, 2.776)
    """
    assert freedom >= 1, freedom
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _within(middle, freedom) < COVERED else (low, middle)
    return math.sqrt(freedom) * math.tan(low)


def _within(angle: float, freedom: int) -> float:
    """P(|T| <= sqrt(freedom) tan(angle))."""
    odd = freedom % 2
    cosine, term, total = math.cos(angle), 1.0, 0.0
    for k in range(freedom // 2):
        total += term
        step = (2 * k + 2) / (2 * k + 3) if odd else (2 * k + 1) / (2 * k + 2)
        term *= step * cosine**2
    if odd:
        return 2 / math.pi * (angle + math.sin(angle) * cosine * total)
    return math.sin(angle) * total


def estimate(values: Sequence[float]) -> dict[str, Any]:
    """{"mean", "low", "high", "n"}: mean ± t-interval; with one value low and high are None: nothing is known.

    >>> estimate([1.0])
    {'mean': 1.0, 'low': None, 'high': None, 'n': 1}
    """
    count, mean = len(values), float(np.mean(values))
    if count < 2:
        return {"mean": mean, "low": None, "high": None, "n": count}
    half = t_quantile(count - 1) * float(np.std(values, ddof=1)) / math.sqrt(count)
    return {"mean": mean, "low": mean - half, "high": mean + half, "n": count}
