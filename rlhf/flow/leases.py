"""A queue whose entries are leased, acknowledged or pushed back, so that a dead consumer loses nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Lease(Generic[T]):
    id: int
    items: tuple[int, ...]
    payloads: tuple[T, ...]


class LeaseQueue(Generic[T]):
    """Guarantees that an item is accepted once, and leaves only when its lease is acknowledged; or when it is lost, and
    may come again.

    Bounded by its producers: the ledger admits at most (staleness + 1) batches.

    >>> queue = LeaseQueue()
    >>> queue.put(7, "a"), queue.put(7, "a")
    (True, False)
    >>> lease = queue.lease([7]); lease.payloads, len(queue)
    (('a',), 0)
    >>> queue.give_back(lease.id); len(queue)
    1
    """

    def __init__(self) -> None:
        self._ready: dict[int, T] = {}
        self._leases: dict[int, Lease[T]] = {}
        self._seen: set[int] = set()
        self._next = 0

    def __len__(self) -> int:
        return len(self._ready)

    def put(self, item: int, payload: T) -> bool:
        """Accepts an item; False when it was accepted before."""
        if item in self._seen:
            return False
        self._seen.add(item)
        self._ready[item] = payload
        return True

    def missing(self, items: Sequence[int]) -> list[int]:
        """Those of `items` that are neither ready nor leased."""
        leased = {i for lease in self._leases.values() for i in lease.items}
        return [i for i in items if i not in self._ready and i not in leased]

    def lease(self, items: Sequence[int]) -> Lease[T]:
        """Hands out items; `missing` tells which are not there. Those that are leased already were asked for in a call
        whose answer was lost: this lease takes their place."""
        assert not self.missing(items), self.missing(items)
        for other in [lease for lease in self._leases.values() if not set(items).isdisjoint(lease.items)]:
            self.give_back(other.id)
        lease = Lease(self._next, tuple(items), tuple(self._ready.pop(i) for i in items))
        self._leases[lease.id] = lease
        self._next += 1
        return lease

    def acknowledge(self, lease: int) -> None:
        """The lease's items are used up."""
        del self._leases[lease]

    def give_back(self, lease: int, lost: Sequence[int] = ()) -> None:
        """The lease's items are ready again, but for those whose payloads are lost."""
        back = self._leases.pop(lease)
        assert set(lost) <= set(back.items), (lost, back.items)
        self._ready.update((i, p) for i, p in zip(back.items, back.payloads, strict=True) if i not in lost)
        self._seen.difference_update(lost)
