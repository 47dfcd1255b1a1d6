"""What a learner minimises on a data set: supervised or Bradley-Terry (`rlhf/learn/alignment.py` aligns a policy).

An objective turns the part of a batch that one rank owns into token batches and each into a loss. Losses are sums
divided by the size of the whole batch, so that the sum over micro-batches and ranks is the batch's mean.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from rlhf.learn.batching import Layout, TokenBatch, by_length
from rlhf.learn.logprobs import token_logprobs
from rlhf.models.classifier import Classifier, one_batch
from rlhf.types import Ragged

Metrics = dict[str, float]


@dataclass(frozen=True)
class MicroBatch:
    """A part of a rank's share. `loss(model)` gives what to differentiate, and sums for the metrics.

    `loss` calls the model once, whatever the part is made of: the collectives of ZeRO 3 must be the same on all ranks.
    """

    loss: Callable[[torch.nn.Module], tuple[torch.Tensor, Metrics]]
    tokens: int
    rows: tuple[str, ...] = ()  # what it is made of, as errors call it
    values: Callable[[torch.nn.Module], torch.Tensor] | None = None  # of each row, what it is measured by
    numbers: tuple[int, ...] = ()  # the rows in the data set


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

    lay: Layout

    def micro_batches(
        self, batch: tuple[TokenPairs, np.ndarray], rank: int, world: int, budget: int
    ) -> list[MicroBatch]:
        data, indices = batch
        total = float(data.responses.lengths[indices].sum())
        mine = balanced(data.prompts.lengths[indices] + data.responses.lengths[indices], world)[rank]
        rows = [int(indices[i]) for i in mine]

        def loss(tokens: TokenBatch) -> MicroBatch:
            def call(model: torch.nn.Module) -> tuple[torch.Tensor, Metrics]:
                value = -token_logprobs(model, tokens).sum() / total
                return value, {"loss": value.item()}

            return MicroBatch(call, tokens.input_ids.numel(), _named("example", tokens.rows.tolist()))

        return [loss(t) for t in self.lay(data.prompts, data.responses, np.arange(len(data)), rows, budget)]


@dataclass(frozen=True)
class PreferencePairs:
    """Tokenised conversations of a preference data set: the chosen ones and the rejected ones, N of each."""

    chosen: Ragged  # int32
    rejected: Ragged  # int32

    def __len__(self) -> int:
        return len(self.chosen)

    def part(self, rows: np.ndarray) -> PreferencePairs:
        """These pairs alone; rows: int [n]."""
        chosen, rejected = (
            Ragged.of([column[i] for i in rows.tolist()], np.int32) for column in (self.chosen, self.rejected)
        )
        return PreferencePairs(chosen, rejected)


@dataclass
class BradleyTerry:
    """-log sigmoid(r(chosen) - r(rejected)), mean over pairs. A batch: (PreferencePairs, indices)."""

    classifier: Classifier

    def micro_batches(
        self, batch: tuple[PreferencePairs, np.ndarray], rank: int, world: int, budget: int
    ) -> list[MicroBatch]:
        data, indices = batch
        tokens = data.chosen.lengths[indices] + data.rejected.lengths[indices]
        mine = balanced(tokens, world)[rank]
        longest = np.maximum(data.chosen.lengths, data.rejected.lengths)[indices[mine]]
        found = []
        for places, _ in self.classifier.reach.parts(longest.tolist()):
            alike = [mine[place] for place in places]
            for part in by_length([2 * int(tokens[i]) for i in alike], budget):
                found.append(self._loss(data, [int(indices[alike[n]]) for n in part], len(indices)))
        return found

    def _loss(self, data: PreferencePairs, pairs: list[int], total: int) -> MicroBatch:
        """In one call of the model, also where a pair alone is over the budget."""
        rows = [row for i in pairs for row in (data.chosen[i], data.rejected[i])]
        batch = one_batch(self.classifier, rows, [i // 2 for i in range(len(rows))])
        order = torch.tensor(batch.rows).argsort()

        def margins(model: torch.nn.Module) -> torch.Tensor:
            rewards = batch.scores(model, next(model.parameters()))[order]
            return rewards[0::2] - rewards[1::2]

        def call(model: torch.nn.Module) -> tuple[torch.Tensor, Metrics]:
            margin = margins(model)
            value = -torch.nn.functional.logsigmoid(margin).sum() / total
            return value, {"loss": value.item(), "accuracy": (margin > 0).sum().item() / total}

        return MicroBatch(call, sum(len(row) for row in rows), _named("pair", pairs), margins, tuple(pairs))


def _named(noun: str, numbers: Sequence[int]) -> tuple[str, ...]:
    return tuple(f"{noun} {n}" for n in numbers)


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
