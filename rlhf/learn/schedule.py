"""Learning-rate schedule of supervised and Bradley-Terry training."""

from __future__ import annotations

import math

from rlhf.config import TrainingConfig


def learning_rate(step: int, config: TrainingConfig) -> float:
    """Linear warm-up, then a cosine to zero.

    >>> c = TrainingConfig(steps=100, batch_size=1, learning_rate=1.0, warmup_steps=10, weight_decay=0.0)
    >>> learning_rate(0, c), learning_rate(9, c), round(learning_rate(54, c), 3)
    (0.1, 1.0, 0.517)
    """
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2
