"""Token batches without padding: prompts shared, rows filled, positions restarted.

A *tree* is a prompt with some of its responses: the prompt is computed once, and each response sees it and
itself under a block mask. Trees are laid into rows by first-fit decreasing. It is exact: the log-probabilities are
those of the plain, padded way (`pad`), which serves models that take no custom mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PretrainedConfig, PreTrainedModel

from rlhf.types import Ragged


@dataclass(frozen=True)
class TokenBatch:
    """What a causal model is called with, and where its predictions of response tokens are.

    `predict[n]` is the flat position (row * width + column) whose logits predict response token `targets[n]`,
    which is token `index[n]` of the flat response tokens and belongs to response `response[n]`. `last[i]` is the
    flat position of the last token of response `rows[i]`.
    """

    input_ids: torch.Tensor  # int64 [rows, width]
    position_ids: torch.Tensor  # int64 [rows, width]
    attention_mask: torch.Tensor  # int64 [rows, width], or float32 additive [rows, 1, width, width]
    predict: torch.Tensor  # int64 [N]
    targets: torch.Tensor  # int64 [N]
    index: torch.Tensor  # int64 [N]
    response: torch.Tensor  # int64 [N]
    rows: torch.Tensor  # int64 [responses in the batch]
    last: torch.Tensor  # int64 [responses in the batch]


def token_logprobs(model: torch.nn.Module, batch: TokenBatch, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of the batch's response tokens, float32 [N], at the sampling temperature."""
    chosen = _chosen_logits(model, batch, temperature)
    return -torch.nn.functional.cross_entropy(chosen, batch.targets.to(chosen.device), reduction="none")


