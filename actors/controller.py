"""The alignment loop.

    prompts -> controller --work--> generator --rollouts--> reward pool --experience--> queue --lease--> learner
                 ^  ledger            ^ weights v              |  ^ r_ref                 | ack            |
                 |                    |                     baseline                      v                |
                 +---- slots freed ---+------------------------------------ published weights v + 1 -------+

| piece       | waits for                          | unblocked by                             |
|-------------|------------------------------------|------------------------------------------|
| feed        | a free slot of the ledger          | a batch trained and its weights pulled   |
| generator   | a work item                        | dispatch                                 |
| reward pool | rollouts (by reference)            | a generator's summary                    |
| queue       | experiences (by reference)         | the reward pool                          |
| learner     | all items of the next batch        | the queue's lease                        |

The driver owns every object and fetches no tokens: it reads summaries and rewards only. Rule of the ledger:
version(learner) - version(rollout) <= staleness. An item of which anything is lost with a process or a node, wherever
it is by then, is sampled again: `rlhf.flow.fleet.TRIES` times in all. What cannot be mended so raises a `Fault`: the
stage then begins anew, from its newest checkpoint. The history has every move of every item.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import RayError

from actors.failures import lost, short
from actors.fault import Fault
from actors.generator import Summary
from actors.generator_pool import GeneratorPool, Outcome, Sampled, ready
from actors.learner import Coefficients, Lost
from actors.learner_group import LearnerGroup, merged
from actors.metrics import StepMetrics
from actors.queue import Queue
from actors.ranks import rank_error
from actors.saver import Saver
from rlhf.config import AlignConfig
from rlhf.flow import history
from rlhf.flow.history import Admitted, Asked, History, Rewarded, Trained
from rlhf.flow.leases import Lease
from rlhf.flow.ledger import Ledger
from rlhf.flow.pulse import Pulse
from rlhf.timeline import Span
from rlhf.types import Rewards, WorkItem

SPANS = 50_000  # what a timeline holds, at most


@dataclass
class _Held:
    """What the controller keeps of an item until it is trained."""

    sampled: Sampled
    attempt: int  # of the history, in which it was sampled
    rewards: ray.ObjectRef | None = None
    values: Rewards | None = None

    @property
    def summary(self) -> Summary:
        return self.sampled.summary


@dataclass
class _Step:
    """A batch at the learner."""

    lease: Lease
    batch: list[int]
    waiting: set[ray.ObjectRef]
    parts: list[ray.ObjectRef]
    weights: ray.ObjectRef  # once it is trained
    coefficients: Coefficients
    started: float = field(default_factory=time.perf_counter)


@dataclass(frozen=True)
class Parts:
    """What a controller drives. `work(i)` makes work item i; `reward` starts the rewarding of rollouts and returns the
    reference of their `Rewards`; `on_step` gets each step's metrics; `asked` says whether to end."""

    work: Callable[[int], WorkItem]
    generators: GeneratorPool
    reward: Callable[[ray.ObjectRef], ray.ObjectRef]
    queue: Queue
    learner: LearnerGroup
    metrics: StepMetrics
    saver: Saver
    history: History
    state: Callable[[], dict[str, Any]]  # what a checkpoint says beside the learner's
    on_step: Callable[[dict[str, float]], None]
    asked: Callable[[], bool]


