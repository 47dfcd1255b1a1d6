"""Advantages of groups of responses to the same prompt. Adding one is a function and a YAML in conf/algorithm."""

from __future__ import annotations

from collections.abc import Callable

import torch

Advantage = Callable[[torch.Tensor], torch.Tensor]
"""From the rewards of groups, float32 [G, k], to their advantages, the same shape."""

ADVANTAGES: dict[str, Advantage] = {}


def register(name: str) -> Callable[[Advantage], Advantage]:
    def add(function: Advantage) -> Advantage:
        ADVANTAGES[name] = function
        return function

    return add


@register("rloo")
def leave_one_out(rewards: torch.Tensor) -> torch.Tensor:
    """A_i = R_i - mean of R_j over j != i (RLOO, arXiv 2402.14740). Not divided by the standard deviation: that
    would rescale each prompt's utilities and undo part of the transformation.

    >>> leave_one_out(torch.tensor([[1.0, 2.0, 6.0]])).tolist()
    [[-3.0, -1.5, 4.5]]
    """
    k = rewards.shape[-1]
    return (rewards - rewards.mean(-1, keepdim=True)) * (k / (k - 1))
