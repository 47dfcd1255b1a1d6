"""The roles of a run: each starts when a stage first needs it, and serves all later stages and runs of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from ray.serve.config import HTTPOptions

from actors.baseline import Baseline
from actors.fault import Fault
from actors.generator_pool import GeneratorPool
from actors.learner_group import LearnerGroup
from actors.reward_pool import RewardPool
from actors.session import Session
from actors.signals import hear_again
from actors.stages.reward_models import RewardModels
from actors.stages.stage import Stages
from rlhf.sources.source import Source, rewards_of

SLACK = 30.0  # seconds beyond its own limits that a role's start is waited for


class Roles:
    """What a run's stages call."""

    def __init__(self, stages: Stages, session: Session, say: Callable[[str], None]) -> None:
        self.config, self.stages, self.session, self._say = stages.config, stages, session, say
        self._told = False
        self.http: HTTPOptions | None = None  # where Serve listens, of `rlhf serve`

    def _role(self, name: str, parts: object, make: Callable[[], Any]) -> Any:
        self.session.start(self.config)
        cluster = self.session.cluster
        hear_again()
        if not self._told:
            self._told = True
            self._say(f"ray: {cluster.describe()}, started in {cluster.seconds:.1f} s")
        return self.session.role(name, repr(parts), make)

    @property
    def learner(self) -> LearnerGroup:
        c = self.config
        parts = (c.deepspeed, c.resources.learner, c.resources.master_port, c.recovery)
        return self._role("learner", parts, lambda: LearnerGroup(*parts))

    @property
    def generators(self) -> GeneratorPool:
        c = self.config
        parts = (c.rollout, c.policy.chat_template, c.resources.generators, c.recovery)
        return self._role("generators", parts, lambda: GeneratorPool(*parts))

    @property
    def baseline(self) -> Baseline:
        recovery = self.config.recovery
        return self._role("baseline", recovery, lambda: Baseline(recovery))

    @property
    def rewards(self) -> RewardPool:
        return self._pool("rewards", self.config.reward_models, self._paths("reward_models"))

    @property
    def evaluators(self) -> RewardPool:
        return self._pool("evaluators", self.config.evaluators, self._paths("evaluators"))

    def _paths(self, group: str) -> dict[str, str]:
        return self.stages.of(RewardModels).paths(group)

    def _pool(self, name: str, sources: Mapping[str, Source], paths: Mapping[str, str]) -> RewardPool:
        budget, resources = self.config.deepspeed.micro_batch_tokens * 2, self.config.resources
        baseline, data = self.baseline.actor, self.stages.data
        read = any(source.reads_columns for source in sources.values())
        units = {name: own.unit for name, own in rewards_of(sources).items()}
        parts = (
            {name: (source.kind, source.own) for name, source in sources.items()},
            units,
            paths,
            data.columns_fingerprint() if read else None,
            resources.reward,
            resources.max_reward_replicas,
            budget,
            self.config.dtype,
            baseline,  # another one is asked
            self.config.recovery.silence,
        )
        settings = (resources, budget, self.config.dtype, baseline, self.config.recovery, self.http)
        return self._role(name, parts, lambda: RewardPool(sources, paths, data.columns, *settings))

    @contextmanager
    def start_beside(self, role: str) -> Iterator[None]:
        """Starts a role in the background while the block runs; it is there after the block."""
        background = ThreadPoolExecutor(1)
        future = background.submit(getattr, self, role)
        seconds = self.config.recovery.startup + SLACK
        try:
            yield
            future.result(seconds)
        except TimeoutError:
            raise Fault(f"role {role} has not started after {seconds:g} s") from None
        except Exception:
            wait([future], SLACK)  # what it starts is then there to be ended
            raise
        finally:
            background.shutdown(wait=False)
