"""The ledger of alignment: which work item is where, and how far generation may run ahead."""

from __future__ import annotations

from enum import Enum


class State(Enum):
    WAITING = "waiting for a generator"
    SAMPLING = "at a generator"
    SCORING = "at the reward pool"
    READY = "in the queue"
    TRAINING = "at the learner"


class Ledger:
    """Guarantees that each item is trained once, in order, and never more than `staleness` versions late.

    Items are numbered; batch b is the items [b * size, (b + 1) * size) and turns version b into b + 1. Batch b is
    admitted once all that is sampled from then on is of version b - staleness at least (`Fleet.version`), so its
    rollouts are of at least that version; it is trained by version b. Hence version(learner) - version(rollout) <=
    staleness, and at most (staleness + 1) * size items are held at any time. What is lost, wherever it is, is sampled
    again, and so from a version that is no older.

    >>> ledger = Ledger(batches=3, size=2, staleness=0)
    >>> ledger.admit(until=3), ledger.admit(until=3)
    ([0, 1], [])
    >>> for item in (0, 1): ledger.sampling(item), ledger.scoring(item), ledger.ready(item)
    (None, None, None)
    (None, None, None)
    >>> ledger.next_batch()
    [0, 1]
    >>> ledger.training([0, 1]); ledger.trained([0, 1]); ledger.admit(until=3)
    []
    >>> ledger.pulled(version=1); ledger.admit(until=1), ledger.admit(until=3)
    ([], [2, 3])

    It may begin at a version that was reached before: of the batches up to it none is admitted, and all that was under
    way then is sampled again.
    """

    def __init__(self, batches: int, size: int, staleness: int, start: int = 0) -> None:
        assert min(batches, size) > 0 <= staleness, (batches, size, staleness)
        assert 0 <= start <= batches, (start, batches)
        self.batches, self.size, self.staleness = batches, size, staleness
        self.version = start  # the learner's: batches trained
        self._pulled = 0  # what is sampled from now on is of this version at least
        self._admitted = start  # batches
        self._items: dict[int, State] = {}

    @property
    def capacity(self) -> int:
        """Items that are held at any time, at most."""
        return (self.staleness + 1) * self.size

    def admit(self, until: int) -> list[int]:
        """Ids that may be sampled from now on, of the batches that lead up to version `until`."""
        new: list[int] = []
        while self._admitted < min(until, self.batches, self._pulled + self.staleness + 1):
            new += range(self._admitted * self.size, (self._admitted + 1) * self.size)
            self._admitted += 1
        for item in new:
            self._items[item] = State.WAITING
        assert len(self._items) <= self.capacity
        return new

    def waiting(self) -> list[int]:
        return sorted(i for i, state in self._items.items() if state is State.WAITING)

    def sampling(self, item: int) -> None:
        self._move(item, State.WAITING, State.SAMPLING)

    def scoring(self, item: int) -> None:
        self._move(item, State.SAMPLING, State.SCORING)

    def ready(self, item: int) -> None:
        self._move(item, State.SCORING, State.READY)

    def again(self, item: int) -> None:
        """What was made of the item is lost: it waits for a generator again."""
        assert self._items[item] is not State.WAITING, item
        self._items[item] = State.WAITING

    def next_batch(self) -> list[int] | None:
        """The items of the next batch, when all of them are ready and none is being trained."""
        batch = list(range(self.version * self.size, (self.version + 1) * self.size))
        complete = all(i in self._items and self._items[i] is State.READY for i in batch)
        return batch if complete else None

    def training(self, batch: list[int]) -> None:
        assert batch == self.next_batch(), batch
        for item in batch:
            self._move(item, State.READY, State.TRAINING)

    def untrained(self, batch: list[int]) -> None:
        """The learner has left the batch as it was."""
        for item in batch:
            self._move(item, State.TRAINING, State.READY)

    def trained(self, batch: list[int]) -> None:
        for item in batch:
            assert self._items.pop(item) is State.TRAINING, item
        self.version += 1

    def pulled(self, version: int) -> None:
        """What is sampled from now on is of this version or a newer one."""
        assert self._pulled <= version <= self.version, (self._pulled, version, self.version)
        self._pulled = version

    def _move(self, item: int, before: State, after: State) -> None:
        assert self._items[item] is before, (item, self._items[item], after)
        self._items[item] = after
