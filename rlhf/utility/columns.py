"""One column of rewards: those of one reward model that came in one way, in whatever order and batches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from rlhf.utility.moments import Moments
from rlhf.utility.sketch import GridSketch
from rlhf.utility.tables import CompactTable, RewardTable, find, give_back_memory

Item = int | tuple[str, int]
LARGE = 1 << 22  # rewards of a table that is worth the few milliseconds of `give_back_memory`
WAITING = 1 << 18  # rewards that wait before they are grouped by prompt


@dataclass
class Column:
    """Rewards by prompt. Up to `exact` of a prompt are kept as they are, more become a `GridSketch` of them.

    Rewards wait in batches, then become a table; tables are united as in a binary counter, the last two whenever
    the older is at most twice the newer. So there are at most log2(N / batch) + 1 of them and each of N rewards is
    moved that many times at most, however reading and adding alternate. A prompt is sketched once its rewards, in all
    tables together, exceed `exact`; its rows in older tables are then void, and go at the next union.
    """

    exact: int
    tables: list[RewardTable] = field(default_factory=list)
    waiting: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    items: set[Item] = field(default_factory=set)
    moments: Moments = field(default_factory=Moments)  # of all rewards but those that wait
    sketches: dict[int, GridSketch] = field(default_factory=dict)  # by prompt id
    compact: CompactTable | None = None  # in place of the tables; then nothing can be added
    _sketched: np.ndarray = field(
        default_factory=lambda: np.empty(0, np.uint64)
    )  # the sketches' keys, ascending
    _waits: int = 0  # rewards in `waiting`
    sorted: bool = False  # a single table, as `table` gives it
    known_digest: str = ""  # of the rewards, once asked for

    def __post_init__(self) -> None:
        self._sketched = np.array(sorted(self.sketches), np.uint64)

    def add(self, ids: np.ndarray, values: np.ndarray, item: Item) -> None:
        """Takes in an item not held, of ids uint64 [N] and finite values float32 [N]."""
        assert self.compact is None
        assert item not in self.items, item
        self.items.add(item)
        self.waiting.append((ids.copy(), values + np.float32(0)))  # -0.0 becomes 0.0: the two are equal
        self._waits += len(ids)
        if self._waits >= WAITING:
            self.settle()

    def settle(self) -> None:
        """Makes a table of what waits."""
        if self.waiting:
            ids, values = (np.concatenate(part) for part in zip(*self.waiting, strict=True))
            self.waiting, self._waits = [], 0
            self.moments.add(values)
            self._push(RewardTable.of(ids, values))

    def _push(self, table: RewardTable) -> None:
        """Adds a table whose rewards `moments` has already."""
        self.known_digest, self.sorted = "", False
        table = self._without_sketched(table)
        if len(table.ids):
            self.tables.append(table)
        while len(self.tables) > 1 and len(self.tables[-2].values) <= 2 * len(self.tables[-1].values):
            self._unite(2)

    def _unite(self, count: int) -> None:
        """Makes one of the last tables."""
        last = [table.without(self._sketched) for table in self.tables[-count:]]
        self.tables[-count:] = [RewardTable.union(last) if len(last) > 1 else last[0]]
        if len(self.tables[-1].values) >= LARGE:
            del last
            give_back_memory()

    def _without_sketched(self, table: RewardTable) -> RewardTable:
        """The table less the prompts that have, with it, more than `exact` rewards: those go into sketches."""
        totals = table.counts.copy()
        most = sum(int(t.counts.max(initial=0)) for t in self.tables) + int(totals.max(initial=0))
        if most <= self.exact and not self.sketches:
            return table
        for older in self.tables:
            rows, known = find(older, table.ids)
            totals[known] += older.counts[rows[known]]
        over = table.ids[(totals > self.exact) | np.isin(table.ids, self._sketched)]
        for prompt in over.tolist():
            self._begin_sketch(prompt)
            rows, _ = find(table, np.array([prompt], np.uint64))
            self.sketches[prompt].add(table.of_rows(rows))
        self._sketched = np.array(sorted(self.sketches), np.uint64)
        return table.without(over)

    def _begin_sketch(self, prompt: int) -> None:
        """Makes sure of a sketch of the prompt, which has the rewards that were exact."""
        if prompt not in self.sketches:
            self.sketches[prompt] = GridSketch()
            for table in self.tables:
                rows, known = find(table, np.array([prompt], np.uint64))
                if known[0]:
                    self.sketches[prompt].add(table.of_rows(rows))

    def table(self) -> RewardTable:
        """All exact rewards in one table, those of a prompt ascending. Not for a compact column."""
        assert self.compact is None
        self.settle()
        if not self.tables:
            self.tables = [RewardTable.of(np.empty(0, np.uint64), np.empty(0, np.float32))]
        if not self.sorted:
            self._unite(len(self.tables))
            self.tables[0].sort_rewards()
            self.sorted = True
        return self.tables[0]

    def counts(self, ids: np.ndarray) -> np.ndarray:
        """Rewards held of each prompt, int64 [B]; sketched ones included."""
        held = self.exact_counts(ids)
        for i in np.flatnonzero(self.sketched(ids)).tolist():
            held[i] = self.sketches[int(ids[i])].moments.count
        return held

    def exact_counts(self, ids: np.ndarray) -> np.ndarray:
        """As `counts`, but 0 for sketched prompts."""
        self.settle()
        held = np.zeros(len(ids), np.int64)
        for table in self._parts():
            rows, known = find(table, ids)
            held[known] += table.counts[rows[known]]
        held[self.sketched(ids)] = 0
        return held

    def sketched(self, ids: np.ndarray) -> np.ndarray:
        """Which prompts have a sketch of their rewards, bool [B]."""
        return np.isin(ids, self._sketched)

    def rewards(self, ids: np.ndarray, count: int) -> np.ndarray:
        """The rewards of prompts that have `count` exact ones each, ascending: float64 [G, count]."""
        gathered = np.empty((len(ids), count))
        free = np.zeros(len(ids), np.int64)
        for table in self._parts():
            rows, known = find(table, ids)
            places, rows = np.flatnonzero(known), rows[known]
            lengths = table.counts[rows]
            for length in np.unique(lengths).tolist():
                chosen = places[lengths == length]
                part = table.of_rows(rows[lengths == length]).reshape(len(chosen), length)
                gathered[chosen[:, None], free[chosen][:, None] + np.arange(length)] = part
                free[chosen] += length
        assert (free == count).all()
        gathered.sort(axis=1)
        return gathered

    def _parts(self) -> list[RewardTable] | list[CompactTable]:
        return self.tables if self.compact is None else [self.compact]

    def absorb(self, other: Column) -> None:
        """As if what was added to the other column, none of it held here, were added to this one."""
        assert not self.items & other.items
        assert other.compact is None or not self.items
        self.settle()
        other.settle()
        self.items |= other.items
        self.moments.merge(other.moments)
        for prompt, sketch in other.sketches.items():
            self._begin_sketch(prompt)
            self.sketches[prompt].merge(sketch)
        self._sketched = np.array(sorted(self.sketches), np.uint64)
        self.compact, self.known_digest = other.compact, other.known_digest
        if other.compact is None:
            self._push(other.table())

    def digest(self) -> str:
        """Hash of the rewards held, 32 hexadecimal digits; a compact column has that of its exact rewards."""
        self.settle()
        if not self.known_digest:
            table, digest = self.table(), hashlib.blake2b(digest_size=16)
            for array, dtype in ((table.ids, "<u8"), (table.offsets, "<i8"), (table.values, "<f4")):
                digest.update(np.ascontiguousarray(array, dtype).data)
            for prompt in self._sketched.tolist():
                digest.update(f"{prompt}:".encode() + self.sketches[prompt].contents())
            self.known_digest = digest.hexdigest()
        return self.known_digest


def room_for(other: Column, mine: Column, named: str) -> Column:
    """The column that can absorb the other: `mine`, or an empty one where the other has all of its items, and more.

    Raises:
        ValueError: they cannot be united; it begins with `named`.
    """
    if other.sketches and other.exact != mine.exact:
        raise ValueError(
            f"{named}: up to {other.exact} rewards of a prompt are exact there and {mine.exact} here; "
            "use the same number"
        )
    if mine.items <= other.items:
        return Column(mine.exact)
    shared = mine.items & other.items
    if shared:
        raise ValueError(
            f"{named}: item {min(shared, key=repr)} is in both statistics, and each has others that the other "
            "has not; name items so that different ones differ"
        )
    if mine.compact is not None or other.compact is not None:
        raise ValueError(f"{named}: compact rewards cannot be merged with others; merge before `compact`")
    return mine
