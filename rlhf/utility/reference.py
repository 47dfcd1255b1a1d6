"""What a reward is compared with: the base policy's own rewards of the same prompt."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Reference:
    """Statistics of the base policy's rewards, for each reward at hand.

    Each is float32, in the rewards' units, and of a shape that broadcasts to the rewards'.
    """

    r_ref: torch.Tensor  # the reward a response must reach to be "good"
    mean: torch.Tensor  # of the base policy's rewards of the prompt
    std: torch.Tensor  # likewise, the unbiased standard deviation
