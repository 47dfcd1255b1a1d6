"""What a learner minimises: supervised, Bradley-Terry, or policy gradient, each over the same engine.

An objective turns the part of a batch that one rank owns into token batches and each into a loss. Losses are sums
divided by the size of the whole batch, so that the sum over micro-batches and ranks is the batch's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

from rlhf.learn.advantages import ADVANTAGES
from rlhf.learn.batching import TokenBatch, by_length, pack, pad, token_logprobs
from rlhf.models.reward import Classifier, score_rows
from rlhf.types import Experience, Ragged

Metrics = dict[str, float]


@dataclass(frozen=True)
class MicroBatch:
    """A part of a rank's share. `loss(model)` gives what to differentiate, and sums for the metrics."""

    loss: Callable[[torch.nn.Module], tuple[torch.Tensor, Metrics]]
    tokens: int


class Objective(Protocol):
    def micro_batches(self, batch: Any, rank: int, world: int, budget: int) -> list[MicroBatch]:
        """This rank's share of a batch, as micro-batches of at most `budget` tokens."""


@dataclass(frozen=True)
class TokenPairs:
    """Tokenised (prompt, response) examples, N of each."""

    prompts: Ragged  # int32
    responses: Ragged  # int32

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass
class Supervised:
    """Cross-entropy of the response tokens, mean over the batch's tokens. A batch: (TokenPairs, indices)."""

    packing: bool = True

    def micro_batches(
        self, batch: tuple[TokenPairs, np.ndarray], rank: int, world: int, budget: int
    ) -> list[MicroBatch]:
        data, indices = batch
        total = float(data.responses.lengths[indices].sum())
        mine = balanced(data.prompts.lengths[indices] + data.responses.lengths[indices], world)[rank]
        lay = pack if self.packing else pad
        rows = [int(indices[i]) for i in mine]

        def loss(tokens: TokenBatch) -> MicroBatch:
            def call(model: torch.nn.Module) -> tuple[torch.Tensor, Metrics]:
                value = -token_logprobs(model, tokens).sum() / total
                return value, {"loss": value.item()}

            return MicroBatch(call, tokens.input_ids.numel())

        return [loss(t) for t in lay(data.prompts, data.responses, np.arange(len(data)), rows, budget)]


@dataclass(frozen=True)
class PreferencePairs:
    """Tokenised conversations of a preference data set: the chosen ones and the rejected ones, N of each."""

    chosen: Ragged  # int32
    rejected: Ragged  # int32

    def __len__(self) -> int:
        return len(self.chosen)


@dataclass
class BradleyTerry:
    """-log sigmoid(r(chosen) - r(rejected)), mean over pairs. A batch: (PreferencePairs, indices)."""

    classifier: Classifier

    def micro_batches(
        self, batch: tuple[PreferencePairs, np.ndarray], rank: int, world: int, budget: int
    ) -> list[MicroBatch]:
        data, indices = batch
        tokens = data.chosen.lengths[indices] + data.rejected.lengths[indices]
        mine = [int(i) for i in balanced(tokens, world)[rank]]
        parts = by_length([2 * int(tokens[i]) for i in mine], budget)
        return [
            self._loss(data, [int(indices[mine[i]]) for i in part], len(indices), budget) for part in parts
        ]

    def _loss(self, data: PreferencePairs, pairs: list[int], total: int, budget: int) -> MicroBatch:
        rows = [row for i in pairs for row in (data.chosen[i], data.rejected[i])]

        def call(model: torch.nn.Module) -> tuple[torch.Tensor, Metrics]:
            rewards = score_rows(model, self.classifier, rows, budget)
            margin = rewards[0::2] - rewards[1::2]
            value = -torch.nn.functional.logsigmoid(margin).sum() / total
            return value, {"loss": value.item(), "accuracy": (margin > 0).sum().item() / total}

        return MicroBatch(call, sum(len(row) for row in rows))


