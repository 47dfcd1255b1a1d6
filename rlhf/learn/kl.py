"""Estimators of KL(policy || reference) from the tokens that the policy sampled, and control of its coefficient."""

from __future__ import annotations

from collections.abc import Callable

import torch

Estimator = Callable[[torch.Tensor], torch.Tensor]
"""From log policy - log reference of sampled tokens, nats, to a KL of each, the same shape."""


def k1(log_ratio: torch.Tensor) -> torch.Tensor:
    """log ratio: unbiased; the one whose sum over a response, in the reward, has the closed form as its optimum.

    In the loss it has no effect: the expectation of its gradient is 0.
    """
    return log_ratio


def k2(log_ratio: torch.Tensor) -> torch.Tensor:
    """Half the square of the log ratio: biased, but in the loss its gradient is that of the token's KL."""
    return log_ratio**2 / 2


def k3(log_ratio: torch.Tensor) -> torch.Tensor:
    """1 / ratio - 1 + log ratio: unbiased, never negative (http://joschu.net/blog/kl-approx.html); GRPO's choice.

    In the loss its gradient is that of the token's forward KL, KL(reference || policy).
    """
    return torch.expm1(-log_ratio) + log_ratio


ESTIMATORS: dict[str, Estimator] = {"k1": k1, "k2": k2, "k3": k3}


class AdaptiveKL:
    """Multiplies the KL coefficient so that the KL approaches a target (arXiv 1909.08593, section 2.2).

    >>> control = AdaptiveKL(target=2.0, horizon=100)
    >>> control.update(kl=4.0, responses=10)
    >>> control.factor  # the error is cut at 20 %
    1.02

    A step of more responses than the horizon counts as one of the horizon: the factor stays above 0.
    """

    def __init__(self, target: float, horizon: float) -> None:
        self.target, self.horizon, self.factor = target, horizon, 1.0

    def update(self, kl: float, responses: int) -> None:
        """Takes the measured KL of a step, nats a response."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.factor *= 1 + error * min(1.0, responses / self.horizon)
