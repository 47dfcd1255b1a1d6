"""One batch of experiences, learnt: log-ratios, values and advantages first, then optimiser steps on parts of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch

from rlhf.config import AlgorithmConfig
from rlhf.learn.advantages import ADVANTAGES, Outcome, scaled
from rlhf.learn.batching import Layout, TokenBatch
from rlhf.learn.critic import token_values, value_loss
from rlhf.learn.experience import Merged
from rlhf.learn.kl import ESTIMATORS
from rlhf.learn.logprobs import token_logprobs, token_logprobs_and_entropy
from rlhf.learn.objectives import Metrics, MicroBatch, balanced
from rlhf.learn.policy_loss import Tokens, policy_loss, shares
from rlhf.learn.trainer import NotFinite, Trainer
from rlhf.types import Experience, Rollouts


@dataclass(frozen=True)
class ReferencePolicy:
    """What the KL is measured against: a model of its own, or the policy with its adapter off."""

    model: torch.nn.Module | None  # None: the policy's own weights, `within` the context
    within: Callable[[], AbstractContextManager] = nullcontext


@dataclass(frozen=True)
class _Prepared:
    """A rank's view of a batch: flat tokens of all responses, filled where they are this rank's."""

    merged: Merged
    old: torch.Tensor | None  # float32 [T], under the policy before the batch
    reference: torch.Tensor | None  # float32 [T]
    values: torch.Tensor | None  # float32 [T]
    advantage: torch.Tensor  # float32 [T], scaled
    returns: torch.Tensor | None  # float32 [T], what the critic learns


class Aligner:
    """Policy-gradient training of a policy on batches of experiences.

    The objective is E[u] - kl_coef KL(policy || reference), whose optimum is the closed form
    reference * exp(u / kl_coef), normalised (arXiv 2402.00742). Every rank calls `step` with the same experiences and
    works on whole groups of its own.
    """

    def __init__(
        self,
        policy: Trainer,
        reference: ReferencePolicy | None,
        critic: Trainer | None,
        settings: AlgorithmConfig,
        max_new_tokens: int,
        lay: Layout,
        notes: Sequence[str] = (),
    ) -> None:
        assert (critic is not None) == (settings.advantage == "gae")
        self.policy, self.reference, self.critic = policy, reference, critic
        self._settings, self._limit, self._lay = settings, max_new_tokens, lay
        self.notes = list(notes)  # what to tell of how the models are computed

    def step(
        self,
        experiences: Sequence[Experience],
        kl_coef: float,
        learning_rate: float,
        critic_learning_rate: float,
        span: Callable[[str], AbstractContextManager] = nullcontext,
        number: int = 0,
        strict: bool = True,
    ) -> Metrics:
        """Trains on a batch, `epochs` times, each time in `minibatches` optimiser steps; `span` is told when it
        prepares and when it trains. `number` is the batch's, for errors.

        Metrics are this rank's part of sums over ranks, but for grad_norm: losses are means over the steps, and
        `kl` is the mean over the batch's responses, nats; without a reference there is none. `skipped` is 1 if a loss
        or a gradient was not finite, else 0: that step of policy or critic, and the rest of the batch, were left out.

        Raises:
            NotFinite: instead of leaving out, if `strict`.
        """
        merged = Merged.of(experiences)
        every = balanced(merged.group_tokens, self.policy.world)
        with span("prepare"):
            prepared, metrics = self._prepare(merged, every[self.policy.rank], kl_coef)
        rates = (learning_rate, critic_learning_rate)
        steps, metrics["skipped"] = 0, 0.0
        for part in self._parts(every, experiences[0].rewards.item):
            try:
                with span("train"):
                    found = self._update(prepared, part, kl_coef, rates, number)
            except NotFinite:
                if strict:
                    raise
                metrics["skipped"] = 1.0
                break
            steps += 1
            for key, value in found.items():
                metrics[key] = metrics.get(key, 0.0) + value
        means = [k for k in metrics if k in ("loss", "grad_norm") or k.startswith("critic/")]
        return metrics | {key: metrics[key] / steps for key in means}

    def log_ratios(self, rollouts: Sequence[Rollouts]) -> np.ndarray:
        """log policy - log reference of each response, nats, float64 [B]: of the policy that sampled it. Every rank is
        given the same, does its share, and gets all."""
        merged = Merged.of_rollouts(rollouts)
        mine = balanced(merged.group_tokens, self.policy.world)[self.policy.rank]
        reference = self._reference_logprobs(self._batches(merged, mine), merged)
        assert reference is not None, "the policy is trained without a reference"
        own = torch.zeros(len(merged.behaviour), dtype=torch.float64)
        index = torch.from_numpy(merged.token_index(mine))
        own[index] = (merged.behaviour[index] - reference[index]).double()
        row = torch.from_numpy(np.repeat(np.arange(len(merged.group)), merged.tokens.lengths))
        sums = torch.zeros(len(merged.group), dtype=torch.float64).index_add_(0, row, own)
        return self.policy.over_ranks(sums).numpy()

    def _batches(self, merged: Merged, groups: Sequence[int]) -> list[TokenBatch]:
        rows = merged.rows(groups)
        return self._lay(merged.prompts, merged.tokens, merged.group, rows, self.policy.budget)

    def _prepare(self, merged: Merged, mine: list[int], kl_coef: float) -> tuple[_Prepared, Metrics]:
        settings, own = self._settings, merged.token_index(mine)
        batches = self._batches(merged, mine)
        metrics: Metrics = {
            "sum/tokens": float(len(own)),
            "sum/surprise": -merged.behaviour[own].sum().item(),
        }
        reference = self._reference_logprobs(batches, merged)
        penalty = torch.zeros(len(own))
        if reference is not None:
            log_ratio = merged.behaviour[own] - reference[own]
            metrics["kl"] = log_ratio.sum().item() / len(merged.group)
            if settings.kl == "reward":
                penalty = kl_coef * ESTIMATORS[settings.kl_estimator](log_ratio)
        old = None
        if settings.epochs * settings.minibatches > 1:
            passes = self.policy.passes(batches, lambda m, b: token_logprobs(m, b, merged.temperature))
            old = _flat(passes, batches, merged)
        values = None
        if self.critic is not None:
            values = _flat(self.critic.passes(batches, token_values), batches, merged)
        rows = merged.rows(mine)
        outcome = Outcome(
            utility=merged.utility[rows],
            penalty=penalty,
            lengths=torch.from_numpy(merged.tokens.lengths[rows]),
            group_size=merged.group_size,
            utilities=merged.utilities[rows],
            weights=merged.weights,
            values=None if values is None else values[own],
            trace=1.0 if settings.critic is None else settings.critic.trace,
            over_ranks=self.policy.over_ranks,
        )
        plain = ADVANTAGES[settings.advantage](outcome)
        advantage, returns = torch.zeros(len(merged.behaviour)), None
        advantage[own] = scaled(plain, outcome, settings.scale)
        if values is not None:
            returns = values.clone()
            returns[own] += plain
            metrics |= _explained(returns[own], plain)
        return _Prepared(merged, old, reference, values, advantage, returns), metrics

    def _reference_logprobs(self, batches: list[TokenBatch], merged: Merged) -> torch.Tensor | None:
        if self.reference is None:
            return None
        model = self.reference.model
        with self.reference.within(), torch.no_grad():
            if model is None:
                passes = self.policy.passes(batches, lambda m, b: token_logprobs(m, b, merged.temperature))
            else:
                passes = [token_logprobs(model, b, merged.temperature).float().cpu() for b in batches]
        return _flat(passes, batches, merged)

    def _parts(self, every: list[list[int]], item: int) -> Iterator[list[list[int]]]:
        """The groups of each optimiser step, by rank. Every rank knows all, and so the size of the whole."""
        count = self._settings.minibatches
        for epoch in range(self._settings.epochs):
            if count > 1:
                rng = np.random.default_rng([item, epoch])
                every = [rng.permutation(share).tolist() for share in every]
            for n in range(count):
                yield [sorted(share[n::count]) for share in every]

    def _update(
        self,
        prepared: _Prepared,
        part: list[list[int]],
        kl_coef: float,
        learning_rates: tuple[float, float],
        number: int,
    ) -> Metrics:
        merged, (learning_rate, critic_learning_rate) = prepared.merged, learning_rates
        batches = self._batches(merged, part[self.policy.rank])
        whole = [g for share in part for g in share]
        responses, tokens = len(merged.rows(whole)), float(len(merged.token_index(whole)))
        lengths = torch.from_numpy(merged.tokens.lengths)
        share = shares(lengths, responses, tokens, self._settings.aggregate, self._limit)
        losses = [self._policy_part(b, prepared, share[b.index], kl_coef) for b in batches]
        metrics = self.policy.update(losses, learning_rate, number)
        if self.critic is not None:
            losses = [self._critic_part(b, prepared, tokens) for b in batches]
            found = self.critic.update(losses, critic_learning_rate, number)
            metrics |= {"critic/loss": found.get("loss", 0.0), "critic/grad_norm": found["grad_norm"]}
        return metrics

    def _policy_part(
        self, batch: TokenBatch, prepared: _Prepared, share: torch.Tensor, kl_coef: float
    ) -> MicroBatch:
        settings, merged, index = self._settings, prepared.merged, batch.index
        in_loss = prepared.reference is not None and settings.kl == "loss"
        tokens = Tokens(
            behaviour=merged.behaviour[index],
            old=None if prepared.old is None else prepared.old[index],
            reference=prepared.reference[index] if in_loss and prepared.reference is not None else None,
            advantage=prepared.advantage[index],
            share=share,
        )

        def call(model: torch.nn.Module) -> tuple[torch.Tensor, Metrics]:
            entropy = None
            if settings.entropy_coef != 0:
                logprobs, entropy = token_logprobs_and_entropy(model, batch, merged.temperature)
            else:
                logprobs = token_logprobs(model, batch, merged.temperature)
            return policy_loss(logprobs, entropy, tokens.to(logprobs.device), settings, kl_coef)

        return MicroBatch(call, batch.input_ids.numel(), merged.names(batch.rows.tolist()))

    def _critic_part(self, batch: TokenBatch, prepared: _Prepared, tokens: float) -> MicroBatch:
        assert prepared.values is not None
        assert prepared.returns is not None
        assert self._settings.critic is not None
        clip = self._settings.critic.clip
        old, returns = prepared.values[batch.index], prepared.returns[batch.index]

        def call(model: torch.nn.Module) -> tuple[torch.Tensor, Metrics]:
            values = token_values(model, batch)
            loss = value_loss(values, old.to(values.device), returns.to(values.device), clip, tokens)
            return loss, {"loss": loss.item()}

        return MicroBatch(call, batch.input_ids.numel(), prepared.merged.names(batch.rows.tolist()))


def _flat(passes: list[torch.Tensor], batches: list[TokenBatch], merged: Merged) -> torch.Tensor:
    """Results of passes at the flat places of their tokens, float32 [T]."""
    flat = torch.zeros(len(merged.behaviour))
    for batch, found in zip(batches, passes, strict=True):
        flat[batch.index] = found
    return flat


def _explained(returns: torch.Tensor, residuals: torch.Tensor) -> Metrics:
    """Sums from which the share of the returns' variance that the critic explains is made."""
    return {
        "sum/returns": returns.sum().item(),
        "sum/returns_squared": (returns**2).sum().item(),
        "sum/residuals_squared": (residuals**2).sum().item(),
    }
