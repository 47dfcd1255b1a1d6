"""The HTTP deployment: requests in, rewards of the pool out, with references for prompts that were not seen before."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from ray import serve
from ray.exceptions import RayError

from actors.errors import cause_of, in_one_line
from actors.fault import Fault
from actors.work import seed_of
from rlhf.config import ServeConfig
from rlhf.serving.app import Limits, make_app
from rlhf.serving.protocol import Conversation, ConversationRewards, ModelInfo, Unavailable
from rlhf.shown import short
from rlhf.types import Content, WorkItem, prompt_id
from rlhf.utility.kinds import TRANSFORM_KINDS
from rlhf.utility.pipeline import Utility
from rlhf.utility.statistics import ReferenceRule

log = logging.getLogger(__name__)

POINTS = 256  # samples, at most, that a transform of a prompt's samples gets
READY = 3.0  # seconds for which it is remembered whether all is ready, and for which that is waited for


@dataclass(frozen=True)
class Served:
    """What is served."""

    pool: str  # the name of Serve's application
    estimator: Any  # handle of the baseline estimator
    statistics: str | None  # the file of what it begins with; None: with nothing
    keys: dict[str, str]  # likewise
    exact: int
    generator: Any | None  # handle of one that samples the base policy; None: unseen prompts are refused
    policy: str | None  # where that is
    models: dict[str, ModelInfo]
    reads_columns: bool  # whether any source does
    utility: Utility
    rules: Mapping[str, ReferenceRule]
    canned: Mapping[str, list[str]]  # by reward, for canned rules
    samples: int  # of an unseen prompt
    seed: int

    @property
    def needs_base(self) -> bool:
        """Whether samples of the base policy are needed whatever the rules are."""
        return TRANSFORM_KINDS[self.utility.transform].needs_base

    async def open_estimator(self) -> None:
        """Gives the estimator what it begins with; references that were made since are made again."""
        if self.statistics is None:
            await self.estimator.reset.remote(self.keys, self.exact)
        else:
            await self.estimator.reopen.remote(self.statistics, self.keys, self.exact)


@dataclass(frozen=True)
class _Asked:
    """A prompt as it is asked for. Rewards may read columns: then the same content with others is another prompt."""

    content: Content
    columns: Mapping[str, Any] | None  # None: those of the data set, if it is one of its prompts
    number: int

    @classmethod
    def of(cls, conversation: Conversation, reads_columns: bool) -> _Asked:
        content, columns = conversation.content, conversation.columns
        if not columns or not reads_columns:
            return cls(content, None, prompt_id(content))
        marked: list[Any] = [{"role": "columns", "content": json.dumps(columns, sort_keys=True)}]
        whole = [{"role": "prompt", "content": content}] if isinstance(content, str) else content
        return cls(content, columns, prompt_id([*marked, *whole]))

    @property
    def names(self) -> tuple[str, ...] | None:
        return None if self.columns is None else tuple(sorted(self.columns))


@dataclass
class _Waiting:
    """Responses that wait for the next call of the pool."""

    rows: list[tuple[_Asked, str]]
    answer: asyncio.Future = field(default_factory=lambda: asyncio.get_running_loop().create_future())

    @property
    def names(self) -> set[tuple[str, ...] | None]:
        return {asked.names for asked, _ in self.rows}


class PoolScorer:
    """Scores by the pool. Requests that come while a call is under way are scored together in the next one, those with
    the same columns."""

    def __init__(self, served: Served, batch: int) -> None:
        self._served, self._batch = served, batch
        self.models = served.models
        self._pool = serve.get_app_handle(served.pool)
        self._waiting: list[_Waiting] = []
        self._calls: set[asyncio.Task] = set()
        self._references: dict[int, asyncio.Task] = {}  # of prompts that are being made, by number
        self._ready, self._looked = False, -READY

    async def ready(self) -> bool:
        """Looked at now and then: whoever asks needs no token."""
        if time.monotonic() - self._looked > READY:
            self._looked = time.monotonic()
            try:
                async with asyncio.timeout(READY):
                    self._ready = not await self._pool.faults.remote()
            except (TimeoutError, RayError):
                self._ready = False
        return self._ready

    async def score(self, conversations: Sequence[Conversation], raw_only: bool) -> list[ConversationRewards]:
        for again in (True, False):
            try:
                return await self._score(conversations, raw_only)
            except RayError as error:  # of what a process raised, and of processes that are gone
                own = cause_of(error)
                if isinstance(own, ValueError):
                    raise ValueError(str(own)) from error
                log.warning("a request was not answered: %s", in_one_line(str(own)))
                if again and isinstance(own, Fault):  # the estimator was started again, and knows nothing
                    await self._served.open_estimator()
                    continue
                raise Unavailable(
                    f"the rewards are not there now ({type(own).__name__}); try again"
                ) from error
        raise AssertionError

    async def _score(
        self, conversations: Sequence[Conversation], raw_only: bool
    ) -> list[ConversationRewards]:
        asked = [_Asked.of(c, self._served.reads_columns) for c in conversations]
        counts = [len(c.responses) for c in conversations]
        group, splits = np.repeat(np.arange(len(asked)), counts), np.cumsum(counts)[:-1]
        rows = [(a, r) for a, c in zip(asked, conversations, strict=True) for r in c.responses]
        raw, names = await self._raw(rows), list(self.models)
        if raw_only:
            return [ConversationRewards(raw=_numbers(names, part)) for part in np.split(raw, splits)]
        references = await self._referred(asked)
        if not rows:
            return [ConversationRewards(raw=_numbers(names, raw), combined=[]) for _ in conversations]
        contents = [a.content for a in asked]
        found = self._served.utility.details(raw, references, group, contents)
        bad = np.flatnonzero(~np.isfinite(found["combined"]))
        if len(bad):
            raise ValueError(
                f"prompt {short(contents[group[bad[0]]])}: the combined utility of a response is "
                f"{found['combined'][bad[0]]}"
            )
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

    async def _raw(self, rows: list[tuple[_Asked, str]]) -> np.ndarray:
        """Float32 [B, M]."""
        found = np.empty((len(rows), len(self.models)), np.float32)
        by_columns: dict[tuple[str, ...] | None, list[int]] = {}
        for i, (asked, _) in enumerate(rows):
            by_columns.setdefault(asked.names, []).append(i)
        waiting = [(_Waiting([rows[i] for i in places]), places) for places in by_columns.values()]
        self._waiting += [one for one, _ in waiting]
        self._start()
        try:
            for one, places in waiting:
                found[places] = await one.answer
        finally:
            for one, _ in waiting:
                one.answer.cancel()  # who asked has gone, or a part of it failed
        return found

    def _start(self) -> None:
        """Calls the pool, unless a call is under way: then those that wait are taken after it."""
        self._waiting = [one for one in self._waiting if not one.answer.done()]
        if self._calls or not self._waiting:
            return
        taken = [self._waiting.pop(0)]
        count = len(taken[0].rows)
        for one in list(self._waiting):
            if one.names == taken[0].names and count + len(one.rows) <= self._batch:
                self._waiting.remove(one)
                taken.append(one)
                count += len(one.rows)
        task = asyncio.create_task(self._call(taken))
        self._calls.add(task)
        task.add_done_callback(self._called)

    def _called(self, task: asyncio.Task) -> None:
        self._calls.discard(task)
        self._start()

    async def _call(self, taken: Sequence[_Waiting]) -> None:
        """Answers those who wait. If together they fail, each is asked for alone: one bad response is one's own."""
        try:
            found = await self._texts([row for w in taken for row in w.rows])
        except Exception as error:
            if len(taken) > 1:
                for one in taken:
                    await self._call([one])
            elif not taken[0].answer.done():
                taken[0].answer.set_exception(error)
            return
        ends = np.cumsum([len(w.rows) for w in taken])
        for waiting, part in zip(taken, np.split(found, ends[:-1]), strict=True):
            if not waiting.answer.done():  # whoever asked has gone
                waiting.answer.set_result(part)

    async def _texts(self, rows: Sequence[tuple[_Asked, str]]) -> np.ndarray:
        contents, responses = [asked.content for asked, _ in rows], [response for _, response in rows]
        return await self._pool.raw_texts.remote(contents, responses, _columns([asked for asked, _ in rows]))

    async def _referred(self, asked: Sequence[_Asked]) -> dict[str, Any]:
        """References of the prompts; those that are not there are made first."""
        await asyncio.gather(*map(self._known, asked))
        ids = np.array([a.number for a in asked], np.uint64)
        points = POINTS if self._served.utility.needs_samples else 0
        return await self._served.estimator.references.remote(ids, self._served.rules, points)

    async def _known(self, asked: _Asked) -> None:
        """Returns once a prompt has its references. Requests for one prompt share the work."""
        if asked.number not in self._references:
            task = asyncio.create_task(self._refer(asked))
            self._references[asked.number] = task
            task.add_done_callback(lambda _: self._references.pop(asked.number, None))
        await asyncio.shield(self._references[asked.number])

    async def _refer(self, asked: _Asked) -> None:
        served, estimator = self._served, self._served.estimator
        lacks, canned = await estimator.open_rules.remote(served.rules, asked.number, served.needs_base)
        if lacks:
            if served.generator is None:
                raise ValueError(
                    f"prompt {short(asked.content)}: there are no base samples of it, which a reference needs; set "
                    "serve.unseen=sample, ask for raw_only, or give rewards whose scale needs none"
                )
            item = WorkItem(
                asked.number >> 2,
                (asked.content,),
                served.samples,
                seed_of(served.seed, "serve", prompt_id(asked.content)),  # the same, whatever the columns
            )
            generate = served.generator.generate.options(num_returns=2)
            rollouts, summary = generate.remote(item)
            if await summary is None:  # it was started again, and has no policy yet
                await served.generator.load.remote(served.policy)
                rollouts, _ = generate.remote(item)
            raw = await self._pool.raw.remote([rollouts], asked.columns)
            await estimator.update_prompt.remote(list(served.models), asked.number, raw)
        ids = np.array([asked.number], np.uint64)
        for name in canned:
            texts = served.canned[name]
            contents = [asked.content] * len(texts)
            rewards = await self._pool.texts.remote(name, contents, texts, _columns([asked] * len(texts)))
            for i in range(len(texts)):
                await estimator.update_canned.remote(
                    name, ids, rewards[i : i + 1], (f"served {i}", asked.number)
                )


def _columns(asked: Sequence[_Asked]) -> dict[str, list[Any]] | None:
    """Of prompts with the same names of columns, by name."""
    if asked[0].columns is None:
        return None
    return {name: [a.columns[name] for a in asked if a.columns is not None] for name in asked[0].columns}


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
