"""Token batches without padding: prompts shared, sequences laid side by side, positions restarted.

A *tree* is a prompt with some of its responses: the prompt is computed once, and each response sees it and itself
(`rlhf/models/trees.py`). It is exact: the log-probabilities are those of the plain, padded way (`pad`), which
serves models whose attention is their own.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.models import attention, probe
from rlhf.models.attempt import Failure, attempt
from rlhf.models.reach import Reach
from rlhf.models.trees import Tree
from rlhf.types import Ragged

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TokenBatch:
    """What a causal model is called with, and where its predictions of response tokens are.

    With `trees` the batch is one row of trees, and the attention mask says nothing. `predict[n]` is the flat position
    (row * width + column) whose logits predict response token `targets[n]`, which is token `index[n]` of the flat
    response tokens and belongs to response `response[n]`. `last[i]` is the flat position of the last token of response
    `rows[i]`, where the batch has it.
    """

    input_ids: torch.Tensor  # int64 [rows, width]
    position_ids: torch.Tensor  # int64 [rows, width]
    attention_mask: torch.Tensor  # int64 [rows, width]; with trees [1, 1, 1, 1]
    predict: torch.Tensor  # int64 [N]
    targets: torch.Tensor  # int64 [N]
    index: torch.Tensor  # int64 [N]
    response: torch.Tensor  # int64 [N]
    rows: torch.Tensor  # int64 [responses in the batch]
    last: torch.Tensor | None = None  # int64 [responses in the batch]
    trees: tuple[Tree, ...] | None = None

    def inputs(self, like: torch.Tensor) -> dict[str, Any]:
        """What the model is called with, on the device of `like`."""
        given = {
            "input_ids": self.input_ids.to(like.device),
            "attention_mask": self.attention_mask.to(like.device),
        }
        if self.trees is None:  # rows begin at their first token, as every model takes for granted
            return given
        return given | {"position_ids": self.position_ids.to(like.device), "trees": self.trees}


def pack(
    prompts: Ragged,
    responses: Ragged,
    group: np.ndarray,
    rows: Sequence[int],
    budget: int,
    ends: bool = False,
) -> list[TokenBatch]:
    """Lays the responses `rows` (indices into `responses`, siblings adjacent) with their prompts into batches.

    A batch holds at most `budget` tokens, or one tree. A tree over the budget is split by its responses. The last token
    of a response predicts none and is left out, but with `ends`, for models that read it.

    >>> prompts, responses = Ragged.of([[5, 6]], np.int32), Ragged.of([[7], [8, 9]], np.int32)
    >>> batch, = pack(prompts, responses, np.array([0, 0]), [0, 1], budget=64)
    >>> batch.input_ids.tolist(), batch.position_ids.tolist(), batch.predict.tolist()
    ([[5, 6, 8]], [[0, 1, 2]], [1, 1, 2])
    """
    computed = responses.lengths if ends else np.maximum(responses.lengths - 1, 0)
    batches: list[list[list[int]]] = []
    room = 0
    for tree, length in _trees(prompts, computed, group, rows, budget):
        if not batches or length > room:
            batches.append([])
            room = budget
        batches[-1].append(tree)
        room -= length
    return [_lay(trees, prompts, responses, computed, group, ends) for trees in batches]


def _trees(
    prompts: Ragged, computed: np.ndarray, group: np.ndarray, rows: Sequence[int], budget: int
) -> list[tuple[list[int], int]]:
    """Responses that share a prompt and its computation, and the tokens of prompt and responses."""
    trees: list[tuple[list[int], int]] = []
    for row in rows:
        own = int(computed[row])
        if trees:
            tree, length = trees[-1]
            if group[tree[0]] == group[row] and length + own <= budget:
                trees[-1] = ([*tree, row], length + own)
                continue
        trees.append(([row], int(prompts.lengths[group[row]]) + own))
    return trees


def _lay(
    trees: list[list[int]],
    prompts: Ragged,
    responses: Ragged,
    computed: np.ndarray,
    group: np.ndarray,
    ends: bool,
) -> TokenBatch:
    ids, positions, predict, targets, index, response, last = [], [], [], [], [], [], []
    shapes = []
    at = 0
    for tree in trees:
        prompt = prompts[group[tree[0]]]
        ids.append(prompt)
        positions.append(np.arange(len(prompt)))
        at += len(prompt)
        before = at - 1
        for row in tree:
            own, length = responses[row], int(computed[row])
            here = np.arange(at, at + length)
            ids.append(own[:length])
            positions.append(len(prompt) + np.arange(length))
            predict.append(np.concatenate([[before], here])[: len(own)])
            targets.append(own)
            index.append(np.arange(responses.offsets[row], responses.offsets[row + 1]))
            response.append(np.full(len(own), row))
            last.append([at + length - 1 if length else before])
            at += length
        shapes.append(Tree(len(prompt), tuple(int(computed[row]) for row in tree)))
    return TokenBatch(
        _flat(ids)[None],
        _flat(positions)[None],
        torch.zeros(1, 1, 1, 1),
        **_columns(predict, targets, index, response, trees),
        last=_flat(last) if ends else None,
        trees=tuple(shapes),
    )


def pad(
    prompts: Ragged, responses: Ragged, group: np.ndarray, rows: Sequence[int], budget: int
) -> list[TokenBatch]:
    """The plain way: a row for each response, prompt repeated, right-padded, batched by length."""
    lengths = [int(prompts.lengths[group[row]] + responses.lengths[row]) for row in rows]
    return [
        _right_pad([rows[i] for i in batch], prompts, responses, group)
        for batch in by_length(lengths, budget)
    ]


def by_length(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Splits rows into batches of similar length, each at most `budget` tokens padded (at least one row)."""
    batches: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * lengths[i] <= budget:
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def _right_pad(batch: list[int], prompts: Ragged, responses: Ragged, group: np.ndarray) -> TokenBatch:
    width = max(int(prompts.lengths[group[r]] + responses.lengths[r]) for r in batch)
    ids, mask = np.zeros((len(batch), width), np.int64), np.zeros((len(batch), width), np.int64)
    predict, targets, index, response = [], [], [], []
    for i, row in enumerate(batch):
        prompt, own = prompts[group[row]], responses[row]
        end = len(prompt) + len(own)
        ids[i, :end], mask[i, :end] = np.concatenate([prompt, own]), 1
        predict.append(i * width + len(prompt) - 1 + np.arange(len(own)))
        targets.append(own)
        index.append(np.arange(responses.offsets[row], responses.offsets[row + 1]))
        response.append(np.full(len(own), row))
    positions = np.broadcast_to(np.arange(width), ids.shape).copy()
    return TokenBatch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(mask),
        **_columns(predict, targets, index, response, [batch]),
    )


