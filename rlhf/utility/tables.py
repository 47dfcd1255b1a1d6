"""Rewards grouped by prompt, and their statistics for all prompts at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class RewardTable:
    """Rewards of P prompts, in one canonical order: by prompt id, then ascending.

    Equal rewards make equal tables, whatever order they came in. Every prompt has one reward at least.

    >>> ids, rewards = np.array([9, 4, 9], np.uint64), np.array([3.0, 1.0, 2.0], np.float32)
    >>> table = RewardTable.empty().with_rewards([(ids, rewards)])
    >>> table.ids.tolist(), table.of_row(1).tolist()
    ([4, 9], [2.0, 3.0])
    """

    ids: np.ndarray  # uint64 [P], ascending
    offsets: np.ndarray  # int64 [P + 1]: prompt p has values[offsets[p]:offsets[p + 1]]
    values: np.ndarray  # float32 [rewards]

    @classmethod
    def empty(cls) -> RewardTable:
        return cls(np.empty(0, np.uint64), np.zeros(1, np.int64), np.empty(0, np.float32))

    def with_rewards(self, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> RewardTable:
        """A table that also has these (prompt ids, rewards)."""
        ids = np.concatenate([np.repeat(self.ids, self.counts), *(batch[0] for batch in batches)])
        values = np.concatenate([self.values, *(batch[1] for batch in batches)])
        values += np.float32(0)  # -0.0 becomes 0.0: the two sort as equals
        order = np.lexsort((values, ids))
        unique, counts = np.unique(ids, return_counts=True)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return RewardTable(unique, offsets, values[order])

    def rows(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the prompts are, int64 [B], and which of them are there at all, bool [B]."""
        rows = np.searchsorted(self.ids, ids)
        known = rows < len(self.ids)
        known[known] = self.ids[rows[known]] == ids[known]
        return rows, known

    def of_row(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def counts(self) -> np.ndarray:
        """Rewards of each prompt, int64 [P]."""
        return np.diff(self.offsets)

    @cached_property
    def mean(self) -> np.ndarray:
        """Of each prompt's rewards, float64 [P]."""
        return self._sums(self.values.astype(np.float64)) / self.counts

    @cached_property
    def std(self) -> np.ndarray:
        """Unbiased standard deviation of each prompt's rewards, float64 [P]; 0 for a single one."""
        deviations = self.values - np.repeat(self.mean, self.counts)
        return np.sqrt(self._sums(deviations**2) / np.maximum(self.counts - 1, 1))

    def quantile(self, level: float) -> np.ndarray:
        """Of each prompt's rewards, float64 [P], interpolated linearly as numpy.quantile does."""
        position = level * (self.counts - 1)
        below = np.floor(position).astype(np.int64)
        above = np.minimum(below + 1, self.counts - 1)
        low, high = (self.values[self.offsets[:-1] + i].astype(np.float64) for i in (below, above))
        return low + (high - low) * (position - below)

    def _sums(self, values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, self.offsets[:-1]) if len(self.ids) else np.empty(0)
