"""Transformations of rewards into utilities. Adding one is a function, a line in `kinds.py` and a YAML in conf/utility.

All are computed and returned in float32: in bfloat16, sigmoid rounds to 1 above about 6.2, and its log to 0.
Parameters are keyword arguments without defaults: the values are in the YAML.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from rlhf.utility.kinds import LOG_PROBABILITY, PROBABILITY, TRANSFORM_KINDS
from rlhf.utility.reference import Reference

Transform = Callable[..., torch.Tensor]
"""f(rewards, reference, **parameters): raw rewards, any float type and shape, to utilities, float32 of that shape."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""(log P, log(1 - P)), float32 of one shape, in nats: both, since neither can be had from the other in float32."""

TRANSFORMS: dict[str, Transform] = {}

_LOG_HALF = math.log(0.5)


class UnusableReference(ValueError):
    """The base policy's rewards of a prompt do not allow the transform. `position` is that of the first such reward."""

    def __init__(self, reason: str, position: tuple[int, ...]) -> None:
        super().__init__(reason)
        self.position = position


def register(name: str) -> Callable[[Transform], Transform]:
    """Adds a transform, which must be in the catalogue and new."""
    assert name in TRANSFORM_KINDS, f"{name} is not in rlhf.utility.kinds.TRANSFORM_KINDS"
    assert name not in TRANSFORMS, f"{name} is registered twice"

    def add(function: Transform) -> Transform:
        TRANSFORMS[name] = function
        return function

    return add


