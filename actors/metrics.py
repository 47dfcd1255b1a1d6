"""Metrics and schedules of alignment, on RLlib's `MetricsLogger` and `Scheduler`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from actors.generator import Summary
from rlhf.config import AlignConfig
from rlhf.types import Rewards


class StepMetrics:
    """Turns what the roles report of a step into flat metrics (`rlhf/evaluate/record.py` documents the keys)."""

    def __init__(self, config: AlignConfig) -> None:
        from ray.rllib.utils.metrics.metrics_logger import MetricsLogger
        from ray.rllib.utils.schedules.scheduler import Scheduler

        self._logger = MetricsLogger(root=True)
        self._kl_coef = Scheduler(_schedule(config.kl_coef))
        self._learning_rate = Scheduler(_schedule(config.learning_rate))

    def schedules(self, step: int) -> tuple[float, float]:
        """KL coefficient and learning rate of a step."""
        return float(self._kl_coef.update(step)), float(self._learning_rate.update(step))

    def step(
        self, learner: dict[str, float], summaries: Sequence[Summary], rewards: Sequence[Rewards | None]
    ) -> dict[str, float]:
        """The metrics of one step: means over its responses, sums over its items for seconds."""
        flat = {k: v for k, v in learner.items() if not k.startswith("sum/")}
        tokens = learner["sum/tokens"]
        flat |= {
            "importance_weight": learner["sum/importance_weight"] / tokens,
            "importance_capped": learner["sum/importance_capped"] / tokens,
            "sampler_gap": learner["sum/sampler_gap"] / tokens,
            "surprise": learner["sum/surprise"] / tokens,
        }
        responses = sum(s.responses for s in summaries)
        flat |= {
            "response_tokens": sum(s.tokens for s in summaries) / responses,
            "finished": sum(s.finished for s in summaries) / responses,
            "seconds/generate": sum(s.seconds for s in summaries),
            "seconds/reward": sum(r.seconds for r in rewards if r is not None),
        }
        flat |= reward_metrics([r for r in rewards if r is not None])
        for key, value in flat.items():
            self._logger.log_value(key, value, window=1)
        return {key: float(self._logger.peek(key)) for key in sorted(flat)}


def reward_metrics(rewards: Sequence[Rewards]) -> dict[str, float]:
    """Means (and the raw rewards' deviation) over all responses of a step, by model."""
    import numpy as np

    flat: dict[str, Any] = {"utility/combined": np.concatenate([r.combined for r in rewards]).mean()}
    for column, model in enumerate(rewards[0].models):
        raw = np.concatenate([r.raw[:, column] for r in rewards])
        flat[f"reward/{model}/mean"], flat[f"reward/{model}/std"] = raw.mean(), raw.std()
        for key, name in (("reference", "r_ref"), ("utility", "utility"), ("p_good", "p_good")):
            flat[f"{name}/{model}"] = np.concatenate([getattr(r, key)[:, column] for r in rewards]).mean()
    return {key: float(value) for key, value in flat.items()}


def _schedule(value: Any) -> Any:
    """RLlib's form: a number, or [[step, value], ...] with at least two points."""
    if isinstance(value, list) and len(value) == 1:
        return value[0][1]
    return value
