"""The unit of a Bradley-Terry reward. Training length, margins and ensembles stretch rewards by a factor that no pair
tells by its order; one temperature brings them back to nats of preference odds: P(chosen is preferred) =
sigmoid(margin / T), margin = r(chosen) - r(rejected), with T that of the least log loss on pairs that were not trained
on (Guo et al., arXiv 1706.04599, for two classes). Numpy only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 10  # of the calibration error and of the reliability plot, of equally many pairs each
POOR = 0.65  # accuracy on held-out pairs below which aligning to a model makes little sense


@dataclass(frozen=True)
class Bin:
    """Pairs of like confidence: the mean of what is claimed, and how often it is right."""

    confidence: float
    accuracy: float
    pairs: int


@dataclass(frozen=True)
class Fit:
    """How well margins, at some temperature, say which response is preferred."""

    accuracy: float  # share of pairs in the right order; ties count half
    log_loss: float  # nats a pair; log 2 by chance
    error: float  # expected calibration error: mean |confidence - accuracy| over bins, by their pairs
    reliability: tuple[Bin, ...]


@dataclass(frozen=True)
class Calibration:
    """A temperature, and what it does."""

    pairs: int
    temperature: float | None  # None: the pairs do not tell one
    standard_error: float | None
    fault: str  # why there is no temperature; else ""
    before: Fit
    after: Fit

    def as_json(self) -> dict[str, Any]:
        from dataclasses import asdict

        return asdict(self)


def calibrate(margins: np.ndarray) -> Calibration:
    """Fits a temperature to margins of pairs, float [N], in the reward's unit.

    >>> rng = np.random.default_rng(0)
    >>> true = np.abs(rng.normal(0, 2, 20_000))
    >>> wrong = rng.random(20_000) < 1 / (1 + np.exp(true))
    >>> 3.8 < calibrate(4 * np.where(wrong, -true, true)).temperature < 4.2
    True
    """
    margins = np.asarray(margins, np.float64)
    assert margins.ndim == 1
    assert len(margins)
    assert np.isfinite(margins).all()
    before, fault = measure(margins), unfit(margins)
    if fault:
        return Calibration(len(margins), None, None, fault, before, before)
    temperature, error = _least(margins)
    return Calibration(len(margins), temperature, error, "", before, measure(margins / temperature))


def unfit(margins: np.ndarray) -> str:
    """Why no temperature can be told from margins; "": one can."""
    if margins.mean() <= 0:
        return (
            "on the whole it prefers the rejected responses: no temperature makes its margins probabilities"
        )
    if (margins >= 0).all():
        return "it has every pair in the right order, which any temperature near 0 explains: give more pairs"
    return ""


def measure(margins: np.ndarray) -> Fit:
    """Of margins in nats of preference odds, float64 [N]."""
    right = (margins > 0) + 0.5 * (margins == 0)
    confidence = 1 / (1 + np.exp(-np.abs(margins)))
    parts = np.array_split(np.argsort(np.abs(margins), kind="stable"), min(BINS, len(margins)))
    bins = tuple(Bin(float(confidence[p].mean()), float(right[p].mean()), len(p)) for p in parts)
    error = sum(b.pairs * abs(b.confidence - b.accuracy) for b in bins) / len(margins)
    return Fit(float(right.mean()), float(np.logaddexp(0, -margins).mean()), error, bins)


def _least(margins: np.ndarray) -> tuple[float, float]:
    """The temperature of the least log loss and its standard error (delta method, robust to a wrong model).

    The log loss is convex in b = 1 / T; its slope, -mean(m sigmoid(-b m)), is negative at 0 and positive far out.
    """
    scale = float(np.abs(margins).mean())
    m = margins / scale

    def slope(b: float) -> float:
        return float(-(m * _sigmoid(-b * m)).mean())

    low, high = 0.0, 1.0
    while slope(high) < 0:
        low, high = high, 2 * high
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if slope(middle) < 0 else (low, middle)
    b = (low + high) / 2
    p = _sigmoid(-b * m)
    curvature = float((m**2 * p * (1 - p)).mean())
    spread = float((m**2 * p**2).mean())
    error = np.sqrt(spread / len(m)) / curvature  # of b
    return scale / b, float(scale * error / b**2)


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return np.exp(-np.logaddexp(0, -x))
