"""Metrics and schedules of alignment, on RLlib's `MetricsLogger` and `Scheduler`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from actors.generator import Summary
from actors.learner import Coefficients
from rlhf.config import AlgorithmConfig, AlignConfig
from rlhf.types import Rewards


class StepMetrics:
    """Turns what the roles report of a step into flat metrics (`rlhf/evaluate/record.py` documents the keys)."""

    def __init__(self, config: AlignConfig, algorithm: AlgorithmConfig, inspect: str = "") -> None:
        """inspect: folder for a batch by which the run ends."""
        from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
        from ray.rllib.utils.schedules.scheduler import Scheduler

        from rlhf.learn.kl import AdaptiveKL

        self._logger = MetricsLogger(root=True)
        critic = algorithm.critic.learning_rate if algorithm.critic is not None else 0.0
        values = (config.kl_coef, config.learning_rate, critic)
        self._schedules = [Scheduler(_schedule(value)) for value in values]
        target = algorithm.kl_target
        self._inspect, self._most = inspect, config.max_skipped
        self._skipped = 0  # steps in a row that were left out
        self._control = None if target is None else AdaptiveKL(target, algorithm.kl_horizon)

    def state(self) -> dict[str, Any]:
        """What changes from step to step, as JSON can hold it."""
        factor = {} if self._control is None else {"kl_factor": self._control.factor}
        return {"skipped": self._skipped, **factor}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._skipped = state["skipped"]
        if self._control is not None:
            self._control.factor = state["kl_factor"]

    def coefficients(self, step: int) -> Coefficients:
        kl, learning_rate, critic = (float(schedule.update(step)) for schedule in self._schedules)
        factor = self._control.factor if self._control else 1.0
        strict = self._skipped >= self._most
        return Coefficients(kl * factor, learning_rate, critic, step, strict, self._inspect)

    def step(
        self, learner: dict[str, float], summaries: Sequence[Summary], rewards: Sequence[Rewards | None]
    ) -> dict[str, float]:
        """The metrics of one step: means over its responses, sums over its items for seconds."""
        flat = {k: v for k, v in learner.items() if not k.startswith("sum/")} | _ratios(learner)
        responses = sum(s.responses for s in summaries)
        flat |= {
            "response_tokens": sum(s.tokens for s in summaries) / responses,
            "finished": sum(s.finished for s in summaries) / responses,
            "seconds/generate": sum(s.seconds for s in summaries),
            "seconds/reward": sum(r.seconds for r in rewards if r is not None),
        }
        flat |= reward_metrics([r for r in rewards if r is not None])
        self._skipped = self._skipped + 1 if flat["skipped"] else 0
        if self._control is not None and "kl" in flat:
            self._control.update(flat["kl"], responses)
        flat = {key: value for key, value in flat.items() if math.isfinite(value)}
        for key, value in flat.items():
            self._logger.log_value(key, value, window=1)
        return {key: float(self._logger.peek(key)) for key in sorted(flat)}


def _ratios(learner: dict[str, float]) -> dict[str, float]:
    """Means over tokens from the learner's sums."""
    flat = {
        key: learner[f"sum/{key}"] / learner["sum/trained_tokens"]
        for key in ("importance_weight", "importance_capped", "sampler_gap", "clipped", "entropy")
        if f"sum/{key}" in learner
    }
    if "sum/surprise" in learner:
        flat["surprise"] = learner["sum/surprise"] / learner["sum/tokens"]
    if {"sum/returns", "sum/returns_squared", "sum/residuals_squared"} <= learner.keys():
        tokens = learner["sum/tokens"]
        variance = learner["sum/returns_squared"] / tokens - (learner["sum/returns"] / tokens) ** 2
        residual = learner["sum/residuals_squared"] / tokens
        flat["critic/explained_variance"] = 1 - residual / variance if variance > 0 else 0.0
    return flat


_COLUMNS = (("reference", "r_ref"), ("utility", "utility"), ("p_good", "p_good"), ("slope", "slope"))


def reward_metrics(rewards: Sequence[Rewards]) -> dict[str, float]:
    """Means (and the raw rewards' deviation) over all responses of a step that a reward applies to, by reward; absent:
    the share of the others."""
    import numpy as np

    flat: dict[str, Any] = {"utility/combined": np.concatenate([r.combined for r in rewards]).mean()}
    for column, model in enumerate(rewards[0].models):
        raw = np.concatenate([r.raw[:, column] for r in rewards])
        applies = ~np.isnan(raw)
        if not applies.all():
            flat[f"absent/{model}"] = 1 - applies.mean()
        if not applies.any():
            continue
        flat[f"reward/{model}/mean"], flat[f"reward/{model}/std"] = raw[applies].mean(), raw[applies].std()
        for key, name in _COLUMNS:
            values = np.concatenate([getattr(r, key)[:, column] for r in rewards])[applies]
            flat[f"{name}/{model}"] = values.mean()
    return {key: float(value) for key, value in flat.items() if np.isfinite(value)}


def _schedule(value: Any) -> Any:
    """RLlib's form: a number, or [[step, value], ...] with at least two points."""
    if isinstance(value, list) and len(value) == 1:
        return value[0][1]
    return value
