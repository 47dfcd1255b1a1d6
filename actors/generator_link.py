"""One generator, seen from the driver: how it is brought to a policy and its newest weights, and asked for progress."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.exceptions import ActorDiedError, RayError

from actors.failures import PATIENCE, died, lost, root, short
from actors.fault import Fault
from actors.stuck import where
from rlhf.config import RecoveryConfig
from rlhf.flow.fleet import TRIES, Fleet

log = logging.getLogger(__name__)

LOOK = 0.5  # seconds between two looks whether a process has come up
ASK = 5.0  # seconds, at most, between two questions for a generator's progress


@dataclass(eq=False)
class Policy:
    """What all generators are to have."""

    path: str  # of version 0
    weights: ray.ObjectRef | None = (
        None  # of the version that is published; None: there are none, or they are lost
    )
    losses: int = 0  # of these weights


@dataclass(frozen=True)
class _Call:
    ref: ray.ObjectRef
    what: Literal["look", "load", "pull"]
    policy: Policy
    weights: ray.ObjectRef | None
    version: int
    since: float = field(default_factory=time.monotonic)


@dataclass
class _Away:
    """A time in which it cannot be given work."""

    since: float = field(default_factory=time.monotonic)
    told: bool = False


class Link:
    """Tells a generator one thing at a time, the next when it has answered: look whether its process is there, load the
    policy, pull the newest weights. So nothing is queued twice, no load is too slow, and nothing that was meant for an
    earlier policy arrives after a later one.

    `take` says how the process has ended: True, with all that it was at work on; False, before it was given that; None,
    not at all.
    """

    def __init__(self, number: int, actor: Any, fleet: Fleet, recovery: RecoveryConfig) -> None:
        self.number, self.actor, self._fleet = number, actor, fleet
        self._pause, self._startup = min(ASK, recovery.silence / 4), recovery.startup
        self._place: tuple[int, str] | None = None  # its process and node
        self._call: _Call | None = None
        self._question: ray.ObjectRef | None = None
        self._up = False  # whether the process has answered since it ended last
        self._look = self._ask = 0.0  # when to do so next
        self._ends = 0  # since it could be given work last
        self._away = _Away()
        self.notes: tuple[str, ...] = ()  # what its engine says of how the policy is sampled

    @property
    def pending(self) -> list[ray.ObjectRef]:
        found = [] if self._call is None else [self._call.ref]
        return found if self._question is None else [*found, self._question]

    @property
    def absent(self) -> bool:
        """Whether its process has not come up for so long that the log says so."""
        return not self._up and self._away.told

    @property
    def late(self) -> bool:
        """Whether it has been taking the policy for too long."""
        call = self._call
        return call is not None and call.what == "load" and time.monotonic() - call.since > self._startup

    def where(self) -> str:
        """Where it stands, if that can be told."""
        return where(None, *(self._place or (None, None)))

    def begin(self) -> None:
        """Another policy is to be loaded."""
        self._away, self._ends = _Away(told=self.absent), 0

    def ended(self) -> None:
        """The process has ended, or is given up."""
        self._call = self._question = None
        self._up, self._away = False, _Away()

    def tend(self, policy: Policy) -> None:
        """Starts what comes next."""
        now = time.monotonic()
        if self._call is None:
            self._tell(policy, now)
        if self._question is None and self._fleet.busy(self.number) and now >= self._ask:
            self._question, self._ask = self.actor.progress.remote(), now + self._pause
        if self._fleet.ready(self.number):
            self._away, self._ends = _Away(), 0
        elif not self._away.told and now - self._away.since > PATIENCE:
            why = "takes the policy" if self._up else "has no process: Ray starts it when there is room"
            log.warning("generator %d is not ready after %.0f s; it %s", self.number, PATIENCE, why)
            self._away.told = True

    def _tell(self, policy: Policy, now: float) -> None:
        weights, version = policy.weights, self._fleet.published
        if not self._up:
            if now >= self._look:
                self._look = now + LOOK
                self._call = _Call(self.actor.ping.remote(), "look", policy, None, 0)
        elif not self._fleet.joined(self.number):
            self._call = _Call(self.actor.load.remote(policy.path), "load", policy, None, 0)
        elif weights is not None and self._fleet.behind(self.number):
            ref = self.actor.set_weights.remote(weights, version)
            self._call = _Call(ref, "pull", policy, weights, version)
            self._fleet.pull(self.number)

    def take(self, ref: ray.ObjectRef, policy: Policy) -> bool | None:
        """Handles a ready reference of `pending`."""
        call = self._call
        if call is None or ref != call.ref:
            return self._heard(ref)
        self._call = None
        try:
            answer = ray.get(ref)
        except RayError as error:
            return self._failed(call, error, policy)
        if call.what == "look":
            self._up, self._place = True, answer
        elif call.policy is not policy:
            pass  # another is to be loaded by now
        elif call.what == "load":
            self.notes = tuple(answer)
            self._fleet.join(self.number)
        elif answer:
            self._fleet.pull_ended(self.number, call.version)
        else:  # it was restarted, and has no policy
            return False
        return None

    def _heard(self, ref: ray.ObjectRef) -> bool | None:
        assert ref == self._question, ref
        self._question = None
        try:
            progress = ray.get(ref)
        except RayError as error:
            if not died(error):
                raise
            return True
        if self._fleet.joined(self.number):
            self._fleet.hear(self.number, progress)
        return None

    def _failed(self, call: _Call, error: RayError, policy: Policy) -> bool | None:
        if call.what == "look":
            if isinstance(error, ActorDiedError):  # for good: else it is unavailable for a while
                raise ValueError(
                    f"generator {self.number} cannot start: {str(error).strip().splitlines()[-1]}"
                )
            return None
        if died(error):
            self.stumbled(short(error))
            return True
        if call.policy is not policy:
            return None  # the stage that it was for has ended
        if call.what != "pull" or not lost(error):
            raise error
        self._fleet.pull_ended(self.number, None)
        if call.weights == policy.weights:
            policy.weights, policy.losses = None, policy.losses + 1
            if policy.losses == TRIES or died(root(error)):  # the learner that had them, then
                raise Fault(f"the weights of version {call.version} are lost: {short(error)}")
        return None

    def stumbled(self, why: str) -> None:
        """Counts an end in the middle of loading or of pulling.

        Raises:
            Fault: once too often.
        """
        self._ends += 1
        if self._ends == TRIES:
            raise Fault(
                f"generator {self.number} ended {TRIES} times while it took the policy, the last time by {why}; the "
                "log of its node may say more: often it is too little memory"
            )
