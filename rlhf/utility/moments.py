"""Count, sum and sum of squares of float32 rewards without any rounding, so in whatever order they come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNIT = (
    172  # every float32 is a whole multiple of 2^-172, and its mantissa a whole number at that scale or above
)


@dataclass
class Moments:
    """Exact: `add` and `merge` commute, and mean and std are the correctly rounded ones of all that was added.

    >>> moments = Moments()
    >>> moments.add(np.array([1e30, 1.0, -1e30], np.float32))
    >>> moments.mean
    0.3333333333333333
    """

    count: int = 0
    total: int = 0  # in units of 2^-172
    squares: int = 0  # of 2^-344

    def add(self, rewards: np.ndarray) -> None:
        """rewards: float32 [N], finite, N up to 2^28 (so that sums of 24-bit numbers are exact in float64)."""
        assert len(rewards) <= 1 << 28, len(rewards)
        fractions, exponents = np.frexp(rewards.astype(np.float64))
        mantissas = fractions * 2.0**24  # whole numbers: rewards = mantissas * 2^(exponents - 24)
        squares = mantissas.astype(np.int64) ** 2
        shifts = exponents + (UNIT - 24)
        parts = (mantissas, squares >> 24, squares & 0xFFFFFF)
        sums = np.stack([np.bincount(shifts, part) for part in parts]).astype(np.int64)
        self.count += len(rewards)
        for shift in np.flatnonzero(sums.any(0)).tolist():
            total, high, low = sums[:, shift].tolist()
            self.total += total << shift
            self.squares += ((high << 24) + low) << (2 * shift)

    def merge(self, other: Moments) -> None:
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    @property
    def mean(self) -> float:
        """NaN of nothing."""
        return self.total / (self.count << UNIT) if self.count else float("nan")

    @property
    def std(self) -> float:
        """Unbiased: divisor count - 1; 0 of a single reward, NaN of nothing."""
        if self.count < 2:
            return 0.0 if self.count else float("nan")
        deviations = self.count * self.squares - self.total**2
        return float((deviations / (self.count * (self.count - 1) << (2 * UNIT))) ** 0.5)
