"""The baseline estimator: quantile statistics for each (prompt, reward model), from the base policy only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import ray

from rlhf.types import Rollouts
from rlhf.utility.statistics import BaselineStatistics, ReferenceRule


class BaselineEstimator:
    """`BaselineStatistics` in an actor. Updates are idempotent by item, so a lost one may be sent again."""

    def __init__(self, rules: dict[str, ReferenceRule]) -> None:
        self._rules = rules
        self._statistics = BaselineStatistics()

    def update(self, rollouts: Rollouts, raw: np.ndarray) -> None:
        """Takes in the base policy's rewards of one work item. raw: float32 [B, M], columns as in `rules`."""
        ids = rollouts.prompt_ids[rollouts.group]
        for column, model in enumerate(self._rules):
            self._statistics.add_samples(model, ids, raw[:, column], rollouts.item)

    def update_canned(self, model: str, prompt_ids: np.ndarray, rewards: np.ndarray, item: int) -> None:
        """Takes in rewards of canned responses. prompt_ids: uint64 [N], rewards: float32 [N]"""
        self._statistics.add_canned(model, prompt_ids, rewards, item)

    def references(self, prompt_ids: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """For each model r_ref, mean and standard deviation of the base policy's rewards, float32 [N] each."""
        return {m: self._statistics.reference(m, prompt_ids, rule) for m, rule in self._rules.items()}

    def samples(self, prompt_ids: np.ndarray) -> dict[str, list[np.ndarray]]:
        """For each model the base policy's rewards of each prompt."""
        return {m: [self._statistics.samples(m, int(i)) for i in prompt_ids] for m in self._rules}

    def freeze(self) -> str:
        """No more updates from now on. Returns the digest of the statistics."""
        self._statistics.freeze()
        return self._statistics.digest()

    def save(self, path: str) -> None:
        self._statistics.save(Path(path))

    def load(self, path: str) -> None:
        self._statistics = BaselineStatistics.load(Path(path))
        self._statistics.freeze()


def start_baseline(rules: dict[str, ReferenceRule]) -> Any:
    return ray.remote(BaselineEstimator).options(num_cpus=0).remote(rules)
