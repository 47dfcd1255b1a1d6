"""The ledger of alignment: which work item is where, and how far generation may run ahead."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum


class State(Enum):
    WAITING = "waiting for a generator"
    SAMPLING = "at a generator"
    SCORING = "at the reward pool"
    READY = "in the queue"
    TRAINING = "at the learner"


@dataclass
class _Entry:
    state: State
    worker: int | None
    since: float


class Ledger:
    """Guarantees that each item is trained once, in order, and never more than `staleness` versions late.

    Items are numbered; batch b is the items [b * size, (b + 1) * size) and turns version b into b + 1. Batch b is
    admitted once every generator has pulled version b - staleness, so its rollouts are of at least that version;
    it is trained by version b. Hence version(learner) - version(rollout) <= staleness, and at most
    (staleness + 1) * size items are held at any time.

    >>> ledger = Ledger(batches=3, size=2, staleness=0)
    >>> ledger.admit(), ledger.admit()
    ([0, 1], [])
    >>> for item in (0, 1): ledger.sampling(item, worker=0), ledger.scoring(item), ledger.ready(item)
    (None, None, None)
    (None, None, None)
    >>> ledger.next_batch()
    [0, 1]
    >>> ledger.training([0, 1]); ledger.trained([0, 1]); ledger.admit()
    []
    >>> ledger.pulled(version=1); ledger.admit()
    [2, 3]
    """

    def __init__(
        self, batches: int, size: int, staleness: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        assert min(batches, size) > 0 <= staleness, (batches, size, staleness)
        self.batches, self.size, self.staleness, self._clock = batches, size, staleness, clock
        self.version = 0  # the learner's: batches trained
        self._pulled = 0  # the oldest version a generator may still hold
        self._admitted = 0  # batches
        self._items: dict[int, _Entry] = {}

    @property
    def done(self) -> bool:
        return self.version == self.batches

    @property
    def capacity(self) -> int:
        """Items that are held at any time, at most."""
        return (self.staleness + 1) * self.size

    def admit(self) -> list[int]:
        """Ids that may be sampled from now on."""
        new: list[int] = []
        while self._admitted < min(self.batches, self._pulled + self.staleness + 1):
            new += range(self._admitted * self.size, (self._admitted + 1) * self.size)
            self._admitted += 1
        for item in new:
            self._items[item] = _Entry(State.WAITING, None, self._clock())
        assert len(self._items) <= self.capacity
        return new

    def waiting(self) -> list[int]:
        return sorted(i for i, entry in self._items.items() if entry.state is State.WAITING)

    def sampling(self, item: int, worker: int) -> None:
        self._move(item, State.WAITING, State.SAMPLING, worker)

    def scoring(self, item: int) -> None:
        self._move(item, State.SAMPLING, State.SCORING)

    def ready(self, item: int) -> None:
        self._move(item, State.SCORING, State.READY)

    def again(self, item: int) -> None:
        """The item's work was lost: it waits for a generator again."""
        assert self._items[item].state in (State.SAMPLING, State.SCORING), self._items[item]
        self._items[item] = _Entry(State.WAITING, None, self._clock())

    def overdue(self, seconds: float) -> list[int]:
        """Items that have been at a generator longer than `seconds`."""
        now = self._clock()
        return [i for i, e in self._items.items() if e.state is State.SAMPLING and now - e.since > seconds]

    def worker(self, item: int) -> int:
        """The generator that has the item."""
        worker = self._items[item].worker
        assert worker is not None, item
        return worker

    def is_sampling(self, item: int, worker: int) -> bool:
        """Whether `worker` is the one to answer for the item (a late answer of another is refused)."""
        entry = self._items.get(item)
        return entry is not None and entry.state is State.SAMPLING and entry.worker == worker

    def next_batch(self) -> list[int] | None:
        """The items of the next batch, when all of them are ready and none is being trained."""
        batch = list(range(self.version * self.size, (self.version + 1) * self.size))
        complete = all(i in self._items and self._items[i].state is State.READY for i in batch)
        return batch if complete else None

    def training(self, batch: list[int]) -> None:
        assert batch == self.next_batch(), batch
        for item in batch:
            self._move(item, State.READY, State.TRAINING)

    def trained(self, batch: list[int]) -> None:
        for item in batch:
            assert self._items.pop(item).state is State.TRAINING, item
        self.version += 1

    def pulled(self, version: int) -> None:
        """Every generator now holds at least `version`."""
        assert self._pulled <= version <= self.version, (self._pulled, version, self.version)
        self._pulled = version

    def _move(self, item: int, before: State, after: State, worker: int | None = None) -> None:
        entry = self._items[item]
        assert entry.state is before, (item, entry, after)
        self._items[item] = _Entry(after, worker, self._clock())
