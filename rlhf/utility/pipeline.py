"""From raw rewards to what a learner maximises: reference, transform, combine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from rlhf.types import Rewards, Rollouts
from rlhf.utility.combine import COMBINATIONS
from rlhf.utility.reference import Reference
from rlhf.utility.transforms import TRANSFORMS, p_good

Statistics = Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
"""For each model r_ref, mean and standard deviation, float32 [G] each."""


@dataclass(frozen=True)
class Utility:
    """A configured transformation and combination of M reward models, in a fixed order."""

    transform: str
    combine: str
    weights: Mapping[str, float]  # by model name; their order is that of the columns

    def rewards(self, rollouts: Rollouts, raw: np.ndarray, statistics: Statistics) -> Rewards:
        """Rewards of rollouts from raw ones, float32 [B, M], and their prompts' statistics."""
        columns = [torch.from_numpy(np.stack([statistics[m][i] for m in self.weights], 1)) for i in range(3)]
        reference = Reference(*(column[torch.from_numpy(rollouts.group).long()] for column in columns))
        values = torch.from_numpy(np.array(raw, np.float32))
        utility = TRANSFORMS[self.transform](values, reference)
        combined = COMBINATIONS[self.combine](utility, torch.tensor(list(self.weights.values())))
        return Rewards(
            item=rollouts.item,
            version=rollouts.version,
            models=tuple(self.weights),
            raw=values.numpy(),
            reference=reference.r_ref.numpy(),
            utility=utility.numpy(),
            p_good=p_good(values, reference).numpy(),
            combined=combined.numpy(),
        )
