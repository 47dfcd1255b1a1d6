"""Transformations of rewards into utilities. Adding one is a function and a YAML in conf/utility.

All are computed and returned in float32: in bfloat16, sigmoid rounds to 1 above about 6.2, and its log to 0.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional

from rlhf.utility.reference import Reference

Transform = Callable[[torch.Tensor, Reference], torch.Tensor]
"""From raw rewards, any float type and shape, to utilities, float32 of the same shape."""

TRANSFORMS: dict[str, Transform] = {}

LOG_PROBABILITY = frozenset({"lsc"})
"""Transforms whose value is a log-probability, so that adding them up is a logical AND."""


def register(name: str) -> Callable[[Transform], Transform]:
    def add(function: Transform) -> Transform:
        TRANSFORMS[name] = function
        return function

    return add


@register("lsc")
def log_sigmoid_centred(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """u = log sigmoid(r - r_ref), in nats: the log-probability that the response is good (arXiv 2402.00742).

    Finite for every finite reward: about 0 far above r_ref, about r - r_ref far below. Its slope is
    sigmoid(r_ref - r).

    >>> r_ref = torch.tensor([0.0, 0.0, 0.0])
    >>> log_sigmoid_centred(torch.tensor([-1e4, 0.0, 1e4]), Reference(r_ref, r_ref, r_ref)).exp().tolist()
    [0.0, 0.5, 1.0]
    """
    return functional.logsigmoid(rewards.float() - reference.r_ref)


@register("centered_linear")
def centred_linear(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """u = r - r_ref, in the reward's units (nats of preference odds): LSC without its saturation.

    The baseline of arXiv 2402.00742 that shows what the log-sigmoid adds to centring.
    """
    return rewards.float() - reference.r_ref


@register("linear")
def linear(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """u = r, in the reward's units: the reward as it is, as in plain RLHF (arXiv 2203.02155)."""
    return rewards.float()


@register("zscore")
def zscore(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """u = (r - mean) / std over the base policy's rewards of the same prompt, in standard deviations.

    Brings models of different scales together before a linear sum; arXiv 2402.00742 compares with such sums.

    Raises:
        ValueError: a standard deviation is 0, unknown, or too small to divide by; it names the first such
            prompt by its index, the first one of its position among the rewards.
    """
    scores = (rewards.float() - reference.mean) / reference.std
    std = reference.std.broadcast_to(scores.shape)
    bad = (~(std > 0) | scores.isinf()).nonzero()
    if len(bad):
        position = tuple(bad[0].tolist())
        raise ValueError(
            f"zscore: the base policy's rewards of prompt index {position[0] if position else 0} (position "
            f"{position}) have the standard deviation {std[position].item():g}, but they must differ: raise "
            "baseline.samples, or use another utility.transform"
        )
    return scores


def p_good(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """p(G=1 | x, y) = sigmoid(r - r_ref), float32 (arXiv 2402.00742): does the response beat its reference?

    >>> r_ref = torch.tensor([1.0])
    >>> p_good(torch.tensor([1.0]), Reference(r_ref, r_ref, r_ref)).tolist()
    [0.5]
    """
    return torch.sigmoid(rewards.float() - reference.r_ref)
