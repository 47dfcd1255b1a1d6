"""Waiting for the learner's ranks, which wait for each other: for none that has ended or is stuck."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayError

from actors.failures import died, short
from actors.fault import Fault
from actors.stuck import SILENT, innermost, where
from rlhf.flow.pulse import Pulse

log = logging.getLogger(__name__)

EXPLAINS = 10.0  # seconds in which a rank's death becomes known after the errors of those that waited for it
COLLECTIVE = re.compile(
    r"gloo/|DistBackendError|DistNetworkError|NCCL error|Connection (?:closed|reset) by peer"
)
"""What the libraries that ranks talk through say when they cannot."""
LOOK = 1.0  # seconds between two looks


class Watch:
    """Asks ranks at work whether they are alive, one question at a time, and waits for no answer.

    Raises:
        Fault: by `look`: a rank has given no sign of life for too long. It says where each stands.
    """

    def __init__(self, ranks: Sequence[Any], timeout: float, places: Sequence[tuple[int, str]] = ()) -> None:
        self._ranks, self._timeout = ranks, timeout
        self.places: list[tuple[int, str]] = list(
            places
        )  # process and node of each rank, once they are known
        self._pulses = [Pulse(timeout) for _ in ranks]
        self._next = 0.0  # when to look again
        self._questions: list[ray.ObjectRef | None] = [None] * len(ranks)

    def begin(self) -> None:
        """The ranks are given something to do."""
        for pulse in self._pulses:
            pulse.begin()

    def look(self, calls: Sequence[ray.ObjectRef]) -> None:
        """Once a second at most. calls: of all ranks, in their order; one that has answered has nothing to do."""
        now = time.monotonic()
        if now < self._next:
            return
        self._next = now + LOOK
        done = set(ray.wait(list(calls), num_returns=len(calls), timeout=0)[0])
        for rank, pulse in enumerate(self._pulses):
            if calls[rank] in done:
                pulse.begin()
                continue
            pulse.look()
            self._ask(rank, pulse)
        stuck = [rank for rank, pulse in enumerate(self._pulses) if pulse.silent]
        if stuck:
            raise Fault(self._told(stuck))

    def _ask(self, rank: int, pulse: Pulse) -> None:
        question = self._questions[rank]
        if question is not None:
            if not ray.wait([question], timeout=0)[0]:
                return
            try:
                pulse.heard(ray.get(question))
            except RayError as error:
                if not died(error):
                    raise
                return  # the call that it was at says so
        self._questions[rank] = self._ranks[rank].alive.options(concurrency_group="health").remote()

    def _told(self, stuck: Sequence[int]) -> str:
        asked = [rank.stacks.options(concurrency_group="health").remote() for rank in self._ranks]
        known = dict(enumerate(self.places))
        found = [where(ask, *known.get(rank, (None, None))) for rank, ask in enumerate(asked)]
        for rank, text in enumerate(found):
            log.warning("learner rank %d stands at: %s", rank, text)
        stand = "; ".join(f"rank {rank}: {innermost(text)}" for rank, text in enumerate(found))
        mute = [
            rank for rank in stuck if SILENT in found[rank]
        ]  # the others wait for these, if there are any
        names = ", ".join(map(str, mute or stuck))
        return f"learner rank {names} of {len(found)} gave no sign of life for {self._timeout:g} s ({stand})"


def of_ranks(calls: Sequence[ray.ObjectRef], watch: Watch) -> list[Any]:
    """What the learner's ranks answer.

    A rank that ends leaves the others waiting for it for ever, or with an error of their connection to it: neither is
    waited for.

    Raises:
        Fault: a rank has ended, or is stuck.
    """
    waiting = list(calls)
    try:
        while waiting:
            done, waiting = ray.wait(waiting, timeout=LOOK)
            ray.get(done)
            watch.look(calls)
        return ray.get(list(calls))
    except RayError as error:
        raise rank_error(calls, error) from error


def rank_error(calls: Sequence[ray.ObjectRef], error: RayError) -> Exception:
    """The error to raise for one of a call of all ranks: a rank's death, before what the others say of it."""
    if not died(error) and len(calls) > 1:
        ray.wait(list(calls), num_returns=len(calls), timeout=EXPLAINS)
    for rank, call in enumerate(calls):
        found = _error(call)
        if found is not None and died(found):
            return Fault(
                f"learner rank {rank} of {len(calls)} ended ({short(found)}); the log of its node says why: often too "
                "little memory, and a lower deepspeed.micro_batch_tokens or a higher ZeRO stage need less"
            )
    if COLLECTIVE.search(str(error)):
        return Fault(f"the learner ranks lost each other ({short(error)})")
    return error


def _error(call: ray.ObjectRef) -> RayError | None:
    """The error of a call, if it has ended with one by now."""
    if not ray.wait([call], timeout=0)[0]:
        return None
    try:
        ray.get(call)
    except RayError as error:
        return error
    return None
