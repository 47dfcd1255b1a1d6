"""What a reward is compared with: the base policy's own rewards of the same prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf.utility.prompt_references import PromptReferences

__all__ = ["PromptReferences", "Reference"]


@dataclass(frozen=True)
class Reference:
    """`PromptReferences` for each reward at hand, as tensors: float32, and broadcasting to the rewards' shape.

    `samples` has one more dimension at the end than the rewards, K, and is NaN-padded; a transform that does not
    ask for it gets K = 0.
    """

    r_ref: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor
    samples: torch.Tensor  # [..., K]
    population_mean: torch.Tensor
    population_std: torch.Tensor