@dataclass
class PolicyGradient:
    """REINFORCE on R = u - kl_coef * log(policy / reference), with a group baseline.

    loss = -1/B sum_b A_b sum_t w_t log policy(y_t), where w_t = min(policy / behaviour, importance_cap), without
    gradient, corrects for tokens sampled from an older policy (it is 1 on-policy). The KL penalty is the sampled
    KL of the whole response, at the sampling temperature.

    A batch: (experiences in order of item id, kl_coef). Metrics are sums that add up to batch means.
    """

    reference: torch.nn.Module | None
    advantage: str
    importance_cap: float
    packing: bool = True
    _lay: Callable[..., list[TokenBatch]] = field(init=False)

    def __post_init__(self) -> None:
        self._lay = pack if self.packing else pad

    def micro_batches(
        self, batch: tuple[Sequence[Experience], float], rank: int, world: int, budget: int
    ) -> list[MicroBatch]:
        experiences, kl_coef = batch
        merged = _Merged.of(experiences)
        mine = balanced(merged.group_tokens, world)[rank]
        rows = [int(b) for b in np.flatnonzero(np.isin(merged.group, mine))]
        batches = self._lay(merged.prompts, merged.tokens, merged.group, rows, budget)
        kl = self._log_ratio(batches, merged)
        total = (merged.utility - kl_coef * kl)[rows].view(len(mine), -1)
        advantage = torch.zeros(len(kl))
        advantage[rows] = ADVANTAGES[self.advantage](total).flatten()
        return [MicroBatch(self._loss(t, merged, advantage, kl), t.input_ids.numel()) for t in batches]

    def _loss(
        self, tokens: TokenBatch, merged: _Merged, advantage: torch.Tensor, kl: torch.Tensor
    ) -> Callable[[torch.nn.Module], tuple[torch.Tensor, Metrics]]:
        behaviour = merged.behaviour[tokens.index]
        responses = len(kl)

        def call(model: torch.nn.Module) -> tuple[torch.Tensor, Metrics]:
            logprobs = token_logprobs(model, tokens, merged.temperature)
            log_ratio = logprobs.detach().cpu() - behaviour
            ratio = log_ratio.exp()
            weight = ratio.clamp_max(self.importance_cap) * advantage[tokens.response]
            value = -(weight.to(logprobs.device) * logprobs).sum() / responses
            sums = {
                "loss": value.item(),
                "kl": kl[tokens.response.unique()].sum().item() / responses,
                "sum/tokens": float(len(behaviour)),
                "sum/importance_weight": ratio.sum().item(),
                "sum/importance_capped": (ratio > self.importance_cap).sum().item(),
                "sum/sampler_gap": log_ratio.abs().sum().item(),
                "sum/surprise": -behaviour.sum().item(),
            }
            return value, sums

        return call

    @torch.no_grad()
    def _log_ratio(self, batches: list[TokenBatch], merged: _Merged) -> torch.Tensor:
        """log behaviour(y) - log reference(y) of each response, float32 [B], nats."""
        ratio = torch.zeros(len(merged.group))
        if self.reference is None:
            return ratio
        for batch in batches:
            reference = token_logprobs(self.reference, batch, merged.temperature).float().cpu()
            ratio.index_add_(0, batch.response, merged.behaviour[batch.index] - reference)
        return ratio


@dataclass(frozen=True)
class _Merged:
    """The columns of several experiences, one after another."""

    prompts: Ragged
    tokens: Ragged
    group: np.ndarray  # int64 [B]
    behaviour: torch.Tensor  # float32 [T]
    utility: torch.Tensor  # float32 [B]
    temperature: float

    @classmethod
    def of(cls, experiences: Sequence[Experience]) -> _Merged:
        rollouts = [e.rollouts for e in experiences]
        temperatures = {r.temperature for r in rollouts}
        assert len(temperatures) == 1, temperatures
        first = np.cumsum([0] + [len(r.prompts) for r in rollouts])
        return cls(
            Ragged.of([r.prompt_tokens[g] for r in rollouts for g in range(len(r.prompts))], np.int32),
            Ragged.of([r.tokens[b] for r in rollouts for b in range(r.responses)], np.int32),
            np.concatenate([r.group + start for r, start in zip(rollouts, first, strict=False)]),
            torch.from_numpy(np.concatenate([r.logprobs for r in rollouts])),
            torch.from_numpy(np.concatenate([e.rewards.combined for e in experiences])),
            temperatures.pop(),
        )

    @property
    def group_tokens(self) -> np.ndarray:
        """Tokens of each prompt and its responses, int64 [G]."""
        own = np.bincount(self.group, weights=self.tokens.lengths, minlength=len(self.prompts))
        return self.prompts.lengths + own.astype(np.int64)


def balanced(lengths: np.ndarray, world: int) -> list[list[int]]:
    """Deals rows to ranks: longest first, each to the rank with the fewest tokens. Every rank computes the same.

    >>> balanced(np.array([5, 1, 4, 2]), 2)
    [[0, 1], [2, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(world)]
    load = np.zeros(world)
    for i in np.argsort(-np.asarray(lengths), kind="stable"):
        rank = int(load.argmin())
        shares[rank].append(int(i))
        load[rank] += lengths[i]
    return [sorted(share) for share in shares]
