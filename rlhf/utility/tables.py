"""Rewards grouped by prompt: exact ones, and those kept as one byte each."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

CHUNK = 1 << 18  # rewards handled at once where temporary memory would otherwise grow with the table
CODES = 255


@dataclass(frozen=True)
class RewardTable:
    """Rewards of P prompts, in ascending order of prompt id. Every prompt has one reward at least.

    Those of a prompt are in no set order until `sort_rewards`. From then on equal rewards make equal tables.

    >>> ids, rewards = np.array([9, 4, 9], np.uint64), np.array([3.0, 1.0, 2.0], np.float32)
    >>> table = RewardTable.of(ids, rewards)
    >>> table.sort_rewards()
    >>> table.ids.tolist(), table.offsets.tolist(), table.values.tolist()
    ([4, 9], [0, 1, 3], [1.0, 2.0, 3.0])
    """

    ids: np.ndarray  # uint64 [P], ascending
    offsets: np.ndarray  # int64 [P + 1]: prompt p has values[offsets[p]:offsets[p + 1]]
    values: np.ndarray  # float32 [rewards]

    @classmethod
    def of(cls, ids: np.ndarray, values: np.ndarray) -> RewardTable:
        """From a prompt id, uint64 [N], for each reward, float32 [N]; prompts may repeat."""
        starts = np.flatnonzero(np.concatenate([np.ones(min(len(ids), 1), bool), ids[1:] != ids[:-1]]))
        lengths = np.diff(np.append(starts, len(ids)))
        order = np.argsort(ids[starts], kind="stable")
        unique, first = np.unique(ids[starts][order], return_index=True)
        counts = np.add.reduceat(lengths[order], first) if len(first) else lengths
        return cls(unique, _offsets(counts), values[ragged(starts[order], lengths[order])])

    @classmethod
    def union(cls, tables: Sequence[RewardTable]) -> RewardTable:
        """The rewards of all of them. Beside the result it needs memory for a few arrays of P numbers only."""
        ids = np.unique(np.concatenate([table.ids for table in tables]))
        rows = [np.searchsorted(ids, table.ids) for table in tables]
        counts = np.zeros(len(ids), np.int64)
        for row, table in zip(rows, tables, strict=True):
            counts[row] += table.counts
        offsets = _offsets(counts)
        values, free = np.empty(offsets[-1], np.float32), offsets[:-1].copy()
        for row, table in zip(rows, tables, strict=True):
            for part in table.chunks():
                lengths = np.diff(table.offsets[part.start : part.stop + 1])
                source = slice(table.offsets[part.start], table.offsets[part.stop])
                values[ragged(free[row[part]], lengths)] = table.values[source]
            free[row] += table.counts
        return cls(ids, offsets, values)

    def without(self, ids: np.ndarray) -> RewardTable:
        """The table less these prompts, uint64 [N]; itself where it has none of them."""
        kept = ~np.isin(self.ids, ids)
        if kept.all():
            return self
        counts = self.counts
        values = self.values[ragged(self.offsets[:-1][kept], counts[kept])]
        return RewardTable(self.ids[kept], _offsets(counts[kept]), values)

    @property
    def counts(self) -> np.ndarray:
        """Rewards of each prompt, int64 [P]."""
        return np.diff(self.offsets)

    def chunks(self) -> Iterator[slice]:
        """Slices of consecutive prompts with about `CHUNK` rewards each."""
        yield from chunks(self.offsets)

    def sort_rewards(self) -> None:
        """Puts the rewards of every prompt in ascending order, in place."""
        for part in self.chunks():
            offsets = self.offsets[part.start : part.stop + 1]
            counts = np.diff(offsets)
            for count in np.unique(counts).tolist():
                places = offsets[:-1][counts == count][:, None] + np.arange(count)
                self.values[places] = np.sort(self.values[places], axis=1)

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """The rewards of these prompts one after the other, float32 [their counts' sum]."""
        return self.values[ragged(self.offsets[rows], self.offsets[rows + 1] - self.offsets[rows])]


@dataclass(frozen=True)
class CompactTable:
    """Rewards of P prompts in one byte each, evenly between the prompt's least and greatest reward.

    mean, std, low and high are those of the exact rewards, to float32. A reward, and so a quantile of them, is off by
    (high - low) / 510 at most, besides float32 rounding. `pinned` has exact quantiles at the levels asked for.
    """

    ids: np.ndarray  # uint64 [P], ascending
    offsets: np.ndarray  # int64 [P + 1]
    codes: np.ndarray  # uint8 [rewards], ascending in each prompt
    moments: np.ndarray  # float32 [4, P]: mean, std, low, high
    pinned: dict[float, np.ndarray] = field(default_factory=dict)  # level -> float32 [P]

    @classmethod
    def of(cls, table: RewardTable, moments: np.ndarray, pinned: dict[float, np.ndarray]) -> CompactTable:
        """From a table with sorted rewards, its moments, float32 [4, P], and what to pin."""
        codes = np.empty(len(table.values), np.uint8)
        low, high = moments[2:].astype(np.float64)
        for part in table.chunks():
            counts = table.counts[part]
            place = slice(table.offsets[part.start], table.offsets[part.stop])
            spread = np.where(high > low, high - low, 1.0)[part]
            above = table.values[place] - np.repeat(low[part], counts)
            codes[place] = np.rint(above * np.repeat(CODES / spread, counts))
        return cls(table.ids, table.offsets, codes, moments, pinned)

    @property
    def counts(self) -> np.ndarray:
        return np.diff(self.offsets)

    def of_rows(self, rows: np.ndarray) -> np.ndarray:
        """As `RewardTable.of_rows`, to within the bound."""
        counts = self.offsets[rows + 1] - self.offsets[rows]
        low, high = self.moments[2:, rows].astype(np.float64)
        codes = self.codes[ragged(self.offsets[rows], counts)]
        return (np.repeat(low, counts) + codes * np.repeat((high - low) / CODES, counts)).astype(np.float32)


def find(table: RewardTable | CompactTable, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the prompts are in the table, int64 [B], and which of them are there at all, bool [B]."""
    rows = np.searchsorted(table.ids, ids)
    known = rows < len(table.ids)
    known[known] = table.ids[rows[known]] == ids[known]
    return rows, known


def chunks(offsets: np.ndarray) -> Iterator[slice]:
    """Slices of rows that together have about `CHUNK` of what the offsets, int64 [P + 1], count."""
    cuts = np.searchsorted(offsets, np.arange(0, offsets[-1], CHUNK))
    cuts = np.unique(np.append(cuts, len(offsets) - 1))
    for start, stop in zip(cuts[:-1].tolist(), cuts[1:].tolist(), strict=True):
        yield slice(start, stop)


def ragged(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, .. of each stretch, one stretch after the other: int64 [lengths' sum].

    >>> ragged(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def give_back_memory() -> None:
    """Has the C library return freed memory to the system, where it can: glibc keeps up to twice what is in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
