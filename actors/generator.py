"""A rollout generator: policy weights of a version, and an engine that samples from them."""

from __future__ import annotations

import asyncio
import gc
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from actors.resources import keep_memory, set_threads, yield_to_learners
from actors.stuck import place
from rlhf.config import RoleConfig, RolloutConfig
from rlhf.generate.engine import Engine
from rlhf.models.device import Compute
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
        self._compute = Compute.of(role)
        set_threads(self._compute.threads)
        keep_memory()
        yield_to_learners()
        from rlhf.generate.engines import engine_class

        self._kind = engine_class(rollout)  # imported now, and not in the first call
        self._rollout, self._template = rollout, chat_template
        self._engine: Engine | None = None
        self._recorder = Recorder(f"generator {number}")
        self._work: asyncio.Task | None = None
        self._results: dict[int, asyncio.Future[Rollouts]] = {}  # by the engine's ticket
        self._progress = 0

    def ping(self) -> tuple[int, str]:
        """Its process and node, as soon as it is there."""
        return place()

    def progress(self) -> int:
        """Another number than before, unless sampling has stood still; heard between two bursts of it."""
        if self._engine is None or not self._engine.busy:
            self._progress += 1  # there is nothing to stand still
        return self._progress

    async def load(self, policy: str) -> list[str]:
        """Takes the weights of a saved policy, as version 0; what to tell of how it is sampled."""
        from rlhf.data.chat import ChatFormat
        from rlhf.models.load import load_tokenizer

        if self._work is not None:  # of a stage that an error ended: its callers are answered first
            await self._work
        set_threads(self._compute.threads)  # of the thread that samples
        self._compute.check("resources.generators")
        chat = ChatFormat(load_tokenizer(policy, "policy.path"), "policy", self._template)
        self._drop()
        engine = self._engine = self._kind.open(policy, chat, self._rollout, self._compute.device)
        return engine.notes

    async def set_weights(self, weights: Any, version: int) -> bool:
        """Takes published weights; False if this process was restarted and has no policy yet."""
        if self._engine is None:
            return False
        with self._recorder.span("pull weights"):
            self._engine.set_weights(weights.tensors(), version)
        return True

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
                    self._progress += 1
                self._recorder.add("sample", started)
                if done and not engine.busy:
                    engine.rest()  # before the answer, for which the learner waits
                for ticket, rollouts in done:
                    self._results.pop(ticket).set_result(rollouts)
                await asyncio.sleep(0)
        except Exception as error:
            self._drop()  # its state is unknown; `load` makes a new one
            for result in self._results.values():
                result.set_exception(error)
            self._results.clear()

    def _drop(self) -> None:
        if self._engine is not None:
            self._engine.close()
            self._engine = None
            gc.collect()  # a model is in cycles: it would be there beside the next

    async def logprobs(self, rollouts: Rollouts) -> np.ndarray | None:
        """Of the rollouts' tokens, float32 [T]; nothing, if this process was restarted and has no policy yet."""
        if self._engine is None:
            return None
        found = np.empty(len(rollouts.tokens.values), np.float32)
        for places, values in self._engine.logprobs(rollouts):
            found[places] = values
            self._progress += 1
            await asyncio.sleep(0)  # calls that have come are heard
        return found