def token_logprobs_and_entropy(
    model: torch.nn.Module, batch: TokenBatch, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs`, and the entropy of the distribution that each token was drawn from, nats, float32 [N]."""
    logprobs = torch.log_softmax(_chosen_logits(model, batch, temperature), -1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, batch.targets.to(logprobs.device)[:, None])[:, 0], entropy


def _chosen_logits(model: torch.nn.Module, batch: TokenBatch, temperature: float) -> torch.Tensor:
    """Logits that predict the response tokens, divided by the temperature, float32 [N, vocabulary]."""
    device = next(model.parameters()).device
    mask = batch.attention_mask.to(device)
    if mask.dim() == 4:
        mask = mask.to(next(model.parameters()).dtype)
    logits = model(
        input_ids=batch.input_ids.to(device),
        position_ids=batch.position_ids.to(device),
        attention_mask=mask,
        use_cache=False,
    ).logits
    return logits.reshape(-1, logits.shape[-1])[batch.predict.to(device)].float() / temperature


@dataclass(frozen=True)
class _Tree:
    prompt: int
    responses: tuple[int, ...]
    length: int


def pack(
    prompts: Ragged, responses: Ragged, group: np.ndarray, rows: Sequence[int], budget: int
) -> list[TokenBatch]:
    """Lays the responses `rows` (indices into `responses`, siblings adjacent) with their prompts into batches.

    A batch holds at most `budget` tokens, or one tree. A tree over the budget is split by its responses.

    >>> prompts, responses = Ragged.of([[5, 6]], np.int32), Ragged.of([[7], [8, 9]], np.int32)
    >>> batch, = pack(prompts, responses, np.array([0, 0]), [0, 1], budget=64)
    >>> batch.input_ids.tolist(), batch.position_ids.tolist(), batch.predict.tolist()
    ([[5, 6, 7, 8, 9]], [[0, 1, 2, 2, 3]], [1, 1, 3])
    """
    trees = _trees(prompts, responses, group, rows, budget)
    if not trees:
        return []
    width = max(tree.length for tree in trees)
    bins: list[list[_Tree]] = []
    room: list[int] = []
    for tree in sorted(trees, key=lambda t: (-t.length, t.responses)):
        for b, free in enumerate(room):
            if tree.length <= free:
                bins[b].append(tree)
                room[b] -= tree.length
                break
        else:
            bins.append([tree])
            room.append(width - tree.length)
    per_batch = max(1, budget // width)
    return [_lay(bins[i : i + per_batch], prompts, responses) for i in range(0, len(bins), per_batch)]


def _trees(
    prompts: Ragged, responses: Ragged, group: np.ndarray, rows: Sequence[int], budget: int
) -> list[_Tree]:
    trees: list[_Tree] = []
    for row in rows:
        prompt, own = int(group[row]), int(responses.lengths[row])
        last = trees[-1] if trees else None
        if last is not None and last.prompt == prompt and last.length + own <= budget:
            trees[-1] = _Tree(prompt, (*last.responses, row), last.length + own)
        else:
            trees.append(_Tree(prompt, (row,), int(prompts.lengths[prompt]) + own))
    return trees


def _lay(bins: list[list[_Tree]], prompts: Ragged, responses: Ragged) -> TokenBatch:
    width = max(sum(tree.length for tree in trees) for trees in bins)
    ids = np.zeros((len(bins), width), np.int64)
    positions = np.zeros((len(bins), width), np.int64)
    tree_of = np.full((len(bins), width), -1, np.int64)  # which tree a token is in
    branch = np.zeros((len(bins), width), np.int64)  # 0: its prompt; b: its b-th response
    predict, targets, index, response, rows, ends = [], [], [], [], [], []
    for r, trees in enumerate(bins):
        at = 0
        for t, tree in enumerate(trees):
            prompt = prompts[tree.prompt]
            end = at + len(prompt)
            ids[r, at:end], positions[r, at:end], tree_of[r, at : at + tree.length] = (
                prompt,
                np.arange(len(prompt)),
                t,
            )
            last, at = end - 1, end
            for b, row in enumerate(tree.responses, start=1):
                own = responses[row]
                here = np.arange(at, at + len(own))
                ids[r, here], branch[r, here] = own, b
                positions[r, here] = len(prompt) + np.arange(len(own))
                predict.append(r * width + np.concatenate([[last], here[:-1]]))
                targets.append(own)
                index.append(np.arange(responses.offsets[row], responses.offsets[row + 1]))
                response.append(np.full(len(own), row))
                rows.append([row])
                ends.append([r * width + here[-1]])
                at += len(own)
    same_tree = tree_of[:, :, None] == tree_of[:, None, :]
    visible = same_tree & ((branch[:, None, :] == 0) | (branch[:, None, :] == branch[:, :, None]))
    visible &= np.tri(width, dtype=bool)
    mask = torch.zeros(visible.shape).masked_fill_(torch.from_numpy(~visible), torch.finfo(torch.float32).min)
    return TokenBatch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        mask[:, None],
        *[_flat(c) for c in (predict, targets, index, response, rows, ends)],
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
    predict, targets, index, response, ends = [], [], [], [], []
    for i, row in enumerate(batch):
        prompt, own = prompts[group[row]], responses[row]
        end = len(prompt) + len(own)
        ids[i, :end], mask[i, :end] = np.concatenate([prompt, own]), 1
        predict.append(i * width + len(prompt) - 1 + np.arange(len(own)))
        targets.append(own)
        index.append(np.arange(responses.offsets[row], responses.offsets[row + 1]))
        response.append(np.full(len(own), row))
        ends.append([i * width + end - 1])
    positions = np.broadcast_to(np.arange(width), ids.shape).copy()
    return TokenBatch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(mask),
        *[_flat(c) for c in (predict, targets, index, response, [batch], ends)],
    )


def _flat(parts: Any) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(np.int64))


Layout = Callable[[Ragged, Ragged, np.ndarray, Sequence[int], int], list[TokenBatch]]
"""`pack`, `pad`, or a choice between them."""


def layout(model: PreTrainedModel) -> Layout:
    """`pack` wherever it is exact for the model, else `pad`.

    A custom mask replaces a model's own, and so its sliding window: such a model is packed while every sequence fits
    its window.
    """
    if not takes_packing(model, model.config.get_text_config().vocab_size):
        return pad
    window = attention_window(model.config)
    if window is None:
        return pack

    def within(
        prompts: Ragged, responses: Ragged, group: np.ndarray, rows: Sequence[int], budget: int
    ) -> list[TokenBatch]:
        longest = max((int(prompts.lengths[group[r]] + responses.lengths[r]) for r in rows), default=0)
        return (pack if longest <= window else pad)(prompts, responses, group, rows, budget)

    return within


def attention_window(config: PretrainedConfig) -> int | None:
    """The tokens that the model's narrowest layer looks back on, itself included; None: all."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    spans = {
        "sliding": getattr(text, "sliding_window", None),
        "chunked": getattr(text, "attention_chunk_size", None),
    }
    used = [n for kind, n in spans.items() if n and (kinds is None or any(k.startswith(kind) for k in kinds))]
    return min(used, default=None)


@torch.no_grad()
def takes_packing(model: torch.nn.Module, vocabulary: int, tolerance: float = 1e-2) -> bool:
    """Whether the model gives packed tokens the log-probabilities of the plain way, tried on random tokens."""
    rng = np.random.default_rng(0)
    prompts = Ragged.of([rng.integers(vocabulary, size=n) for n in (5, 3)], np.int32)
    responses = Ragged.of([rng.integers(vocabulary, size=n) for n in (4, 6, 2)], np.int32)
    group = np.array([0, 0, 1])
    found = []
    for way in (pack, pad):
        flat = torch.empty(len(responses.values))
        for batch in way(prompts, responses, group, [0, 1, 2], 64):
            try:
                flat[batch.index] = token_logprobs(model, batch).float().cpu()
            except (ValueError, RuntimeError, TypeError):
                if way is pad:
                    raise
                return False
        found.append(flat)
    return bool((found[0] - found[1]).abs().max() <= tolerance)
