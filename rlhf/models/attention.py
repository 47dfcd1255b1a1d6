"""Attention over trees: a prompt and the responses that branch from it, side by side in one flat sequence.

Registered with transformers under `NAME`. Called without `trees`, it is PyTorch's scaled dot product attention. With
them the sequence [1, T] holds one tree after another, without padding, and each token sees its own tree only: a prompt
token the prompt so far, a response token the prompt and its own response so far. What a response cannot see is hardly
computed: responses attend in blocks, each against the prompt and the block.

On a CPU queries, keys and values are float32 here: its bfloat16 kernel is slower backward.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rlhf_trees"
BLOCK = 128  # response tokens that attend together, at least; the prompt's length, if that is more


@dataclass(frozen=True)
class Tree:
    """`prompt` tokens, then blocks of whole responses; `masks[b]` is additive, [block, prompt + block]."""

    prompt: int
    blocks: tuple[int, ...]
    masks: tuple[torch.Tensor, ...]

    def to(self, device: torch.device, dtype: torch.dtype) -> Tree:
        return Tree(self.prompt, self.blocks, tuple(m.to(device, dtype) for m in self.masks))

    @classmethod
    def of(cls, prompt: int, responses: Sequence[int]) -> Tree:
        """Of a prompt and its responses, by their lengths."""
        room = max(BLOCK, prompt)
        blocks: list[list[int]] = []
        for length in responses:
            if blocks and sum(blocks[-1]) + length <= room:
                blocks[-1].append(length)
            else:
                blocks.append([length])
        return cls(prompt, tuple(map(sum, blocks)), tuple(_mask(prompt, block) for block in blocks))


def _mask(prompt: int, responses: Sequence[int]) -> torch.Tensor:
    """What the tokens of a block of responses see, additive float32 [block, prompt + block]."""
    own = torch.repeat_interleave(torch.arange(len(responses)), torch.tensor(responses))
    visible = (own[:, None] == own[None, :]).tril_()
    hidden = torch.cat([torch.zeros(len(own), prompt, dtype=torch.bool), ~visible], 1)
    return torch.zeros(hidden.shape).masked_fill_(hidden, torch.finfo(torch.float32).min)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    trees: Sequence[Tree] | None = None,
    decoding: Any = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """With trees: query [1, heads, T, width], keys and values [1, key heads, T, width]; the result is
    [1, T, heads, width]. With `decoding`, a `SharedCache`, its rows' next tokens attend to what it holds."""
    if decoding is not None:
        window = kwargs.get("sliding_window")
        out = decoding.attend(module.layer_idx, query, scaling, softcap, window)
        return out.transpose(1, 2), None
    if trees is None and softcap is None:
        out, _ = sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        return out, None
    groups = query.shape[1] // key.shape[1]
    dtype = query.dtype
    if query.device.type == "cpu":
        query, key, value = query.float(), key.float(), value.float()
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if trees is None:
        mask = _additive(attention_mask, query)
        out = _attend(query, key, value, mask, scaling, softcap)
        return out.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format), None
    sizes = [n for tree in trees for n in (tree.prompt, *tree.blocks)]
    queries, keys, values = (iter(x.split(sizes, 2)) for x in (query, key, value))
    parts = []
    for tree in trees:
        q, k, v = next(queries), next(keys), next(values)
        if tree.prompt:
            parts.append(_attend(q, k, v, None, scaling, softcap))
        for mask in tree.masks:
            own_k, own_v = next(keys), next(values)
            both = torch.cat([k, own_k], 2), torch.cat([v, own_v], 2)
            parts.append(_attend(next(queries), *both, mask, scaling, softcap))
    return torch.cat(parts, 2).transpose(1, 2).to(dtype, memory_format=torch.contiguous_format), None


def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    softcap: float | None,
) -> torch.Tensor:
    """Under an additive mask, or causal. A cap on the scores (Gemma 2) has no kernel."""
    if softcap is None:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, mask, is_causal=mask is None, scale=scaling
        )
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        mask = _mask(0, [query.shape[2]]).to(scores)
    return torch.softmax(scores + mask, -1) @ value


def _additive(mask: torch.Tensor | None, query: torch.Tensor) -> torch.Tensor | None:
    """transformers' mask: boolean, True where visible, or nothing, for causal or a single token."""
    if mask is None:
        return None if query.shape[2] > 1 else query.new_zeros(1, 1)
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    return torch.zeros(mask.shape, device=mask.device).masked_fill_(~mask, torch.finfo(torch.float32).min)


@dataclass
class Trial:
    """`possible`: the model attends by `attention`, until the trial ends without `kept`."""

    possible: bool
    kept: bool = False


@contextmanager
def tried(model: PreTrainedModel) -> Iterator[Trial]:
    """Makes the model attend by `attention`; for good, if the block sets `kept`. A model that fails on it keeps its
    own attention."""
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    trial = Trial(before is not None and model._can_set_attn_implementation())
    if trial.possible:
        model.set_attn_implementation(NAME)
    try:
        yield trial
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError):
        trial.kept = False
    if trial.possible and not trial.kept:
        model.set_attn_implementation(before)


def is_ours(model: Any) -> bool:
    """Whether the model attends by `attention`: any other would take no notice of trees."""
    return model.config._attn_implementation == NAME


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
