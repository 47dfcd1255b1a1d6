"""The experience queue: leases object-store references of experiences to the learner."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray

from actors.resources import beside_driver
from rlhf.flow.leases import Lease, LeaseQueue


class ExperienceQueue:
    """A `LeaseQueue` in an actor. A payload is (rollouts reference, rewards reference): it never holds data itself.

    A restarted queue is empty; `lease` then says which items are missing, and the controller, which still
    holds their references, puts them again.
    """

    def __init__(self) -> None:
        self._queue: LeaseQueue[tuple[Any, Any]] = LeaseQueue()

    def put(self, item: int, payload: tuple[Any, Any]) -> bool:
        return self._queue.put(item, payload)

    def lease(self, items: Sequence[int]) -> Lease | list[int]:
        """The lease, or the items that are missing."""
        return self._queue.missing(items) or self._queue.lease(items)

    def acknowledge(self, lease: int) -> None:
        with suppress(KeyError):  # a lease of before a restart: its items are not here either
            self._queue.acknowledge(lease)

    def give_back(self, lease: int, lost: Sequence[int]) -> None:
        with suppress(KeyError):  # as above
            self._queue.give_back(lease, lost)


def start_queue() -> Any:
    actor = ray.remote(ExperienceQueue).options(max_restarts=-1, max_task_retries=3, **beside_driver())
    return actor.remote()
