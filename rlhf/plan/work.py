"""The shape of a step: how many tokens each role computes at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.learn.batching import TokenBatch, pack
from rlhf.types import Ragged


@dataclass(frozen=True)
class Work:
    """A step of align, with responses as long as they may get."""

    prompt_lengths: tuple[int, ...]  # tokens of every training prompt, under the policy's template
    response_tokens: int
    prompts: int  # of a step
    samples: int  # responses to each
    item: int  # prompts of a work item
    most_samples: int  # responses to each prompt in any stage
    ranks: int
    budget: int  # tokens of a micro-batch
    slots: int  # responses that a generator samples at a time
    staleness: int

    @property
    def mean_prompt(self) -> float:
        return float(np.mean(self.prompt_lengths))

    @property
    def step_tokens(self) -> int:
        """Tokens that the policy computes in a step, each prompt once, the last token of a response never."""
        return round(self.prompts * (self.mean_prompt + self.samples * (self.response_tokens - 1)))

    @property
    def longest(self) -> list[int]:
        """Lengths of the prompts of a step that has the longest."""
        return sorted(self.prompt_lengths, reverse=True)[: self.prompts]

    def micro_batches(self) -> list[TokenBatch]:
        """Of the rank with the longest prompts."""
        share = -(-self.prompts // self.ranks)
        return self._packed(self.longest[:share], self.samples, self.budget)

    def scored(self, budget: int) -> list[TokenBatch]:
        """Of a reward model that is given a work item."""
        return self._packed(self.longest[: self.item], self.samples, budget)

    def prefill(self, budget: int = 4096) -> list[TokenBatch]:
        return self._packed(self.longest[: self.item], 1, budget, responses=1)

    @property
    def rows(self) -> int:
        """Responses that a generator samples at a time: of one work item, or where versions may differ of all."""
        samples = max(
            self.samples * (self.prompts if self.staleness else self.item), self.most_samples * self.item
        )
        return min(self.slots, samples)

    def _packed(
        self, prompts: Sequence[int], samples: int, budget: int, responses: int | None = None
    ) -> list[TokenBatch]:
        tokens = self.response_tokens if responses is None else responses
        rows = range(len(prompts) * samples)
        return pack(
            Ragged.of([np.zeros(n, np.int32) for n in prompts], np.int32),
            Ragged.of([np.zeros(tokens, np.int32) for _ in rows], np.int32),
            np.repeat(np.arange(len(prompts)), samples),
            rows,
            budget,
        )


def largest(batches: Sequence[TokenBatch]) -> TokenBatch:
    return max(batches, key=lambda batch: batch.input_ids.numel())