def _columns(predict: Any, targets: Any, index: Any, response: Any, rows: Any) -> dict[str, Any]:
    """The columns of a `TokenBatch` from their parts."""
    return {
        "predict": _flat(predict),
        "targets": _flat(targets),
        "index": _flat(index),
        "response": _flat(response),
        "rows": _flat(rows),
    }


def _flat(parts: Any) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


@dataclass(frozen=True)
class Layout:
    """Makes the batches of a model: packed where that is exact, else padded.

    A batch holds sequences that the model computes alike (`Reach`): those beyond a window are never packed, as trees
    know none.
    """

    packs: bool
    reach: Reach = field(default_factory=Reach)

    def __call__(
        self, prompts: Ragged, responses: Ragged, group: np.ndarray, rows: Sequence[int], budget: int
    ) -> list[TokenBatch]:
        lengths = [int(prompts.lengths[group[row]] + responses.lengths[row]) for row in rows]
        batches = []
        for places, see_all in self.reach.parts(lengths):
            way = pack if self.packs and see_all else pad
            batches += way(prompts, responses, group, [rows[i] for i in places], budget)
        return batches

    def both(self, other: Layout) -> Layout:
        """Of batches that two models are called with."""
        return Layout(self.packs and other.packs, self.reach.narrowed(other.reach))


def layout(model: PreTrainedModel, what: str = "policy", way: str | None = None) -> tuple[Layout, list[str]]:
    """The fastest layout that is exact for the model, whose attention becomes ours if it is packed; and what to tell of
    a fallback. `way`: of our attention (`rlhf/models/attention.py`); None: that of the model's device."""
    fault = packing_fault(model, what, way)
    layout = Layout(fault is None, Reach.of(model.config))
    if fault is None:
        return layout, []
    note = f"{what} ({type(model).__name__}): prompts are computed for each response, and rows are padded: {fault}"
    log.warning(note)
    return layout, [note]


@torch.no_grad()
def packing_fault(model: Any, what: str = "policy", way: str | None = None) -> str | None:
    """Why packed tokens, under our attention, do not get the log-probabilities of the model's own passes over single
    sequences; None: they do, and its attention is ours from now on.

    Tried on random tokens in float32: several prompts and responses, as long as the model's window allows.
    """
    reach = Reach.of(model.config)
    if reach.picks is not None:
        return "an index picks the tokens that are seen from all of a call"
    vocabulary, longest = model.config.get_text_config().vocab_size, probe.room(reach)
    half = longest // 2
    prompts = Ragged.of(probe.sequences([half, 1, max(half // 2, 1)], vocabulary), np.int32)
    lengths = [longest - half, 1, max(half // 2, 1), longest - 1, 2]
    responses = Ragged.of(probe.sequences(lengths, vocabulary, seed=1), np.int32)
    group = np.array([0, 0, 0, 1, 2])
    own = []
    for b, response in enumerate(responses[b] for b in range(len(lengths))):
        prompt = prompts[group[b]]
        whole = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))[None]
        own.append(probe.own_logprobs(model, whole, what, len(response) + 1)[0, :-1])
    exact = torch.cat(own)
    probe.check_finite(exact, what)
    like = next(model.parameters())

    def packed() -> torch.Tensor:
        flat = torch.empty_like(exact)
        for batch in pack(prompts, responses, group, range(len(lengths)), 2 * longest):
            logits = model(**batch.inputs(like), use_cache=False).logits.flatten(0, 1)
            flat[batch.index] = torch.log_softmax(logits[batch.predict.to(like.device)].float(), -1)
        return flat

    with attention.tried(model, way) as trial:
        if not trial.possible:
            return "its attention cannot be replaced"
        found = attempt(packed)
        if isinstance(found, Failure):
            return f"its attention cannot be replaced ({found.reason})"
        off, most = probe.distance(found, exact), probe.tolerance(exact)
        trial.kept = off <= most
    return None if trial.kept else f"packed, it is {off:.2g} nats off ({most:.2g} allowed)"
