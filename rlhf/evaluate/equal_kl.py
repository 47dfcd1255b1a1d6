"""A metric as a function of KL, so that arms can be compared at equal KL and never at equal coefficient."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Curve:
    """Straight lines between measured points; nothing is known outside `kl[0]` to `kl[-1]`.

    >>> curve = Curve.through([(2.0, 0.3)], anchor=0.1)
    >>> round(curve.at(1.0), 3), round(curve.average(0.0, 2.0), 3), curve.covers(2.5)
    (0.2, 0.2, False)
    """

    kl: np.ndarray  # float64 [K], increasing, nats
    value: np.ndarray  # float64 [K]

    @classmethod
    def through(cls, points: Iterable[tuple[float, float]], anchor: float | None) -> Curve:
        """Through (KL, value) points in any order, and through (0, anchor), the base policy.

        A measured KL below 0 can only be noise and counts as 0; points of equal KL are averaged.
        """
        pairs = [(max(0.0, kl), value) for kl, value in points]
        pairs += [] if anchor is None else [(0.0, anchor)]
        assert pairs, "a curve without points"
        measured, values = np.array(pairs, np.float64).T
        kl, index = np.unique(measured, return_inverse=True)
        return cls(kl, np.bincount(index, values) / np.bincount(index))

    def covers(self, kl: float) -> bool:
        return bool(self.kl[0] <= kl <= self.kl[-1])

    def at(self, kl: float) -> float:
        assert self.covers(kl), (kl, self.kl)
        return float(np.interp(kl, self.kl, self.value))

    def average(self, low: float, high: float) -> float:
        """Exact mean over the KL range low to high."""
        assert self.covers(low), (low, self.kl)
        assert self.covers(high), (high, self.kl)
        assert low < high, (low, high)
        inside = self.kl[(self.kl > low) & (self.kl < high)]
        knots = np.concatenate([[low], inside, [high]])
        return float(np.trapezoid(np.interp(knots, self.kl, self.value), knots) / (high - low))


def common_range(curves: Sequence[Curve]) -> tuple[float, float] | None:
    """The KL range (low, high) that every curve covers; None when there is none."""
    low, high = max(c.kl[0] for c in curves), min(c.kl[-1] for c in curves)
    return (float(low), float(high)) if low < high else None
