"""Quantiles of a prompt with too many rewards to keep: a histogram that does not depend on their order."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rlhf.utility.moments import Moments

BINS = 512  # 4 kB: a float32 edge and an uint32 count each


@dataclass
class GridSketch:
    """Counts of rewards in bins [i w, (i + 1) w), of which only those with a reward are kept, `bins` at most.

    w = 2^exponent is the narrowest power of two that needs no more bins than that for all the rewards added. It is
    decided by the rewards alone, as are the counts: so two sketches of the same rewards are equal whatever the
    order, the batches or the merging, which KLL, REQ and t-digest do not offer. Outliers cost a bin each and
    widen nothing. Count, mean, std, least and greatest are exact.

    A quantile is off by less than w, and typically by far less: rewards lie evenly in their bin. Where all rewards
    are among `bins` distinct values it is exact. Error against KLL and REQ of the same bytes:
    benchmarks/reference_statistics.py.

    >>> one, other = GridSketch(bins=2), GridSketch(bins=2)
    >>> one.add(np.array([0.0, 1.0], np.float32)), one.width
    (None, 1.401298464324817e-45)
    >>> other.add(np.array([5.0], np.float32))
    >>> one.merge(other)
    >>> one.width, one.edges.tolist(), one.counts.tolist()
    (2.0, [0.0, 4.0], [2, 1])
    """

    bins: int = BINS  # 2 at least
    exponent: int = -149  # the least float32 is 2^-149: bins as narrow as that hold one value each
    edges: np.ndarray = field(default_factory=lambda: np.empty(0, np.float32))  # lower ones, ascending
    counts: np.ndarray = field(default_factory=lambda: np.empty(0, np.uint32))
    low: float = np.inf
    high: float = -np.inf
    moments: Moments = field(default_factory=Moments)

    @property
    def width(self) -> float:
        """Of a bin, and the bound of a quantile's error, in the rewards' units."""
        return 2.0**self.exponent

    def add(self, rewards: np.ndarray) -> None:
        """rewards: float32 [N], finite."""
        self.moments.add(rewards)
        self._take(rewards, np.ones(len(rewards)), float(rewards.min()), float(rewards.max()))

    def merge(self, other: GridSketch) -> None:
        """As if the other's rewards were added one by one."""
        assert self.bins == other.bins, (self.bins, other.bins)
        self.moments.merge(other.moments)
        self.exponent = max(self.exponent, other.exponent)
        self._take(other.edges, other.counts, other.low, other.high)

    def _take(self, values: np.ndarray, counts: np.ndarray, low: float, high: float) -> None:
        self.low, self.high = min(self.low, low), max(self.high, high)
        values = np.concatenate([self.edges, values]).astype(np.float64)
        counts = np.concatenate([self.counts, counts])
        if not self._fits(values, self.exponent):
            self.exponent = self._narrowest(values)
        cells, places = np.unique(np.floor(values / self.width), return_inverse=True)
        # The lowest bin is kept as `low`: the edge under the least float32 is not itself a float32.
        self.edges = np.maximum(cells * self.width, self.low).astype(np.float32)
        self.counts = np.bincount(places, counts).astype(np.uint32)

    def _fits(self, values: np.ndarray, exponent: int) -> bool:
        return len(np.unique(np.floor(values * 2.0**-exponent))) <= self.bins

    def _narrowest(self, values: np.ndarray) -> int:
        below, above = self.exponent + 1, 128  # every float32 is within 2^128 of 0: two bins are enough there
        while below < above:
            middle = (below + above) // 2
            below, above = (below, middle) if self._fits(values, middle) else (middle + 1, above)
        return below

    def quantiles(self, levels: np.ndarray) -> np.ndarray:
        """Float64 [levels]: interpolated between order statistics as numpy's are."""
        position = levels * (self.moments.count - 1)
        below = np.floor(position)
        first, second = self._ranked(below), self._ranked(np.minimum(below + 1, self.moments.count - 1))
        return first + (second - first) * (position - below)

    def _ranked(self, ranks: np.ndarray) -> np.ndarray:
        """The order statistics of these ranks, from 0: the rewards of a bin lie evenly in it."""
        ends = np.cumsum(self.counts.astype(np.int64))
        cell = np.searchsorted(ends, ranks, side="right")
        share = (ranks - (ends - self.counts)[cell] + 0.5) / self.counts[cell]
        starts = np.floor(self.edges[cell].astype(np.float64) / self.width)
        ranked = np.clip((starts + share) * self.width, self.low, self.high)
        ranked[ranks == 0] = self.low
        ranked[ranks == self.moments.count - 1] = self.high
        return ranked

    def contents(self) -> bytes:
        """What a digest is made from: equal for equal rewards."""
        scalars = (self.moments.count, self.moments.total, self.moments.squares, self.low, self.high)
        arrays = self.edges.astype("<f4").tobytes() + self.counts.astype("<u4").tobytes()
        return repr((*scalars, self.exponent)).encode() + arrays
