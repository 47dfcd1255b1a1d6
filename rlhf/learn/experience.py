"""The columns of several experiences, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch

from rlhf.types import Experience, Ragged, Rollouts


@dataclass(frozen=True)
class Merged:
    """A batch: B responses of T tokens to G prompts, k to each; a prompt's are contiguous. M reward models judged them;
    of rollouts without rewards M is 0, and the utility too."""

    prompts: Ragged  # int32, G rows
    tokens: Ragged  # int32, B rows
    group: np.ndarray  # int64 [B]
    behaviour: torch.Tensor  # float32 [T], the sampler's log-probabilities
    utility: torch.Tensor  # float32 [B], the combined one
    utilities: torch.Tensor  # float32 [B, M], each model's
    weights: torch.Tensor  # float32 [M], of the models
    temperature: float
    place: np.ndarray  # int64 [B, 2], the item of each response and its number within

    @classmethod
    def of(cls, experiences: Sequence[Experience]) -> Merged:
        rewards = [e.rewards for e in experiences]
        weights = {r.weights for r in rewards}
        assert len(weights) == 1, weights
        return replace(
            cls.of_rollouts([e.rollouts for e in experiences]),
            utility=torch.from_numpy(np.concatenate([r.combined for r in rewards])),
            utilities=torch.from_numpy(np.concatenate([r.utility for r in rewards])),
            weights=torch.tensor(weights.pop(), dtype=torch.float32),
        )

    @classmethod
    def of_rollouts(cls, rollouts: Sequence[Rollouts]) -> Merged:
        temperatures = {r.temperature for r in rollouts}
        assert len(temperatures) == 1, temperatures
        first = np.cumsum([0] + [len(r.prompts) for r in rollouts])
        responses = sum(r.responses for r in rollouts)
        return cls(
            Ragged.of([r.prompt_tokens[g] for r in rollouts for g in range(len(r.prompts))], np.int32),
            Ragged.of([r.tokens[b] for r in rollouts for b in range(r.responses)], np.int32),
            np.concatenate([r.group + start for r, start in zip(rollouts, first, strict=False)]),
            torch.from_numpy(np.concatenate([r.logprobs for r in rollouts])),
            torch.zeros(responses),
            torch.zeros(responses, 0),
            torch.zeros(0),
            temperatures.pop(),
            np.concatenate(
                [np.stack([np.full(r.responses, r.item), np.arange(r.responses)], 1) for r in rollouts]
            ),
        )

    @property
    def group_size(self) -> int:
        """Responses to each prompt, k."""
        assert len(self.group) % len(self.prompts) == 0
        return len(self.group) // len(self.prompts)

    @cached_property
    def group_tokens(self) -> np.ndarray:
        """Tokens of each prompt and its responses, int64 [G]."""
        own = np.bincount(self.group, weights=self.tokens.lengths, minlength=len(self.prompts))
        return self.prompts.lengths + own.astype(np.int64)

    def names(self, rows: Sequence[int]) -> tuple[str, ...]:
        """These responses, as errors call them."""
        return tuple(f"response {n} of item {item}" for item, n in self.place[rows].tolist())

    def rows(self, groups: Sequence[int]) -> list[int]:
        """The responses to these prompts, ascending."""
        return np.flatnonzero(np.isin(self.group, np.asarray(groups, np.int64))).tolist()

    def token_index(self, groups: Sequence[int]) -> np.ndarray:
        """The flat tokens of the responses to these prompts, int64, ascending."""
        offsets = self.tokens.offsets
        spans = [np.arange(offsets[b], offsets[b + 1]) for b in self.rows(groups)]
        return np.concatenate(spans) if spans else np.empty(0, np.int64)
