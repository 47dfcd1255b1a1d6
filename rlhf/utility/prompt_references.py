"""What the base policy's rewards of a prompt say, as numpy arrays: the role that owns them needs no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class PromptReferences:
    """Of one reward model, what its base-policy rewards say of G prompts. Rewards' units throughout."""

    r_ref: np.ndarray  # float32 [G]: the reward a response must reach to be "good"
    standard_error: (
        np.ndarray
    )  # float32 [G]: of r_ref; 0 where it is given (a constant, a column), NaN if unknown
    mean: np.ndarray  # float32 [G]; NaN without samples, as the three below
    std: np.ndarray  # float32 [G], unbiased; 0 for a single sample
    low: np.ndarray  # float32 [G], the least sample
    high: np.ndarray  # float32 [G], the greatest
    samples: np.ndarray  # float32 [G, K], ascending, NaN-padded; K = 0 unless asked for
    population_mean: float  # over the samples of all prompts of the statistics, not only these G
    population_std: float
