"""The reward-model pool: one Serve deployment for each reward model, and an ingress in front.

The ingress fans a batch of rollouts out to every model, asks the baseline for the prompts' reference rewards,
transforms and combines. Batches travel by reference, one call for each.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray
from ray import serve
from ray.exceptions import RayActorError

from actors.failures import PATIENCE
from actors.fault import Fault
from actors.resources import keep_memory, room, set_threads, yield_to_learners
from actors.watchdog import deadline
from rlhf.config import RecoveryConfig, ResourcesConfig, RewardModelConfig
from rlhf.timeline import Recorder, Span
from rlhf.types import Content, Rewards, Rollouts
from rlhf.utility.pipeline import Utility
from rlhf.utility.statistics import ReferenceRule

if TYPE_CHECKING:
    from rlhf.models.reward import RewardScorer

log = logging.getLogger(__name__)

ATTEMPTS = 5
ENDS = 30.0  # seconds for an application to end
POINTS = 256  # samples, at most, that a transform of a prompt's samples gets; of more, their quantiles


class RewardModel:
    """One replica of one reward model. A model that cannot be loaded is no failure of the replica, which Serve would
    start again and again: every call says why."""

    def __init__(
        self, name: str, path: str, template: str | None, budget: int, dtype: str, cpus: float, gpus: float
    ) -> None:
        set_threads(cpus)
        keep_memory()
        yield_to_learners()
        from rlhf.models.reward import RewardScorer

        device = "cuda" if gpus > 0 else "cpu"
        self._recorder = Recorder(f"reward {name}")
        self._one_at_a_time = threading.Lock()  # Serve calls from several threads; the CPUs given are for one
        self._fault: ValueError | None = None
        try:
            self._scorer = RewardScorer(name, path, template, budget, device, dtype)
        except ValueError as error:
            self._fault = error

    def fault(self) -> str | None:
        """Why the model cannot be used; None: it can."""
        return None if self._fault is None else str(self._fault)

    def notes(self) -> list[str]:
        """What to tell of how the model is called."""
        return self._ready().classifier.notes

    def _ready(self) -> RewardScorer:
        if self._fault is not None:
            raise self._fault
        return self._scorer

    def score(self, rollouts: list[ray.ObjectRef]) -> tuple[np.ndarray, tuple[Span, ...]]:
        """Rewards of the responses of one `Rollouts`, float32 [B], and what was done for them."""
        batch: Rollouts = ray.get(rollouts[0])
        with self._one_at_a_time:
            with self._recorder.span("score"):
                rewards = self._ready().score([batch.prompts[g] for g in batch.group], batch.texts)
            return rewards, self._recorder.take()

    def score_texts(self, contents: Sequence[Content], responses: Sequence[str]) -> np.ndarray:
        with self._one_at_a_time:
            return self._ready().score(contents, responses)


class RewardIngress:
    """Rewards rollouts by all models. A call lost with its replica is made again on another."""

    def __init__(self, models: Mapping[str, Any], baseline: Any) -> None:
        self._models, self._baseline = dict(models), baseline

    async def faults(self) -> list[str]:
        """Why models cannot be used; empty: they can."""
        found = await asyncio.gather(*(self._call(m, "fault") for m in self._models))
        return [fault for fault in found if fault is not None]

    async def notes(self) -> list[str]:
        """What to tell of how models are called."""
        found = await asyncio.gather(*(self._call(m, "notes") for m in self._models))
        return [note for notes in found for note in notes]

    async def raw(self, rollouts: list[ray.ObjectRef]) -> np.ndarray:
        """Raw rewards of one `Rollouts`, float32 [B, M]."""
        return (await self._scored(rollouts))[0]

    async def _scored(self, rollouts: list[ray.ObjectRef]) -> tuple[np.ndarray, tuple[Span, ...]]:
        found = await asyncio.gather(*(self._call(m, "score", rollouts) for m in self._models))
        return np.stack([rewards for rewards, _ in found], 1), tuple(s for _, spans in found for s in spans)

    async def canned(self, model: str, contents: Sequence[Content], responses: Sequence[str]) -> np.ndarray:
        """Rewards of given responses by one model, float32 [N]."""
        return await self._call(model, "score_texts", contents, responses)

    async def rewards(
        self,
        rollouts: list[ray.ObjectRef],
        utility: Utility,
        rules: Mapping[str, ReferenceRule],
        statistics: str,
    ) -> Rewards:
        """What the learner maximises, for one `Rollouts`, with references from frozen statistics (a file)."""
        assert tuple(self._models) == tuple(utility.weights) == tuple(rules)
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

    async def _call(self, model: str, method: str, *arguments: Any) -> Any:
        for attempt in range(ATTEMPTS):
            try:
                return await getattr(self._models[model], method).remote(*arguments)
            except RayActorError:
                if attempt + 1 == ATTEMPTS:
                    raise
                await asyncio.sleep(0.2 * 2**attempt)
        raise AssertionError


class RewardPool:
    """The running application, seen from the driver.

    Raises:
        ValueError: a model cannot be used; it says which and why. Nothing is then left of the application.
    """

    def __init__(
        self,
        models: Mapping[str, RewardModelConfig],
        paths: Mapping[str, str],
        resources: ResourcesConfig,
        budget: int,
        dtype: str,
        baseline: Any,
        recovery: RecoveryConfig,
    ) -> None:
        self._silence = recovery.silence
        logging.getLogger("ray.serve").setLevel(logging.ERROR)
        serve.start(proxy_location="Disabled", logging_config={"log_level": "ERROR"})
        self._name = f"rewards-{uuid.uuid4().hex[:8]}"
        app = serve.deployment(RewardIngress).options(
            name="ingress",
            max_ongoing_requests=64,
            ray_actor_options={"num_cpus": 0},
            **_checked(recovery),
        )
        deployments = {
            name: _deployment(name, resources, recovery).bind(
                name,
                paths[name],
                model.chat_template,
                budget,
                dtype,
                resources.reward.cpus,
                resources.reward.gpus,
            )
            for name, model in models.items()
        }
        try:
            target = serve.RunTarget(
                app.bind(deployments, baseline), self._name, None, logging_config={"log_level": "ERROR"}
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
            status = serve.status().applications[self._name]
            if status.status == "RUNNING":
                return
            states = "; ".join(f"{n}: {d.status} {d.message}".strip() for n, d in status.deployments.items())
            if status.status == "DEPLOY_FAILED" or time.monotonic() > end:
                raise Fault(f"the reward pool did not start ({states})")
            if time.monotonic() > tell:
                tell += PATIENCE
                log.warning("the reward pool is waited for: %s; %s", states, room())
            time.sleep(0.1)

    def _started(self, response: Any) -> ray.ObjectRef:
        """The reference of a call, once a replica has it."""
        try:
            return response._to_object_ref_sync(_timeout_s=self._silence)
        except TimeoutError:
            raise Fault(f"no replica of the reward pool took a call for {self._silence:g} s") from None

    def raw(self, rollouts: ray.ObjectRef) -> ray.ObjectRef:
        """Starts the scoring of rollouts; the reference of their raw rewards, float32 [B, M]."""
        return self._started(self._handle.raw.remote([rollouts]))

    def canned(self, model: str, contents: Sequence[Content], responses: Sequence[str]) -> ray.ObjectRef:
        return self._started(self._handle.canned.remote(model, contents, responses))

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
        with deadline(ENDS, f"the end of Serve's application {self._name}"):
            serve.delete(self._name)


def _checked(recovery: RecoveryConfig) -> dict[str, float]:
    """How often Serve asks replicas whether they are well; after three times without an answer it replaces one."""
    return {
        "health_check_period_s": min(10.0, recovery.silence / 6),
        "health_check_timeout_s": min(30.0, recovery.silence / 6),
    }


def _deployment(name: str, resources: ResourcesConfig, recovery: RecoveryConfig) -> Any:
    role = resources.reward
    options: dict[str, Any] = {
        "name": f"reward-{name}",
        "max_ongoing_requests": 4,
        **_checked(recovery),
        "ray_actor_options": {"num_cpus": role.cpus, "num_gpus": role.gpus},
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
    return serve.deployment(RewardModel).options(**options)