@register("linear")
def linear(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """u = r, in the reward's units: the reward as it is, as in plain RLHF (arXiv 2203.02155). Slope 1."""
    return rewards.float()


@register("centered_linear")
def centred_linear(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """u = r - r_ref, in the reward's units (nats of preference odds): LSC without its saturation. Slope 1.

    The baseline of arXiv 2402.00742 that shows what the log-sigmoid adds to centring.
    """
    return rewards.float() - reference.r_ref


@register("lsc")
def log_sigmoid_centred(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """u = log sigmoid(r - r_ref), in nats: the log-probability that the response is good (arXiv 2402.00742).

    Finite for every finite reward: about 0 far above r_ref, about r - r_ref far below. Slope sigmoid(r_ref - r).
    """
    return functional.logsigmoid(rewards.float() - reference.r_ref)


@register("log_sigmoid")
def log_sigmoid(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """u = log sigmoid(r), in nats: LSC without centring, a baseline of arXiv 2402.00742. Slope sigmoid(-r).

    It takes a reward of 0 for the reference of every prompt, which a Bradley-Terry model does not promise.
    """
    return functional.logsigmoid(rewards.float())


@register("sigmoid")
def sigmoid_centred(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """u = p = sigmoid(r - r_ref): the probability that the response is good. Slope p (1 - p).

    PAR (arXiv 2502.18770) with r_ref as its one reference. Flat far below r_ref too, where LSC is not.
    """
    return p_good(rewards, reference)


@register("par")
def preference_as_reward(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """u = mean_j sigmoid(r - r_j) over the base policy's rewards r_j of the prompt (arXiv 2502.18770).

    The probability that the response is preferred to a random one of the base policy's. Slope mean_j p_j (1 - p_j).

    Raises:
        UnusableReference: a prompt has no base-policy rewards.
    """
    _check_samples("par", rewards, reference)
    return _sample_mean(torch.sigmoid(_differences(rewards, reference)), reference)


@register("quantile_rank")
def quantile_rank(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """u = share of the base policy's rewards of the prompt that are below r, equal ones counting half; within [0, 1].

    The quantile reward of arXiv 2507.08068, whose empirical distribution function counts equal ones in full. The
    slope is 0 wherever there is one: good for policy gradients, which need values only.

    Raises:
        UnusableReference: a prompt has no base-policy rewards.
    """
    _check_samples("quantile_rank", rewards, reference)
    return _sample_mean((_differences(rewards, reference).detach().sign() + 1) / 2, reference)


@register("zscore")
def zscore(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """u = (r - mean) / std over the base policy's rewards of the prompt, in standard deviations. Slope 1 / std.

    Brings models of different scales together before a linear sum; arXiv 2402.00742 compares with such sums.

    Raises:
        UnusableReference: a standard deviation is 0, unknown, or too small to divide by.
    """
    return _scaled("zscore", "prompt's standard deviation", rewards, reference.mean, reference.std)


@register("zscore_global")
def zscore_global(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """u = (r - mean) / std over the base policy's rewards of all prompts, in standard deviations. Slope 1 / std.

    Brings models to one scale, and leaves each prompt's offset as it is.

    Raises:
        UnusableReference: the standard deviation is 0, unknown, or too small to divide by.
    """
    mean, std = reference.population_mean, reference.population_std
    return _scaled("zscore_global", "population's standard deviation", rewards, mean, std)


@register("min_max")
def min_max(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """u = (r - low) / (high - low) over the base policy's rewards of the prompt. Slope 1 / (high - low).

    0 at the least of them and 1 at the greatest; not clamped, so a reward outside their range lies outside [0, 1].

    Raises:
        UnusableReference: low and high are equal, unknown, or too near to divide by their difference.
    """
    return _scaled("min_max", "prompt's range", rewards, reference.low, reference.high - reference.low)


@register("clip")
def clip_centred(rewards: torch.Tensor, reference: Reference, *, low: float, high: float) -> torch.Tensor:
    """u = min(max(r - r_ref, low), high), in the reward's units. Slope 1 from low to high, 0 outside.

    The hard clip that RLHF systems put on rewards, here of the centred reward.
    """
    return (rewards.float() - reference.r_ref).clamp(low, high)


@register("tanh")
def tanh_centred(rewards: torch.Tensor, reference: Reference, *, scale: float) -> torch.Tensor:
    """u = scale * tanh((r - r_ref) / scale), in the reward's units, within (-scale, scale): a smooth clip.

    Slope 1 - (u / scale)^2: 1 at r_ref, 0 far from it on either side.
    """
    return scale * torch.tanh((rewards.float() - reference.r_ref) / scale)


@register("inada")
def inada(rewards: torch.Tensor, reference: Reference, *, scale: float, aversion: float) -> torch.Tensor:
    """A concave utility of unbounded slope below and vanishing slope above, in the reward's units.

    With x = (r - r_ref) / scale and a = aversion,
        u = scale * log(1 + x) if x > 0, else -scale * ((1 - x)^(1 + a) - 1) / (1 + a).
    Slope 1 / (1 + x) above and (1 - x)^a below: 1 at r_ref, where it is continuous (for a = 1 the curvature too).

    From arXiv 2501.06248: a utility of constant relative risk aversion for each reward before they are added, whose
    slope grows without bound for bad rewards and vanishes for good ones, as Inada's conditions ask; and a threshold
    between the two. Ours: the formula. Rewards are not wealth, which has a least value where the slope is infinite:
    here the least value is minus infinity. Above r_ref it is the utility of risk aversion 1 of the wealth 1 + x; below,
    a power of the shortfall 1 - x, whose slope has the elasticity a. Finite in float32 for |x| up to 1e7 at a = 4,
    and up to 1e19 at a = 1.
    """
    x = (rewards.float() - reference.r_ref) / scale
    above = torch.log1p(x.clamp(min=0))
    below = -torch.expm1((1 + aversion) * torch.log1p(-x.clamp(max=0))) / (1 + aversion)
    return scale * torch.where(x > 0, above, below)


assert TRANSFORMS.keys() == TRANSFORM_KINDS.keys(), TRANSFORMS.keys() ^ TRANSFORM_KINDS.keys()


def p_good(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """p(G=1 | x, y) = sigmoid(r - r_ref), float32 (arXiv 2402.00742): does the response beat its reference?"""
    return torch.sigmoid(rewards.float() - reference.r_ref)


def log_probabilities(name: str, rewards: torch.Tensor, reference: Reference) -> Pair:
    """(log p, log(1 - p)) of a transform that is a probability p or its log, float32 of the rewards' shape, in nats.

    Each has its own float32 precision (relative, however near 0) and slope, for |r - r_ref| up to 1e4 and more.
    `quantile_rank` reaches p = 0 and p = 1, so minus infinity.

    Raises:
        UnusableReference: the transform needs base-policy rewards, and a prompt has none.
    """
    assert TRANSFORM_KINDS[name].kind in (PROBABILITY, LOG_PROBABILITY), name
    if name == "par":
        return _log_par(rewards, reference)
    if name == "quantile_rank":
        rank = quantile_rank(rewards, reference)
        return rank.log(), torch.log1p(-rank)
    x = rewards.float() if name == "log_sigmoid" else rewards.float() - reference.r_ref
    return functional.logsigmoid(x), functional.logsigmoid(-x)


def log_complement(log_p: torch.Tensor, rough: torch.Tensor) -> torch.Tensor:
    """log(1 - exp(log_p)), in nats: where P is below 1/2 from `log_p`, elsewhere `rough`, which is precise there.

    The former has the relative precision that a log near 0 needs; the latter is the same value, found otherwise.
    """
    precise = torch.log1p(-log_p.clamp(max=_LOG_HALF).exp())
    return torch.where(log_p < _LOG_HALF, precise, rough)


def _log_par(rewards: torch.Tensor, reference: Reference) -> Pair:
    """Of P = mean_j sigmoid(r - r_j), and so 1 - P = mean_j sigmoid(r_j - r)."""
    _check_samples("par", rewards, reference)
    difference, missing = _differences(rewards, reference), reference.samples.isnan()
    rough = [
        _log_mean_exp(functional.logsigmoid(x).masked_fill(missing, -math.inf), (~missing).sum(-1))
        for x in (difference, -difference)
    ]
    return log_complement(rough[1], rough[0]), log_complement(rough[0], rough[1])


def _log_mean_exp(values: torch.Tensor, count: torch.Tensor) -> torch.Tensor:
    """log(sum_j exp(v_j) / count) along the last dimension; the greatest is taken out, so that the slopes add to 1."""
    greatest = values.detach().amax(-1, keepdim=True)
    return greatest.squeeze(-1) + (torch.logsumexp(values - greatest, -1) - count.log())


def _differences(rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """r - r_j for each base-policy reward r_j, float32 [..., K]; r where r_j is padding."""
    return rewards.float().unsqueeze(-1) - reference.samples.nan_to_num(nan=0.0)


def _sample_mean(values: torch.Tensor, reference: Reference) -> torch.Tensor:
    """Mean of values, float32 [..., K], over those that are no padding."""
    missing = reference.samples.isnan()
    return values.masked_fill(missing, 0.0).sum(-1) / (~missing).sum(-1)


def _check_samples(name: str, rewards: torch.Tensor, reference: Reference) -> None:
    without = reference.samples.isnan().all(-1).broadcast_to(rewards.shape)
    if len(bad := without.nonzero()):
        raise UnusableReference(
            f"{name} compares with the base policy's rewards of the prompt, and there are none: sample some "
            "(the baseline stage), or use another utility.transform",
            tuple(bad[0].tolist()),
        )


def _scaled(
    name: str, what: str, rewards: torch.Tensor, zero: torch.Tensor, unit: torch.Tensor
) -> torch.Tensor:
    """(r - zero) / unit, refusing a unit that is not above 0 or too small to divide by."""
    scores = (rewards.float() - zero) / unit
    bad = (~(unit > 0) | scores.isinf()).broadcast_to(scores.shape).nonzero()
    if len(bad):
        position = tuple(bad[0].tolist())
        raise UnusableReference(
            f"{name} divides by the {what} of the base policy's rewards, which is "
            f"{unit.broadcast_to(scores.shape)[position].item():g}: they must be known and differ; raise "
            "baseline.samples, or use another utility.transform",
            position,
        )
    return scores
