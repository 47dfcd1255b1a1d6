"""Combinations of several models' utilities into the one that is maximised. Adding one is one function."""

from __future__ import annotations

from collections.abc import Callable

import torch

Combination = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""From utilities, float32 [..., M], and weights, [M], to the combined utility, float32 [...]."""

COMBINATIONS: dict[str, Combination] = {}


def register(name: str) -> Callable[[Combination], Combination]:
    def add(function: Combination) -> Combination:
        COMBINATIONS[name] = function
        return function

    return add


@register("and")
def logical_and(utilities: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """log prod_i p_i = sum_i u_i for log-probabilities u_i: good in every property (arXiv 2402.00742).

    >>> logical_and(torch.tensor([0.5, 0.5]).log(), torch.ones(2)).exp().item()
    0.25
    """
    if not bool((weights == 1).all()):
        raise ValueError(
            f"utility.combine=and takes weights of 1, not {weights.tolist()}: a weighted sum of "
            "log-probabilities is not a logical AND; use utility.combine=weighted_sum"
        )
    return weighted_sum(utilities, weights)


@register("weighted_sum")
def weighted_sum(utilities: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """sum_i w_i u_i, in the units of the weighted utilities.

    >>> weighted_sum(torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([1.0, 0.5])).tolist()
    [2.0, 5.0]
    """
    assert utilities.shape[-1:] == weights.shape, (utilities.shape, weights.shape)
    return (utilities.float() * weights.to(utilities.device, torch.float32)).sum(-1)
