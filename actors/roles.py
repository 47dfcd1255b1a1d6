"""The roles of a run: each starts when a stage first needs it, and serves all later stages and runs of a sweep."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

from actors.baseline import Baseline
from actors.generator_pool import GeneratorPool
from actors.learner import LearnerGroup
from actors.reward_pool import RewardPool
from actors.session import Session
from actors.stages.reward_models import RewardModels
from actors.stages.stage import Stages
from rlhf.config import RewardModelConfig


class Roles:
    """What a run's stages call."""

    def __init__(self, stages: Stages, session: Session, say: Callable[[str], None]) -> None:
        self.config, self.stages, self.session, self._say = stages.config, stages, session, say
        self._told = False

    def _role(self, name: str, parts: object, make: Callable[[], Any]) -> Any:
        self.session.start(self.config)
        cluster = self.session.cluster
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
        parts = (c.rollout, c.policy.chat_template, c.resources.generators, c.recovery.silence)
        return self._role("generators", parts, lambda: GeneratorPool(*parts))

    @property
    def baseline(self) -> Baseline:
        return self._role("baseline", (), Baseline)

    @property
    def rewards(self) -> RewardPool:
        return self._pool("rewards", self.config.reward_models, self.stages.of(RewardModels).paths)

    @property
    def evaluators(self) -> RewardPool:
        return self._pool("evaluators", self.config.evaluators, self.stages.of(RewardModels).evaluator_paths)

    def _pool(
        self, name: str, models: Mapping[str, RewardModelConfig], paths: Mapping[str, str]
    ) -> RewardPool:
        templates = {n: m.chat_template for n, m in models.items()}
        budget, resources = self.config.deepspeed.micro_batch_tokens * 2, self.config.resources
        parts = (paths, templates, resources.reward, resources.max_reward_replicas, budget, self.config.dtype)
        baseline = self.baseline.actor
        return self._role(
            name, parts, lambda: RewardPool(models, paths, resources, budget, self.config.dtype, baseline)
        )

    @contextmanager
    def start_beside(self, role: str) -> Iterator[None]:
        """Starts a role in the background while the block runs; it is there after the block."""
        background = ThreadPoolExecutor(1)
        future = background.submit(getattr, self, role)
        try:
            yield
            future.result()
        except Exception:
            wait([future])  # what it starts is then there to be ended
            raise
        finally:
            background.shutdown(wait=False)
