"""All generators, seen from the driver: their work, their weights, their coming and going."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayError

from actors.failures import PATIENCE, lost, short
from actors.fault import Fault
from actors.generator import Generator, Summary
from actors.generator_link import LOOK, Link, Policy
from actors.resources import actor_options, room
from rlhf.config import RecoveryConfig, RoleConfig, RolloutConfig
from rlhf.flow.fleet import TRIES, Fleet
from rlhf.types import Content, WorkItem

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampled:
    """A finished work item: its rollouts stay in the object store, owned by the driver."""

    item: WorkItem
    rollouts: ray.ObjectRef
    summary: Summary
    used: Any = None  # what `GeneratorPool.sample` was asked to make of them


Outcome = tuple[WorkItem, Any]
"""A work item with what was made of it; with None, if it has to be done again."""


@dataclass(frozen=True)
class _Work:
    worker: int
    item: WorkItem
    result: Callable[[Any], Any]  # of the answer


class GeneratorPool:
    """Generators that may end at any time. Ray starts them again; they then get the policy and its newest weights.

    Nothing here waits for one of them: `pending` are the references to wait for, `take` is for one that is ready, and
    `tend` for once a second. `Fleet` decides, and what it guarantees holds: of the age of weights, of silence, of
    blame. A process that does not come up is looked for until Ray has room for it, and the log says so.
    """

    def __init__(
        self,
        rollout: RolloutConfig,
        chat_template: str | None,
        role: RoleConfig,
        recovery: RecoveryConfig,
        kind: type = Generator,
    ) -> None:
        actor = ray.remote(kind).options(max_restarts=-1, max_task_retries=0, **actor_options(role))
        self._actors = [actor.remote(n, rollout, chat_template, role) for n in range(role.count)]
        self._fleet, self._timeout, self._startup = (
            Fleet(recovery.silence),
            recovery.silence,
            recovery.startup,
        )
        self._links = [Link(n, a, self._fleet, recovery) for n, a in enumerate(self._actors)]
        self._role = role
        self._missed = self._told = time.monotonic()  # since when none is ready; when that was told
        self._work: dict[ray.ObjectRef, _Work] = {}
        self._policy = Policy("")

    def load(self, policy: str) -> None:
        """Every generator takes the weights of a saved policy, as version 0. Those whose processes do not come up are
        not waited for long, if another is there."""
        self._policy = Policy(policy)
        self._fleet.begin()
        self._forget()
        self._missed = time.monotonic()
        for link in self._links:
            link.begin()
        while not self._loaded():
            self.tend()
            for ref in ready(self.pending):
                self.take(ref)

    def _loaded(self) -> bool:
        there = [self._fleet.ready(link.number) for link in self._links]
        return any(there) and all(t or link.absent for t, link in zip(there, self._links, strict=True))

    def _forget(self) -> None:
        """What is under way is no longer asked for."""
        self._work = {}
        self._fleet.forget()

    @property
    def notes(self) -> list[str]:
        """What to tell of how the policy is sampled."""
        return list(dict.fromkeys(note for link in self._links for note in link.notes))

    @property
    def version(self) -> int:
        """What is sampled from now on is of this version at least."""
        return self._fleet.version

    def set_weights(self, weights: ray.ObjectRef, version: int) -> None:
        """Publishes weights: every generator gets them, at once or when it comes back."""
        if version > self._fleet.published:
            self._policy.losses = 0
        self._policy.weights = weights
        self._fleet.publish(version)
        for link in self._links:
            link.tend(self._policy)

    @property
    def wants_weights(self) -> bool:
        """Whether the newest weights are lost, and have to be published again."""
        return self._policy.losses > 0 and self._policy.weights is None

    @property
    def settled(self) -> bool:
        """Whether every generator that has the policy has its newest weights."""
        return self._fleet.settled

    @property
    def pending(self) -> list[ray.ObjectRef]:
        return [*self._work, *(ref for link in self._links for ref in link.pending)]

    def free(self, item: int, depth: int) -> int | None:
        """The generator that may be given this item beside less than `depth` others."""
        return self._fleet.free(item, depth)

    def submit(self, item: WorkItem, worker: int) -> None:
        rollouts, summary = self._actors[worker].generate.options(num_returns=2).remote(item)
        self._start(summary, worker, item, lambda found: Sampled(item, rollouts, found))

    def _start(self, ref: ray.ObjectRef, worker: int, item: WorkItem, result: Callable[[Any], Any]) -> None:
        self._work[ref] = _Work(worker, item, result)
        self._fleet.start(item.id, worker)

    def tend(self) -> list[Outcome]:
        """Gives up silent generators, and starts what each is to be told next; the work that was given up.

        Raises:
            Fault: none has been ready for `recovery.startup` seconds.
        """
        self._fleet.tick()
        outcomes: list[Outcome] = []
        for worker in self._fleet.silent():
            outcomes += self._give_up(worker, f"no sign of life for recovery.silence={self._timeout:g} s")
        for link in self._links:
            if link.late:
                outcomes += self._give_up(
                    link.number, f"it took the policy for recovery.startup={self._startup:g} s"
                )
            link.tend(self._policy)
        self._miss()
        return outcomes

    def _give_up(self, worker: int, why: str) -> list[Outcome]:
        log.warning("generator %d is restarted: %s; %s", worker, why, self._links[worker].where())
        ray.kill(self._actors[worker], no_restart=False)
        left = self._leave(worker, blamed=True)
        if not left:
            self._links[worker].stumbled(why)
        return left

    def _miss(self) -> None:
        """Looks whether any generator is ready, and says what is missing."""
        now = time.monotonic()
        if any(self._fleet.ready(link.number) for link in self._links):
            self._missed = self._told = now
        elif now - self._missed > self._startup:
            raise Fault(f"no generator is ready after recovery.startup={self._startup:g} s; {room()}")
        elif now - self._told > PATIENCE:
            self._told = now
            log.warning(
                "none of %d generators is ready after %.0f s; each asks for %g CPUs and %g GPUs; %s",
                len(self._links),
                now - self._missed,
                self._role.cpus,
                self._role.gpus,
                room(),
            )

    def take(self, ref: ray.ObjectRef) -> list[Outcome]:
        """Handles a ready reference; the work that has ended by it."""
        if ref in self._work:
            return self._finished(ref)
        for link in self._links:
            if ref in link.pending:
                ended = link.take(ref, self._policy)
                return [] if ended is None else self._leave(link.number, ended)
        return []  # of a generator that has ended since

    def _finished(self, ref: ray.ObjectRef) -> list[Outcome]:
        work = self._work[ref]
        answer, blamed = _answer(ref)
        if answer is None:
            return self._leave(work.worker, blamed)
        del self._work[ref]
        self._fleet.finish(work.item.id, work.worker)
        return [(work.item, work.result(answer))]

    def _leave(self, worker: int, blamed: bool) -> list[Outcome]:
        """A generator has ended: all of its work, some of which may have been finished in time.

        Raises:
            ValueError: a work item has ended its generator once too often.
        """
        mine = {ref: work for ref, work in self._work.items() if work.worker == worker}
        done = ray.wait(list(mine), num_returns=len(mine), timeout=0)[0] if mine else []
        answers = {ref: _answer(ref)[0] for ref in done}
        outcomes: list[Outcome] = []
        for ref, work in mine.items():
            del self._work[ref]
            answer = answers.get(ref)
            outcomes.append((work.item, None if answer is None else work.result(answer)))
        again = [item for item, found in outcomes if found is None]
        self._links[worker].ended()
        self._fleet.leave(worker, [item.id for item in again] if blamed else [])
        for item in again:
            if self._fleet.deaths(item.id) == TRIES:
                raise ValueError(
                    f"{_named(item)}: the generator that had it died, or gave no sign of life for "
                    f"recovery.silence={self._timeout:g} s, {TRIES} times, the last {TRIES - 1} with nothing else "
                    "to do; leave these prompts out, or give generators more memory, or more time"
                )
        return outcomes

    def lost(self, item: WorkItem, why: str) -> None:
        """Counts that what was made of an item is lost.

        Raises:
            Fault: once too often.
        """
        if self._fleet.lose(item.id) == TRIES:
            raise Fault(f"{_named(item)}: what was made of it was lost {TRIES} times, the last time by {why}")

    def sample(
        self, items: Sequence[WorkItem], use: Callable[[Sampled], ray.ObjectRef] | None = None
    ) -> Iterator[Sampled]:
        """Samples all items, as they finish. With `use`, once what it starts with their rollouts is done. What is lost
        on the way is sampled again, with the same outcome."""
        for _, sampled in self._all(items, self.submit, use):
            yield sampled

    def logprobs(self, sampled: Sequence[Sampled]) -> list[np.ndarray]:
        """Log-probabilities of rollouts' tokens under the generators' current policy, float32 [T] each."""
        rollouts = {s.item.id: s.rollouts for s in sampled}

        def submit(item: WorkItem, worker: int) -> None:
            ref = self._actors[worker].logprobs.remote(rollouts[item.id])
            self._start(ref, worker, item, lambda found: found)

        found = {item.id: values for item, values in self._all([s.item for s in sampled], submit, None)}
        return [found[s.item.id] for s in sampled]

    def _all(
        self,
        items: Sequence[WorkItem],
        submit: Callable[[WorkItem, int], None],
        use: Callable[[Any], ray.ObjectRef] | None,
    ) -> Iterator[Outcome]:
        """Work of the same kind, one item at a time for a generator."""
        self._forget()
        waiting, left = deque(items), len(items)
        using: dict[ray.ObjectRef, Sampled] = {}
        while left:
            outcomes = self.tend()
            while waiting and (worker := self.free(waiting[0].id, depth=1)) is not None:
                submit(waiting.popleft(), worker)
            for ref in ready([*self.pending, *using]):
                if ref not in using:
                    outcomes += self.take(ref)
                    continue
                sampled = using.pop(ref)
                try:
                    used = ray.get(ref)
                except RayError as error:
                    if not lost(error):
                        raise
                    self.lost(sampled.item, short(error))
                    outcomes.append((sampled.item, None))
                else:
                    left -= 1
                    yield sampled.item, replace(sampled, used=used)
            for item, found in outcomes:
                if found is None:
                    waiting.appendleft(item)
                elif use is None:
                    left -= 1
                    yield item, found
                else:
                    using[use(found)] = found

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)


def ready(pending: Sequence[ray.ObjectRef]) -> list[ray.ObjectRef]:
    """One that is ready, or none after a while."""
    if not pending:  # no process is up, and it is too early to look for one again
        time.sleep(LOOK)
        return []
    return ray.wait(list(pending), timeout=1.0)[0]


def _answer(ref: ray.ObjectRef) -> tuple[Any, bool]:
    """What a generator answers, or None; and then whether its process ended at work, or before it was asked."""
    try:
        return ray.get(ref), False
    except RayError as error:
        if not lost(error):  # the generator's own error is the user's to see
            raise
        return None, True


def _named(item: WorkItem) -> str:
    """A work item and the beginnings of its prompts."""
    shown = [_beginning(content) for content in item.prompts[:3]]
    more = f" and {len(item.prompts) - 3} more" if len(item.prompts) > 3 else ""
    return f"work item {item.id} (prompts {', '.join(shown)}{more})"


def _beginning(content: Content) -> str:
    text = content if isinstance(content, str) else str(content[-1]["content"])
    return repr(text if len(text) <= 60 else text[:60] + "...")
