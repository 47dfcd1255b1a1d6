"""The reward pool: one Serve deployment for each reward source, and an ingress in front.

The ingress fans a batch of rollouts out to every source, asks the baseline for the prompts' reference rewards,
transforms and combines. Batches travel by reference, one call for each.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions

from actors.failures import PATIENCE
from actors.fault import Fault
from actors.resources import actor_options, keep_memory, room, set_threads, yield_to_learners
from actors.watchdog import deadline
from rlhf.config import RecoveryConfig, ResourcesConfig, RoleConfig
from rlhf.models.device import Compute
from rlhf.sources.answers import check_scale_of
from rlhf.sources.source import Batch, Place, RewardSource, Source, as_columns
from rlhf.timeline import Recorder, Span
from rlhf.types import Content, Response, Rewards, Rollouts, prompt_id
from rlhf.utility.pipeline import Utility
from rlhf.utility.statistics import ReferenceRule

log = logging.getLogger(__name__)

Columns = Mapping[int, Mapping[str, Any]]
"""Of each prompt, by its id, the other columns of its row."""

ATTEMPTS = 5
ENDS = 30.0  # seconds for an application to end
POINTS = 256  # samples, at most, that a transform of a prompt's samples gets; of more, their quantiles


class RewardReplica:
    """One replica of one reward source. A source that cannot be opened is no failure of the replica, which Serve would
    start again and again: every call says why."""

    def __init__(
        self, name: str, source: Source, place: Place, columns: list[ray.ObjectRef], compute: Compute
    ) -> None:
        """columns: for sources that read them, of each prompt by its id."""
        self._compute = compute
        set_threads(compute.threads)
        keep_memory()
        yield_to_learners()
        self._recorder = Recorder(f"reward {name}")
        self._one_at_a_time = threading.Lock()  # Serve calls from several threads
        self._columns: Columns = ray.get(columns[0]) if columns else {}
        self._scales = {reward: own.unit for reward, own in source.names(name).items()}
        self._fault: ValueError | None = None
        try:
            compute.check("resources.reward")
            self._source = source.open(name, place)
        except ValueError as error:
            self._fault = error

    def fault(self) -> str | None:
        """Why the source cannot be used; None: it can."""
        return None if self._fault is None else str(self._fault)

    def notes(self) -> list[str]:
        """What to tell of how the source is called."""
        return self._ready().notes

    def _ready(self) -> RewardSource:
        if self._fault is not None:
            raise self._fault
        return self._source

    def score(
        self, rollouts: list[ray.ObjectRef], columns: Mapping[str, Any] | None
    ) -> tuple[np.ndarray, tuple[Span, ...]]:
        """Rewards of the responses of one `Rollouts`, float32 [B, H], NaN where they do not apply, and what was
        done for them. columns: of all its prompts; None: those of the data set."""
        batch: Rollouts = ray.get(rollouts[0])
        given = (
            columns_of(self._columns, batch.prompt_ids[batch.group].tolist())
            if columns is None
            else {name: [value] * batch.responses for name, value in columns.items()}
        )
        return self._scored(
            Batch(
                [batch.prompts[g] for g in batch.group],
                batch.texts,
                [batch.tokens[b] for b in range(batch.responses)],
                batch.finished,
                given,
            )
        )

    def score_texts(
        self,
        contents: Sequence[Content],
        responses: Sequence[Response],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> np.ndarray:
        """Rewards of given responses, float32 [B, H]. columns: of their prompts; None: those of the data set."""
        if columns is None:
            ids = [prompt_id(content) for content in contents] if self._columns else []
            columns = columns_of(self._columns, ids)
        return self._scored(Batch(contents, responses, columns=columns))[0]

    def _scored(self, batch: Batch) -> tuple[np.ndarray, tuple[Span, ...]]:
        source = self._ready()
        with self._one_at_a_time if source.alone else nullcontext():
            with self._recorder.span("score"):
                rewards = as_columns(source.score(batch))
                for column, (name, scale) in enumerate(self._scales.items()):
                    check_scale_of(f"reward source '{name}'", scale, rewards[:, column], batch)
            self._compute.rest()
            return rewards, self._recorder.take()


class RewardIngress:
    """Rewards rollouts by all sources. A call lost with its replica is made again on another."""

    def __init__(
        self, sources: Mapping[str, Any], rewards: Mapping[str, Sequence[str]], baseline: Any
    ) -> None:
        """rewards: of each source the names of those that it gives."""
        self._sources, self._baseline = dict(sources), baseline
        self._rewards = {name: list(given) for name, given in rewards.items()}
        self._columns = [reward for given in rewards.values() for reward in given]

    async def faults(self) -> list[str]:
        """Why sources cannot be used; empty: they can."""
        found = await asyncio.gather(*(self._call(s, "fault") for s in self._sources))
        return [fault for fault in found if fault is not None]

    async def notes(self) -> list[str]:
        """What to tell of how sources are called."""
        found = await asyncio.gather(*(self._call(s, "notes") for s in self._sources))
        return [note for notes in found for note in notes]

    async def raw(
        self, rollouts: list[ray.ObjectRef], columns: Mapping[str, Any] | None = None
    ) -> np.ndarray:
        """Raw rewards of one `Rollouts`, float32 [B, M], NaN where one does not apply. columns: of all its prompts;
        None: those of the data set."""
        return (await self._scored(rollouts, columns))[0]

    async def _scored(
        self, rollouts: list[ray.ObjectRef], columns: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, tuple[Span, ...]]:
        found = await asyncio.gather(*(self._call(s, "score", rollouts, columns) for s in self._sources))
        return np.concatenate([r for r, _ in found], 1), tuple(s for _, spans in found for s in spans)

    async def texts(
        self,
        reward: str,
        contents: Sequence[Content],
        responses: Sequence[Response],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> np.ndarray:
        """One reward of given responses, float32 [N]. columns: of their prompts; None: those of the data set."""
        source, given = next((s, g) for s, g in self._rewards.items() if reward in g)
        scores = await self._call(source, "score_texts", contents, responses, columns)
        return scores[:, given.index(reward)]

    async def raw_texts(
        self,
        contents: Sequence[Content],
        responses: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None,
    ) -> np.ndarray:
        """All rewards of given responses, float32 [N, M]."""
        calls = (self._call(s, "score_texts", contents, responses, columns) for s in self._sources)
        return np.concatenate(await asyncio.gather(*calls), 1)

    async def rewards(
        self,
        rollouts: list[ray.ObjectRef],
        utility: Utility,
        rules: Mapping[str, ReferenceRule],
        statistics: str,
    ) -> Rewards:
        """What the learner maximises, for one `Rollouts`, with references from frozen statistics (a file)."""
        assert self._columns == list(utility.weights) == list(rules)
        started = time.perf_counter()
        batch: Rollouts = await rollouts[0]
        points = POINTS if utility.needs_samples else 0
        (raw, spans), references = await asyncio.gather(
            self._scored(rollouts),
            asyncio.wrap_future(
                self._baseline.references.remote(batch.prompt_ids, rules, points, statistics).future()
            ),
        )
        rewards = utility.rewards(batch, raw, references)
        return replace(rewards, seconds=time.perf_counter() - started, spans=spans)

    async def _call(self, source: str, method: str, *arguments: Any) -> Any:
        for attempt in range(ATTEMPTS):
            try:
                return await getattr(self._sources[source], method).remote(*arguments)
            except RayActorError:
                if attempt + 1 == ATTEMPTS:
                    raise
                await asyncio.sleep(0.2 * 2**attempt)
        raise AssertionError


class RewardPool:
    """The running application, seen from the driver.

    Raises:
        ValueError: a source cannot be used; it says which and why. Nothing is then left of the application.
    """

    def __init__(
        self,
        sources: Mapping[str, Source],
        paths: Mapping[str, str],
        columns: Callable[[], Columns],
        resources: ResourcesConfig,
        budget: int,
        dtype: str,
        baseline: Any,
        recovery: RecoveryConfig,
        http: HTTPOptions | None = None,
    ) -> None:
        """
        Args:
            http: where Serve listens, if it does.
            paths: of models that were trained here.
            columns: those of the prompts' data set, for sources that read them.
        """
        self._silence = recovery.silence
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        if http is None:
            serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        else:
            serve.start(proxy_location="HeadOnly", http_options=http, logging_config={"log_level": "ERROR"})
        self.name = f"rewards-{uuid.uuid4().hex[:8]}"
        app = serve.deployment(RewardIngress).options(
            name="ingress",
            max_ongoing_requests=64,
            ray_actor_options={"num_cpus": 0},
            **_checked(recovery),
        )
        read = any(source.reads_columns for source in sources.values())
        self._columns = [ray.put(columns())] if read else []  # kept for replicas that start later
        computes = {name: Compute.of(_role(source, resources)) for name, source in sources.items()}
        deployments = {
            name: _deployment(name, source, resources, recovery).bind(
                name,
                source,
                Place(paths.get(name), computes[name].device, dtype, budget),
                self._columns if source.reads_columns else [],
                computes[name],
            )
            for name, source in sources.items()
        }
        given = {name: list(source.names(name)) for name, source in sources.items()}
        try:
            target = serve.RunTarget(
                app.bind(deployments, given, baseline),
                self.name,
                None,
                logging_config={"log_level": "ERROR"},
            )
            (self._handle,) = serve.run_many([target], wait_for_applications_running=False)
            self._wait(recovery.startup)
            faults = self._handle.faults.remote().result(timeout_s=recovery.startup)
            if faults:
                raise ValueError("; ".join(faults))
            self.notes: list[str] = self._handle.notes.remote().result(timeout_s=recovery.startup)
        except TimeoutError:
            self.stop()
            raise Fault(f"the reward pool gave no answer for {recovery.startup:g} s") from None
        except BaseException:
            self.stop()  # or the replicas that started would keep their CPUs
            raise

    def _wait(self, seconds: float) -> None:
        """Until every replica is there.

        Raises:
            Fault: it takes too long, or they fail.
        """
        end, tell = time.monotonic() + seconds, time.monotonic() + PATIENCE
        while True:
            status = serve.status().applications[self.name]
            if status.status == "RUNNING":
                return
            states = "; ".join(f"{n}: {d.status} {d.message}".strip() for n, d in status.deployments.items())
            if status.status == "DEPLOY_FAILED" or time.monotonic() > end:
                raise Fault(f"the reward pool did not start ({states})")
            if time.monotonic() > tell:
                tell += PATIENCE
                log.warning("the reward pool is waited for: %s; %s", states, room())
            time.sleep(0.1)

    def latest_notes(self) -> list[str]:
        """What there is to tell of how sources were called, by now."""
        try:
            return self._handle.notes.remote().result(timeout_s=self._silence)
        except TimeoutError:
            raise Fault(f"the reward pool gave no answer for {self._silence:g} s") from None

    def _started(self, response: Any) -> ray.ObjectRef:
        """The reference of a call, once a replica has it."""
        try:
            return response._to_object_ref_sync(_timeout_s=self._silence)
        except TimeoutError:
            raise Fault(f"no replica of the reward pool took a call for {self._silence:g} s") from None

    def raw(self, rollouts: ray.ObjectRef) -> ray.ObjectRef:
        """Starts the scoring of rollouts; the reference of their raw rewards, float32 [B, M]."""
        return self._started(self._handle.raw.remote([rollouts]))

    def texts(self, reward: str, contents: Sequence[Content], responses: Sequence[Response]) -> ray.ObjectRef:
        """Starts the scoring of given responses by one reward; the reference of float32 [N]."""
        return self._started(self._handle.texts.remote(reward, contents, responses))

    def rewards(
        self,
        rollouts: ray.ObjectRef,
        utility: Utility,
        rules: Mapping[str, ReferenceRule],
        statistics: Path,
    ) -> ray.ObjectRef:
        """Starts the rewarding of rollouts, with references from frozen statistics; the reference of their
        `Rewards`."""
        return self._started(self._handle.rewards.remote([rollouts], utility, rules, str(statistics)))

    def stop(self) -> None:
        """
        Raises:
            Fault: Serve's controller does not answer.
        """
        with deadline(ENDS, f"the end of Serve's application {self.name}"):
            serve.delete(self.name)


def _checked(recovery: RecoveryConfig) -> dict[str, float]:
    """How often Serve asks replicas whether they are well; after three times without an answer it replaces one."""
    return {
        "health_check_period_s": min(10.0, recovery.silence / 6),
        "health_check_timeout_s": min(30.0, recovery.silence / 6),
    }


def columns_of(columns: Columns, ids: Sequence[int]) -> dict[str, list[Any]]:
    """For each column its values of these prompts; None where a prompt has not got it.

    >>> columns_of({1: {"a": 5}, 2: {"a": 6, "b": 7}}, [2, 1])
    {'a': [6, 5], 'b': [7, None]}
    """
    rows = [columns.get(i, {}) for i in ids]
    return {name: [row.get(name) for row in rows] for name in sorted({n for row in rows for n in row})}


def _role(source: Source, resources: ResourcesConfig) -> RoleConfig:
    """What each replica of a source is given: a GPU only where it is a model."""
    return resources.reward if source.uses_device else replace(resources.reward, gpus=0.0)


def _deployment(name: str, source: Source, resources: ResourcesConfig, recovery: RecoveryConfig) -> Any:
    role = _role(source, resources)
    options: dict[str, Any] = {
        "name": f"reward-{name}",
        "max_ongoing_requests": 4,
        **_checked(recovery),
        "ray_actor_options": actor_options(role),
    }
    if resources.max_reward_replicas is not None:
        options["autoscaling_config"] = {
            "min_replicas": role.count,
            "initial_replicas": role.count,
            "max_replicas": resources.max_reward_replicas,
            "target_ongoing_requests": 2,
        }
    else:
        options["num_replicas"] = role.count
    return serve.deployment(RewardReplica).options(**options)