class Controller:
    """Trains from version `start` on, as far as `run` is told. The reward pool may be silent for `silence` seconds."""

    def __init__(
        self, config: AlignConfig, items_per_step: int, start: int, silence: float, parts: Parts
    ) -> None:
        self._config, self._work, self._on_step, self._asked = config, parts.work, parts.on_step, parts.asked
        self._generators, self._reward, self._queue = parts.generators, parts.reward, parts.queue
        self._learner, self._metrics, self._saver = parts.learner, parts.metrics, parts.saver
        self._history, self._state = parts.history, parts.state
        self._ledger = Ledger(config.steps, items_per_step, config.staleness, start)
        self._held: dict[int, _Held] = {}
        self._scoring: dict[ray.ObjectRef, int] = {}
        self._pulse = Pulse(silence)  # of the reward pool
        self._step: _Step | None = None
        self._last = time.perf_counter()
        self._began = time.time()
        self.spans: deque[Span] = deque(maxlen=SPANS)  # what the processes did for the batches trained last

    @property
    def version(self) -> int:
        """Of the learner's policy: batches trained."""
        return self._ledger.version

    def run(self, until: int) -> None:
        """Returns when version `until` is trained and every generator has its weights, with nothing under way; or, when
        it is asked to end, as soon as no batch is at the learner."""
        while not (self.version == until and self._generators.settled):
            if self._asked() and self._step is None:
                return
            self._ledger.pulled(self._generators.version)
            self._admit(until)
            self._dispatch()
            self._train()
            self._publish_again()
            self._saver.tend()
            if self._step is not None:
                self._learner.check(self._step.parts)
            self._check_scoring()
            self._sampled(self._generators.tend())
            for ref in ready(self._pending()):
                self._handle(ref)

    def _admit(self, until: int) -> None:
        items = self._ledger.admit(until)
        if items:
            self._history.add(Admitted(tuple(items)))

    def _pending(self) -> list[ray.ObjectRef]:
        at_learner = self._step.waiting if self._step is not None else ()
        return [*self._generators.pending, *self._scoring, *at_learner]

    def _dispatch(self) -> None:
        """One item at a time for a generator on-policy, where a sample must not depend on what else is under way; all
        there are otherwise, so that they fill each other's gaps."""
        depth = 1 if self._config.staleness == 0 else self._ledger.capacity
        for item in self._ledger.waiting():
            worker = self._generators.free(item, depth)
            if worker is not None:
                self._generators.submit(self._work(item), worker)
                self._ledger.sampling(item)
                self._history.add(Asked(item, worker, self._generators.version))

    def _handle(self, ref: ray.ObjectRef) -> None:
        if ref in self._scoring:
            self._scored(ref)
        elif self._step is not None and ref in self._step.waiting:
            try:
                ray.get(ref)
            except RayError as error:  # of one rank, while the others wait for it
                raise rank_error(self._step.parts, error) from error
            self._step.waiting.discard(ref)
            if not self._step.waiting:
                self._trained(self._step)
        else:
            self._sampled(self._generators.take(ref))

    def _sampled(self, outcomes: list[Outcome]) -> None:
        for item, sampled in outcomes:
            if sampled is None:
                self._ledger.again(item.id)
                self._history.add(history.Lost(item.id, "its generator ended"))
                continue
            self._ledger.scoring(item.id)
            summary = sampled.summary
            self._history.add(history.Sampled(item.id, summary.version, summary.responses, summary.tokens))
            self._held[item.id] = _Held(sampled, self._history.attempt)
            self._scoring[self._reward(sampled.rollouts)] = item.id

    def _scored(self, ref: ray.ObjectRef) -> None:
        self._pulse.begin()
        item = self._scoring.pop(ref)
        held = self._held[item]
        try:
            held.values = ray.get(ref)
        except RayError as error:
            if not lost(error):  # a model's own error (NaN, too long) is the user's to see
                raise
            self._again(item, short(error))
            return
        held.rewards = ref
        self._put(item)
        self._ledger.ready(item)
        self._history.add(Rewarded(item))

    def _check_scoring(self) -> None:
        """
        Raises:
            Fault: calls are out, and none has come back for too long.
        """
        self._pulse.look()
        if not self._scoring:
            self._pulse.begin()
        elif self._pulse.silent:
            raise Fault(
                f"the reward pool gave no answer for {self._pulse.silence:.0f} s, with {len(self._scoring)} calls out"
            )

    def _again(self, item: int, why: str) -> None:
        """What was made of the item is lost."""
        self._history.add(history.Lost(item, why))
        self._generators.lost(self._held.pop(item).sampled.item, why)
        self._ledger.again(item)

    def _put(self, item: int) -> None:
        held = self._held[item]
        self._queue.put(item, (held.sampled.rollouts, held.rewards))

    def _train(self) -> None:
        batch = self._ledger.next_batch()
        if batch is None or self._step is not None or self._asked():
            return
        save = self._saver.due(self.version + 1)
        if save and self._saver.busy:  # the one before is still being written
            return
        lease = self._queue.lease(batch)
        if not isinstance(lease, Lease):  # the queue was restarted, empty
            for item in lease:
                self._put(item)
            return
        self._ledger.training(batch)
        coefficients = self._metrics.coefficients(self._ledger.version)
        parts = self._learner.align(list(lease.payloads), coefficients)
        # asked for at once, so that the learner need not wait for the question
        weights = self._learner.weights()
        if save:
            self._saver.start(self.version + 1)
        self._step = _Step(lease, batch, set(parts), parts, weights, coefficients)

    def _publish_again(self) -> None:
        """Weights that were lost; a learner at work publishes newer ones anyway."""
        if self._generators.wants_weights and self._step is None:
            self._generators.set_weights(self._learner.weights(), self._ledger.version)

    def _untrained(self, step: _Step, why: dict[int, str]) -> None:
        """Items of the batch are lost, by place; the others stay for when these are there again."""
        self._saver.drop()
        gone = {step.batch[place]: words for place, words in why.items()}
        self._queue.give_back(step.lease.id, list(gone))
        self._ledger.untrained(step.batch)
        for item, words in gone.items():
            self._again(item, words)
        self._step = None

    def _trained(self, step: _Step) -> None:
        parts = ray.get(step.parts)
        missed = [part for part in parts if isinstance(part, Lost)]
        if missed:
            assert len(missed) == len(parts), "a part of the ranks has trained"
            self._untrained(step, {place: words for part in missed for place, words in part.why.items()})
            return
        learned = time.perf_counter()
        self._queue.acknowledge(step.lease.id)
        version = self._ledger.version
        self._ledger.trained(step.batch)
        self._generators.set_weights(step.weights, version + 1)
        held = [self._held.pop(item) for item in step.batch]
        metrics = self._measured(step, parts, held, version, learned)
        self._step = None
        versions = tuple(h.summary.version for h in held)
        attempts = tuple(h.attempt for h in held)
        self._history.add(Trained(version, tuple(step.batch), attempts, versions))
        self._saver.trained(self.version, self._state)
        self._train()  # before anything that the learner need not wait for
        self._on_step(metrics)

    def _measured(
        self, step: _Step, parts: list[tuple], held: list[_Held], version: int, learned: float
    ) -> dict[str, float]:
        """The metrics of a step by which the learner's `version` was trained; its spans are kept."""
        metrics = merged([m for m, _ in parts])
        found = [s for _, spans in parts for s in spans]
        for h in held:
            assert h.values is not None
            found += [*h.summary.spans, *h.values.spans]
        self.spans += [s for s in found if s.start >= self._began]  # others are of an earlier stage
        staleness = [version - h.summary.version for h in held]
        assert max(staleness) <= self._config.staleness, (version, staleness)
        now = time.perf_counter()
        metrics |= {
            "step": float(version + 1),
            "kl_coef": step.coefficients.kl,
            "learning_rate": step.coefficients.learning_rate,
            "staleness": sum(staleness) / len(staleness),
            "seconds": now - self._last,
            "seconds/learn": learned - step.started,
        }
        self._last = now
        return self._metrics.step(metrics, [h.summary for h in held], [h.values for h in held])
