"""The running roles of a job. Each starts when a stage first needs it, and serves all later stages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from actors.artifacts import Artifacts
from actors.baseline import start_baseline
from actors.cluster import Cluster
from actors.generator import GeneratorPool
from actors.learner import LearnerGroup
from actors.reward_pool import RewardPool
from rlhf.config import Config


class Roles:
    def __init__(
        self,
        config: Config,
        artifacts: Artifacts,
        starting: Future[Cluster] | None,
        say: Callable[[str], None],
    ) -> None:
        self.config, self.artifacts, self._starting, self._say = config, artifacts, starting, say

    @cached_property
    def cluster(self) -> Cluster:
        cluster = Cluster(self.config) if self._starting is None else self._starting.result()
        self._say(f"ray: {cluster.describe()}, started in {cluster.seconds:.1f} s")
        return cluster

    @cached_property
    def learner(self) -> LearnerGroup:
        assert self.cluster
        resources = self.config.resources
        return LearnerGroup(self.config.deepspeed, resources.learner, resources.master_port)

    @cached_property
    def generators(self) -> GeneratorPool:
        assert self.cluster
        return GeneratorPool(
            self.config.rollout, self.config.policy.chat_template, self.config.resources.generators
        )

    @cached_property
    def estimator(self) -> Any:
        assert self.cluster
        return start_baseline(self.artifacts.rules)

    @cached_property
    def rewards(self) -> RewardPool:
        return RewardPool(self.config, self.artifacts.reward_paths, self.estimator, self.artifacts.utility)

    @contextmanager
    def starting(self, role: str) -> Iterator[None]:
        """Starts a role in the background while the block runs; it is there after the block."""
        with ThreadPoolExecutor(1) as background:
            future = background.submit(getattr, self, role)
            yield
            future.result()

    def stop(self) -> None:
        """Ends what the job started: on a cluster its application, else Ray itself."""
        if "cluster" in self.__dict__ or self._starting is not None:
            if "rewards" in self.__dict__ and not self.cluster.own:
                self.rewards.stop()
            self.cluster.stop()
