"""The loss of a policy on the tokens of a batch: importance weights, clipping, KL and entropy, and their mean."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rlhf.config import AlgorithmConfig
from rlhf.learn.kl import ESTIMATORS

AGGREGATES = ("response_sum", "token_mean", "response_mean", "length_limit")


@dataclass(frozen=True)
class Tokens:
    """What the loss knows of N sampled tokens beside the policy that is trained; float32 [N] each."""

    behaviour: torch.Tensor  # log-probability under the policy that sampled
    old: torch.Tensor | None  # under the policy before the batch's first step; None: this is that step
    reference: torch.Tensor | None  # under the reference policy; None: no KL in the loss
    advantage: torch.Tensor
    share: torch.Tensor  # of each token in the loss

    def to(self, device: torch.device) -> Tokens:
        return Tokens(
            self.behaviour.to(device),
            None if self.old is None else self.old.to(device),
            None if self.reference is None else self.reference.to(device),
            self.advantage.to(device),
            self.share.to(device),
        )


def policy_loss(
    logprobs: torch.Tensor,
    entropy: torch.Tensor | None,
    tokens: Tokens,
    settings: AlgorithmConfig,
    kl_coef: float,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The loss and what to log of it.

    loss = -sum_n share_n [ w_n min(rho_n A_n, clip(rho_n, 1 - clip_low, 1 + clip_high) A_n)
                            - kl_coef KL_n + entropy_coef H_n ]

    rho = policy / old policy (PPO, arXiv 1707.06347; its two limits may differ, arXiv 2503.14476), where the old
    policy is the one before the batch's first step; w = min(old / behaviour, importance_cap), without gradient,
    corrects for tokens that an older policy sampled, and for the sampler's rounding. KL_n is there with
    algorithm.kl=loss only.

    Args:
        logprobs: float32 [N], with gradient.
        entropy: float32 [N], nats, with gradient; needed when entropy_coef is not 0.
    """
    old = logprobs.detach() if tokens.old is None else tokens.old
    log_weight = old - tokens.behaviour
    weight = log_weight.exp()
    ratio = (logprobs - old).exp()
    gain = ratio * tokens.advantage
    clipped = torch.zeros_like(gain, dtype=torch.bool)
    if settings.clip_low is not None or settings.clip_high is not None:
        low = -torch.inf if settings.clip_low is None else 1 - settings.clip_low
        high = torch.inf if settings.clip_high is None else 1 + settings.clip_high
        limited = ratio.clamp(low, high) * tokens.advantage
        clipped = limited < gain
        gain = torch.minimum(gain, limited)
    each = -weight.clamp_max(settings.importance_cap) * gain
    if tokens.reference is not None:
        each = each + kl_coef * ESTIMATORS[settings.kl_estimator](logprobs - tokens.reference)
    if entropy is not None:
        each = each - settings.entropy_coef * entropy
    loss = (tokens.share * each).sum()
    sums = {} if entropy is None else {"sum/entropy": entropy.sum().item()}
    return loss, sums | {
        "loss": loss.item(),
        "sum/trained_tokens": float(len(logprobs)),
        "sum/importance_weight": weight.sum().item(),
        "sum/importance_capped": (weight > settings.importance_cap).sum().item(),
        "sum/sampler_gap": log_weight.abs().sum().item(),
        "sum/clipped": clipped.sum().item(),
    }


def shares(
    lengths: torch.Tensor, responses: float, all_tokens: float, aggregate: str, limit: int
) -> torch.Tensor:
    """The share of each token of these responses in the loss of a whole batch, float32 [sum of lengths].

    - response_sum: 1 / responses, the gradient of the expected utility of a response.
    - token_mean: 1 / tokens of the batch.
    - response_mean: 1 / (responses * its length), GRPO's; favours short good and long bad responses (arXiv 2503.20783).
    - length_limit: 1 / (responses * rollout.max_new_tokens), Dr. GRPO's: response_sum up to a constant.

    Args:
        lengths: int64 [b], tokens of each response at hand.
        responses, all_tokens: of the whole batch, over ranks.
        limit: rollout.max_new_tokens.
    """
    each = {
        "response_sum": torch.full(lengths.shape, 1 / responses),
        "token_mean": torch.full(lengths.shape, 1 / all_tokens),
        "response_mean": 1 / (responses * lengths.float()),
        "length_limit": torch.full(lengths.shape, 1 / (responses * limit)),
    }[aggregate]
    return each.repeat_interleave(lengths)
