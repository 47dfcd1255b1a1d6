"""Rollout generators: policy weights of a version, and an engine that samples from them."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
from ray.exceptions import RayActorError, RayTaskError

from actors.resources import actor_options, keep_memory, set_threads, yield_to_learners
from rlhf.config import RoleConfig, RolloutConfig
from rlhf.generate.engine import Engine
from rlhf.timeline import Recorder, Span
from rlhf.types import Rollouts, WorkItem

LISTEN = 0.05  # seconds of sampling after which a generator looks for calls


@dataclass(frozen=True)
class Summary:
    """What the driver needs to know of rollouts that it does not fetch."""

    item: int
    version: int
    responses: int
    tokens: int
    finished: int
    seconds: float
    spans: tuple[Span, ...]  # of the generator, since the last item


class Generator:
    """One generator. `load` first; then any number of `set_weights` and `generate`."""

    def __init__(
        self, number: int, rollout: RolloutConfig, chat_template: str | None, role: RoleConfig
    ) -> None:
        set_threads(role.cpus)
        keep_memory()
        yield_to_learners()
        import rlhf.generate.transformers_engine  # noqa: F401 - now, and not in the first call

        self._rollout, self._template, self._role = rollout, chat_template, role
        self._engine: Engine | None = None
        self._recorder = Recorder(f"generator {number}")
        self._work: asyncio.Task | None = None
        self._results: dict[int, asyncio.Future[Rollouts]] = {}  # by the engine's ticket

    def ping(self) -> str:
        return "pong"

    def apply(self, func: Callable, *args: Any, **kwargs: Any) -> Any:
        """What `FaultTolerantActorManager` calls."""
        return func(self, *args, **kwargs)

    async def load(self, policy: str) -> None:
        """Takes the weights of a saved policy, as version 0."""
        from rlhf.data.chat import ChatFormat
        from rlhf.generate.transformers_engine import TransformersEngine
        from rlhf.models.load import load_policy, load_tokenizer

        if self._work is not None:  # of a stage that an error ended: its callers are answered first
            await self._work
        set_threads(self._role.cpus)  # of the thread that samples
        chat = ChatFormat(load_tokenizer(policy, "policy.path"), "policy", self._template)
        device = "cuda" if self._role.gpus > 0 else "cpu"
        self._engine = TransformersEngine(
            load_policy(policy),
            chat,
            self._rollout.max_new_tokens,
            self._rollout.temperature,
            self._rollout.slots,
            device=device,
            dtype=self._rollout.dtype,
        )

    async def set_weights(self, weights: Any, version: int) -> None:
        """Takes published weights; nothing, if this process was restarted and has no policy yet."""
        if self._engine is None:
            return
        with self._recorder.span("pull weights"):
            self._engine.set_weights(weights.tensors(), version)

    async def generate(self, item: WorkItem) -> tuple[Rollouts, Summary] | tuple[None, None]:
        """Samples a work item, beside others that are under way; nothing, if this process was restarted and has no
        policy yet."""
        if self._engine is None:
            return None, None
        ticket = self._engine.submit(item)
        self._results[ticket] = asyncio.get_running_loop().create_future()
        if self._work is None or self._work.done():
            self._work = asyncio.create_task(self._advance(self._engine))
        rollouts = await self._results[ticket]
        return rollouts, Summary(
            item.id,
            rollouts.version,
            rollouts.responses,
            len(rollouts.tokens.values),
            int(rollouts.finished.sum()),
            rollouts.seconds,
            self._recorder.take(),
        )

    async def _advance(self, engine: Engine) -> None:
        """Samples until nothing is left; between tokens, calls that have come are heard."""
        try:
            while engine.busy:
                started = time.time()
                done: list[tuple[int, Rollouts]] = []
                while engine.busy and not done and time.time() - started < LISTEN:
                    done = engine.advance()
                self._recorder.add("sample", started)
                for ticket, rollouts in done:
                    self._results.pop(ticket).set_result(rollouts)
                await asyncio.sleep(0)
        except Exception as error:
            self._engine = None  # its state is unknown; `load` makes a new one
            for result in self._results.values():
                result.set_exception(error)
            self._results.clear()

    async def logprobs(self, rollouts: Rollouts) -> np.ndarray:
        assert self._engine is not None
        return self._engine.logprobs(rollouts)


@dataclass(frozen=True)
class Sampled:
    """A finished work item: its rollouts stay in the object store, owned by the driver."""

    item: WorkItem
    rollouts: ray.ObjectRef
    summary: Summary


class GeneratorPool:
    """All generators, seen from the driver. Ray restarts a dead one; it then gets the current policy again.

    `FaultTolerantActorManager` keeps who is healthy. Work is dispatched beside it, with two return values, so that
    the driver reads the summary and leaves the rollouts where they are.
    """

    def __init__(
        self, rollout: RolloutConfig, chat_template: str | None, role: RoleConfig, kind: type = Generator
    ) -> None:
        from ray.rllib.utils.actor_manager import FaultTolerantActorManager

        actor = ray.remote(kind).options(max_restarts=-1, max_task_retries=0, **actor_options(role))
        self._actors = [actor.remote(n, rollout, chat_template, role) for n in range(role.count)]
        self._manager = FaultTolerantActorManager(self._actors)
        self._work: dict[ray.ObjectRef, tuple[int, WorkItem, ray.ObjectRef]] = {}
        self._policy: str | None = None
        self._weights: tuple[ray.ObjectRef, int] | None = None

    def load(self, policy: str) -> None:
        """Every generator takes the weights of a saved policy, as version 0."""
        self._policy, self._weights = policy, None
        ray.get([a.load.remote(policy) for a in self._actors])

    def set_weights(self, weights: ray.ObjectRef, version: int) -> list[ray.ObjectRef]:
        """Sends weights to every healthy generator; references that are ready when they have pulled them."""
        self._weights = (weights, version)
        return [
            self._actors[i].set_weights.remote(weights, version) for i in self._manager.healthy_actor_ids()
        ]

    @property
    def pending(self) -> list[ray.ObjectRef]:
        return list(self._work)

    def free(self, depth: int) -> int | None:
        """The healthy generator with the fewest work items, if it has less than `depth`."""
        load = dict.fromkeys(self._manager.healthy_actor_ids(), 0)
        for worker, _, _ in self._work.values():
            if worker in load:
                load[worker] += 1
        least = min(load, key=lambda i: (load[i], i), default=None)
        return least if least is not None and load[least] < depth else None

    def submit(self, item: WorkItem, worker: int) -> None:
        generate = self._actors[worker].generate.options(num_returns=2)
        rollouts, summary = generate.remote(item)
        self._work[summary] = (worker, item, rollouts)

    def finish(self, ref: ray.ObjectRef) -> tuple[int, WorkItem, Sampled | None]:
        """The outcome of a ready reference: worker, item, and its rollouts, or None if the generator died."""
        worker, item, rollouts = self._work.pop(ref)
        try:
            summary = ray.get(ref)
        except RayTaskError:  # the generator's own error is the user's to see
            raise
        except RayActorError:
            summary = None
        if summary is None:
            self._manager.set_actor_state(worker, healthy=False)
            return worker, item, None
        return worker, item, Sampled(item, rollouts, summary)

    def restart(self, worker: int) -> None:
        """Ends a generator that does not answer; its work comes back through `finish`."""
        ray.kill(self._actors[worker], no_restart=False)

    def heal(self) -> list[int]:
        """Brings restarted generators back with the current policy; their numbers."""
        sick = [i for i in self._manager.actor_ids() if not self._manager.is_actor_healthy(i)]
        back = []
        for worker in sick:
            try:
                ray.get(self._restore(worker), timeout=60)
            except (RayActorError, ray.exceptions.GetTimeoutError):
                continue
            self._manager.set_actor_state(worker, healthy=True)
            back.append(worker)
        return back

    def _restore(self, worker: int) -> list[ray.ObjectRef]:
        calls = [self._actors[worker].load.remote(self._policy)]
        if self._weights is not None:
            calls.append(self._actors[worker].set_weights.remote(*self._weights))
        return calls

    def sample(self, items: Sequence[WorkItem]) -> Iterator[Sampled]:
        """Samples all items, as they finish; items of generators that die are sampled again."""
        waiting = deque(items)
        left = len(items)
        while left:
            while waiting and (worker := self.free(depth=1)) is not None:
                self.submit(waiting.popleft(), worker)
            for ref in ray.wait(self.pending, timeout=1.0)[0] if self.pending else []:
                _, item, sampled = self.finish(ref)
                if item not in items:  # of an earlier call that an error or a dead generator cut short
                    continue
                if sampled is None:
                    waiting.appendleft(item)
                else:
                    left -= 1
                    yield sampled
            self.heal()

    def logprobs(self, rollouts: Sequence[ray.ObjectRef]) -> list[np.ndarray]:
        """Log-probabilities of rollouts' tokens under the generators' current policy, float32 [T] each."""
        calls = [self._actors[i % len(self._actors)].logprobs.remote(r) for i, r in enumerate(rollouts)]
        return ray.get(calls)

    def stop(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
