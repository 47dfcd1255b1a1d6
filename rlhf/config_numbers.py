"""What every number of the configuration may be. Each field that holds numbers is in the table, or a test fails."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

from rlhf import config as c

WORD = 2**63  # NumPy, PyTorch and Ray count in 64 bits
SEEDS = 2**62  # the learners' seeds are derived by adding; PyTorch takes 64 bits


@dataclass(frozen=True)
class Range:
    """Finite numbers from `least` to `most`; open: without these two; whole: above 1 whole numbers only."""

    least: float = -math.inf
    most: float = math.inf
    open: bool = False
    whole: bool = False

    def refusal(self, value: float) -> str | None:
        """What a number must be that is not it.

        >>> Range(0, open=True).refusal(0), Range(0, 1).refusal(2), Range().refusal(math.nan), Range(0).refusal(3)
        ('must be above 0', 'must be within [0, 1]', 'must be a finite number', None)
        """
        if isinstance(value, int) and abs(value) >= WORD:
            return "must be below 2^63"
        if not math.isfinite(value):
            return "must be a finite number"
        if self.whole and value > 1 and value != int(value):
            return "must be a whole number, or at most 1: Ray places no other shares"
        if self.least < value < self.most or (not self.open and value in (self.least, self.most)):
            return None
        if math.isfinite(self.most):
            bounds = f"{self.least:g}, {self.most:g}"
            return f"must be within ({bounds})" if self.open else f"must be within [{bounds}]"
        return f"must be above {self.least:g}" if self.open else f"must be {self.least:g} or more"


ANY, POSITIVE, NOT_NEGATIVE = Range(), Range(0, open=True), Range(0)
BETWEEN, SHARE, SEED, PORT = Range(0, 1, open=True), Range(0, 1), Range(0, SEEDS), Range(1, 65535)
SCHEDULE = NOT_NEGATIVE  # of each value

RANGES: dict[type, dict[str, Range]] = {
    c.Config: {"seed": SEED},
    c.MicrocosmConfig: {
        "demonstrations": POSITIVE,
        "pairs": POSITIVE,
        "eval_share": BETWEEN,
        "seed": SEED,
    },
    c.DataConfig: {"eval_size": POSITIVE, "train_size": POSITIVE, "tolerated_share": SHARE},
    c.TrainingConfig: {
        "steps": NOT_NEGATIVE,
        "batch_size": POSITIVE,
        "learning_rate": NOT_NEGATIVE,
        "warmup_steps": NOT_NEGATIVE,
        "weight_decay": NOT_NEGATIVE,
    },
    c.ArchitectureConfig: {
        "hidden_size": POSITIVE,
        "intermediate_size": POSITIVE,
        "layers": POSITIVE,
        "heads": POSITIVE,
        "max_positions": POSITIVE,
        "initializer_range": POSITIVE,
    },
    c.LoraConfig: {"rank": POSITIVE, "alpha": POSITIVE},
    c.UtilityConfig: {"parameters": ANY},
    c.BaselineConfig: {
        "samples": POSITIVE,
        "level": BETWEEN,
        "tolerance": POSITIVE,
        "max_samples": POSITIVE,
        "exact": POSITIVE,
    },
    c.CriticConfig: {"learning_rate": SCHEDULE, "trace": SHARE, "clip": POSITIVE},
    c.AlgorithmConfig: {
        "epochs": POSITIVE,
        "minibatches": POSITIVE,
        "clip_low": POSITIVE,
        "clip_high": POSITIVE,
        "importance_cap": POSITIVE,
        "entropy_coef": NOT_NEGATIVE,
        "kl_target": POSITIVE,
        "kl_horizon": POSITIVE,
    },
    c.RolloutConfig: {
        "max_new_tokens": POSITIVE,
        "temperature": POSITIVE,
        "slots": POSITIVE,
        "prompts_per_item": POSITIVE,
    },
    c.AlignConfig: {
        "steps": POSITIVE,
        "prompts_per_step": POSITIVE,
        "samples_per_prompt": POSITIVE,
        "kl_coef": SCHEDULE,
        "learning_rate": SCHEDULE,
        "weight_decay": NOT_NEGATIVE,
        "max_grad_norm": NOT_NEGATIVE,  # 0: gradients are not clipped
        "staleness": NOT_NEGATIVE,
        "max_skipped": NOT_NEGATIVE,
    },
    c.CheckpointConfig: {"every": POSITIVE, "minutes": POSITIVE, "keep": POSITIVE},
    c.RecoveryConfig: {
        "restarts": NOT_NEGATIVE,
        "backoff": NOT_NEGATIVE,
        "silence": POSITIVE,
        "startup": POSITIVE,
        "grace": NOT_NEGATIVE,
    },
    c.EvaluateConfig: {
        "samples": POSITIVE,
        "judge_samples": POSITIVE,
        "level": BETWEEN,
        "best_of": Range(2),
        "every": POSITIVE,
        "during_samples": POSITIVE,
        "max_kl": POSITIVE,
        "patience": POSITIVE,
    },
    c.DeepSpeedConfig: {"zero_stage": Range(0, 3), "micro_batch_tokens": POSITIVE},
    c.RoleConfig: {"count": POSITIVE, "cpus": Range(0, whole=True), "gpus": Range(0, whole=True)},
    c.ResourcesConfig: {"max_reward_replicas": POSITIVE, "master_port": PORT, "dashboard_port": PORT},
    c.LoggingConfig: {"patience": POSITIVE},
    c.ServeConfig: {
        "port": PORT,
        "max_body": POSITIVE,
        "max_responses": POSITIVE,
        "timeout": POSITIVE,
        "batch": POSITIVE,
        "drain": NOT_NEGATIVE,
    },
    c.PlanConfig: {"response_tokens": POSITIVE},
    c.StudyConfig: {"kl_coefs": NOT_NEGATIVE},
}


def check_ranges(config: c.Config) -> None:
    """
    Raises:
        ValueError: a number is out of its range; it names the key.
    """
    check_numbers("", config)


def check_numbers(key: str, part: Any) -> None:
    """As `check_ranges`, of a part of a configuration; `key`: what its keys begin with."""
    for name, value, allowed in _numbers(key, part):
        refusal = allowed.refusal(value)
        if refusal is not None:
            raise ValueError(f"{name}={value} {refusal}")


def _numbers(key: str, config: Any) -> Iterator[tuple[str, float, Range]]:
    """Every number with its key and its range."""
    ranges = RANGES.get(type(config)) or getattr(config, "ranges", {})  # a source of rewards has its own
    for field in fields(config):
        name, value = f"{key}{field.name}", getattr(config, field.name)
        if field.name in ranges:
            yield from ((k, v, ranges[field.name]) for k, v in _leaves(name, value))
        elif is_dataclass(value):
            yield from _numbers(f"{name}.", value)
        elif isinstance(value, dict):
            for entry, part in value.items():
                if is_dataclass(part):
                    yield from _numbers(f"{name}.{entry}.", part)


def _leaves(key: str, value: Any) -> Iterator[tuple[str, float]]:
    """The numbers of a field: itself, those of a list or a dictionary, or the values of a schedule."""
    if isinstance(value, dict):
        for entry, part in value.items():
            yield from _leaves(f"{key}.{entry}", part)
    elif isinstance(value, list):
        for part in value:
            yield from _leaves(key, part[-1] if isinstance(part, list) and part else part)
    elif isinstance(value, int | float):
        yield key, value
