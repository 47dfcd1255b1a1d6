"""Rewards of every scale in the unit that a transform takes. float32, as the transforms."""

from __future__ import annotations

from dataclasses import replace

import torch

from rlhf.utility.reference import Reference
from rlhf.utility.scales import BRADLEY_TERRY, LOG_ODDS, PROBABILITY, VERDICT, Scale


def in_unit(
    scale: Scale, of_log_odds: bool, rewards: torch.Tensor, reference: Reference
) -> tuple[torch.Tensor, Reference]:
    """Rewards and what they are compared with, for a transform.

    Bradley-Terry rewards are divided by their temperature. For a transform of log-odds, probabilities and verdicts
    become theirs, log P(good) - log(1 - P(good)); the log-odds are then compared with 0. Other transforms take the
    numbers as they are.
    """
    if scale.kind == BRADLEY_TERRY and scale.temperature != 1:
        return rewards / scale.temperature, _divided(reference, scale.temperature)
    if of_log_odds and scale.kind in (PROBABILITY, VERDICT):
        return log_odds(rewards, scale.error_rate), replace(
            reference,
            r_ref=log_odds(reference.r_ref, scale.error_rate),
            samples=log_odds(reference.samples, scale.error_rate),
        )
    return rewards, reference


def log_odds(share: torch.Tensor, error_rate: float) -> torch.Tensor:
    """log P - log(1 - P) with P = e + (1 - 2 e) share, in nats: the log-odds of being good, of a probability or verdict
    `share` that is wrong with the probability e.

    >>> [round(x, 4) for x in log_odds(torch.tensor([0.0, 0.5, 1.0]), 0.1).tolist()]
    [-2.1972, 0.0, 2.1972]
    """
    rest = 1 - 2 * error_rate
    return (error_rate + rest * share).log() - (error_rate + rest * (1 - share)).log()


def p_good(scale: Scale, rewards: torch.Tensor, reference: Reference) -> torch.Tensor:
    """P(good), float32 of the rewards' shape; NaN for a scale that has none."""
    if not scale.has_probability:
        return torch.full_like(rewards, torch.nan)
    if scale.kind in (PROBABILITY, VERDICT):
        return scale.error_rate + (1 - 2 * scale.error_rate) * rewards.float()
    if scale.kind == LOG_ODDS:
        return torch.sigmoid(rewards.float())
    return torch.sigmoid((rewards.float() - reference.r_ref) / scale.temperature)


def _divided(reference: Reference, by: float) -> Reference:
    return Reference(**{name: value / by for name, value in vars(reference).items()})
