"""The experience queue: leases object-store references of experiences to the learner."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError

from actors.failures import short
from actors.fault import Fault
from actors.resources import beside_driver
from rlhf.config import RecoveryConfig
from rlhf.flow.fleet import TRIES
from rlhf.flow.leases import Lease, LeaseQueue

log = logging.getLogger(__name__)


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


class Queue:
    """The queue, seen from the driver. One that gives no answer is started again, empty: all that is asked for is then
    missing.

    Raises:
        Fault: by `lease`, when that does not help.
    """

    def __init__(self, recovery: RecoveryConfig) -> None:
        options = {**beside_driver(), "max_restarts": -1, "max_task_retries": TRIES}
        self.actor = ray.remote(ExperienceQueue).options(**options).remote()
        self._silence, self._mute = recovery.silence, 0

    def put(self, item: int, payload: tuple[Any, Any]) -> None:
        """Not waited for: calls are taken in order, and `lease` says what it misses."""
        self.actor.put.remote(item, payload)

    def lease(self, items: Sequence[int]) -> Lease | list[int]:
        """The lease, or the items that are missing."""
        try:
            found = ray.get(self.actor.lease.remote(items), timeout=self._silence)
        except (GetTimeoutError, RayActorError) as error:
            self._mute += 1
            if self._mute == TRIES:
                raise Fault(f"the experience queue gave no answer {TRIES} times ({short(error)})") from error
            log.warning("the experience queue is started again: %s", short(error))
            ray.kill(self.actor, no_restart=False)
            return list(items)
        self._mute = 0
        return found

    def acknowledge(self, lease: int) -> None:
        self.actor.acknowledge.remote(lease)

    def give_back(self, lease: int, lost: Sequence[int]) -> None:
        self.actor.give_back.remote(lease, lost)
