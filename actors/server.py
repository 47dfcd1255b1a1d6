"""The HTTP deployment: requests in, rewards of the pool out, with references for prompts that were not seen before."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayError

from actors.errors import cause_of, in_one_line
from actors.work import seed_of
from rlhf.config import ServeConfig
from rlhf.serving.app import Limits, make_app
from rlhf.serving.protocol import Conversation, ConversationRewards, ModelInfo, Unavailable
from rlhf.shown import short
from rlhf.types import Content, WorkItem, prompt_id
from rlhf.utility.pipeline import Utility
from rlhf.utility.statistics import ReferenceRule

log = logging.getLogger(__name__)

POINTS = 256  # samples, at most, that a transform of a prompt's samples gets


@dataclass(frozen=True)
class Served:
    """What is served."""

    pool: str  # the name of Serve's application
    estimator: Any  # handle of the baseline estimator
    generator: Any | None  # handle of one that samples the base policy; None: unseen prompts are refused
    policy: str | None  # where that is
    models: dict[str, ModelInfo]
    utility: Utility
    rules: Mapping[str, ReferenceRule]
    canned: Mapping[str, list[str]]  # by reward, for canned rules
    samples: int  # of an unseen prompt
    seed: int


@dataclass
class _Waiting:
    """Responses that wait for the next call of the pool."""

    contents: list[Content]
    responses: list[str]
    columns: list[Mapping[str, Any]]
    answer: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class PoolScorer:
    """Scores by the pool. Requests that come while a call is under way are scored together in the next one."""

    def __init__(self, served: Served, batch: int) -> None:
        self._served, self._batch = served, batch
        self.models = served.models
        self._pool = serve.get_app_handle(served.pool)
        self._waiting: list[_Waiting] = []
        self._calls: set[asyncio.Task] = set()
        self._references: dict[int, asyncio.Task] = {}  # of prompts that are being made, by id

    async def ready(self) -> bool:
        try:
            async with asyncio.timeout(10):
                return not await self._pool.faults.remote()
        except (TimeoutError, RayError):
            return False

    async def score(self, conversations: Sequence[Conversation], raw_only: bool) -> list[ConversationRewards]:
        try:
            return await self._score(conversations, raw_only)
        except RayError as error:  # of what a process raised, and of processes that are gone
            own = cause_of(error)
            if isinstance(own, ValueError):
                raise ValueError(str(own)) from error
            log.warning("a request was not answered: %s", in_one_line(str(own)))
            raise Unavailable(f"the rewards are not there now ({type(own).__name__}); try again") from error

    async def _score(
        self, conversations: Sequence[Conversation], raw_only: bool
    ) -> list[ConversationRewards]:
        contents = [c.content for c in conversations]
        group = np.repeat(np.arange(len(conversations)), [len(c.responses) for c in conversations])
        raw = await self._raw(conversations, contents)
        splits = np.cumsum([len(c.responses) for c in conversations])[:-1]
        names = list(self.models)
        if raw_only:
            return [ConversationRewards(raw=_numbers(names, part)) for part in np.split(raw, splits)]
        ids = np.array([prompt_id(c) for c in contents], np.uint64)
        references = await self._referred(contents, ids, [c.columns for c in conversations])
        if not len(group):
            return [ConversationRewards(raw=_numbers(names, raw), combined=[]) for _ in conversations]
        found = self._served.utility.details(raw, references, group, contents)
        parts = {key: np.split(value, splits) for key, value in found.items()}
        return [
            ConversationRewards(
                raw=_numbers(names, parts["raw"][i]),
                reference={n: _number(references[n].r_ref[i]) for n in names},
                utility=_numbers(names, parts["utility"][i]),
                p_good=_numbers(names, parts["p_good"][i]),
                combined=[float(value) for value in parts["combined"][i]],
            )
            for i in range(len(conversations))
        ]

    async def _raw(self, conversations: Sequence[Conversation], contents: Sequence[Content]) -> np.ndarray:
        """Float32 [B, M]."""
        rows = [(p, r, c.columns) for c, p in zip(conversations, contents, strict=True) for r in c.responses]
        if not rows:
            return np.empty((0, len(self.models)), np.float32)
        prompts, responses, columns = (list(column) for column in zip(*rows, strict=True))
        waiting = _Waiting(prompts, responses, columns)
        self._waiting.append(waiting)
        self._start()
        return await waiting.answer

    def _start(self) -> None:
        """Calls the pool, unless a call is under way: then those that wait are taken after it."""
        if self._calls or not self._waiting:
            return
        taken: list[_Waiting] = []
        count = 0
        while self._waiting and (not taken or count + len(self._waiting[0].responses) <= self._batch):
            taken.append(self._waiting.pop(0))
            count += len(taken[-1].responses)
        task = asyncio.create_task(self._call(taken))
        self._calls.add(task)
        task.add_done_callback(self._called)

    def _called(self, task: asyncio.Task) -> None:
        self._calls.discard(task)
        self._start()

    async def _call(self, taken: Sequence[_Waiting]) -> None:
        """Answers those who wait. If together they fail, each is asked for alone: one bad response is one's own."""
        try:
            found = await self._texts([row for w in taken for row in _rows(w)])
        except Exception as error:
            if len(taken) > 1:
                for one in taken:
                    await self._call([one])
            elif not taken[0].answer.done():
                taken[0].answer.set_exception(error)
            return
        ends = np.cumsum([len(w.responses) for w in taken])
        for waiting, part in zip(taken, np.split(found, ends[:-1]), strict=True):
            if not waiting.answer.done():  # whoever asked has gone
                waiting.answer.set_result(part)

    async def _texts(self, rows: Sequence[tuple[Content, str, Mapping[str, Any]]]) -> np.ndarray:
        contents, responses, columns = zip(*rows, strict=True)
        names = sorted({name for row in columns for name in row})
        given = {name: [row.get(name) for row in columns] for name in names}
        return await self._pool.raw_texts.remote(list(contents), list(responses), given)

    async def _referred(
        self, contents: Sequence[Content], ids: np.ndarray, columns: Sequence[Mapping[str, Any]]
    ) -> dict[str, Any]:
        """References of the prompts; those that are not there are made first."""
        rows = zip(contents, ids.tolist(), columns, strict=True)
        await asyncio.gather(*(self._known(*row) for row in rows))
        points = POINTS if self._served.utility.needs_samples else 0
        return await self._served.estimator.references.remote(ids, self._served.rules, points)

    async def _known(self, content: Content, number: int, columns: Mapping[str, Any]) -> None:
        """Returns once a prompt has its references. Requests for one prompt share the work."""
        if number not in self._references:
            task = asyncio.create_task(self._refer(content, number, columns))
            self._references[number] = task
            task.add_done_callback(lambda _: self._references.pop(number, None))
        await asyncio.shield(self._references[number])

    async def _refer(self, content: Content, number: int, columns: Mapping[str, Any]) -> None:
        served, ids = self._served, np.array([number], np.uint64)
        (lacks,), canned = await served.estimator.open_rules.remote(served.rules, ids)
        if lacks:
            if served.generator is None:
                raise ValueError(
                    f"prompt {short(content)}: there are no base samples of it, which a reference needs; set "
                    "serve.unseen=sample, ask for raw_only, or give rewards whose scale needs none"
                )
            item = WorkItem(number >> 2, (content,), served.samples, seed_of(served.seed, "serve", number))
            generate = served.generator.generate.options(num_returns=2)
            rollouts, summary = generate.remote(item)
            if await summary is None:  # it was started again, and has no policy yet
                await served.generator.load.remote(served.policy)
                rollouts, _ = generate.remote(item)
            raw = await self._pool.raw.remote([rollouts], columns)
            await served.estimator.update.remote(list(served.models), rollouts, raw, "serve")
        for name, (open_,) in canned:
            if open_:
                texts = served.canned[name]
                rewards = await self._pool.texts.remote(name, [content] * len(texts), texts)
                for i, reward in enumerate(rewards.tolist()):
                    one = np.array([reward], np.float32)
                    item_ = (f"serve {i}", number)
                    await served.estimator.update_canned.remote(name, ids, one, item_)


def _rows(waiting: _Waiting) -> list[tuple[Content, str, Mapping[str, Any]]]:
    return list(zip(waiting.contents, waiting.responses, waiting.columns, strict=True))


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _numbers(names: Sequence[str], columns: np.ndarray) -> dict[str, list[float | None]]:
    """By reward, of float32 [n, M]."""
    return {name: [_number(v) for v in columns[:, i]] for i, name in enumerate(names)}


def server(served: Served, token: str, config: ServeConfig) -> Any:
    """The deployment, to be run at the root."""
    limits = Limits(config.max_body, config.max_responses, config.timeout)

    def build() -> Any:
        return make_app(PoolScorer(served, config.batch), token, limits, config.strip)

    @serve.ingress(build)
    class RewardServer:
        pass

    return (
        serve.deployment(RewardServer)
        .options(
            name="server",
            max_ongoing_requests=1024,
            graceful_shutdown_timeout_s=config.drain,
            ray_actor_options={"num_cpus": 0},
        )
        .bind()
    )
