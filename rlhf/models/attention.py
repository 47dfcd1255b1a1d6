"""The attention that models here are given: over trees, while sampling, or plain.

Registered with transformers in two ways, of which a model's device decides (`way_for`): `TREES` goes tree by tree, by
kernels for CPUs (`rlhf/models/trees.py`), `MASKED` takes several trees to a call of PyTorch's scaled dot product
attention under a mask, on any device (`rlhf/models/forest.py`). Called without `trees`, both are that attention. With
them the sequence [1, T] holds one tree after another, without padding, and each token sees its own tree only.

Scores are float32 on a CPU, whatever the model computes in, but for those of `MASKED`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.models.device import is_gpu
from rlhf.models.forest import spans
from rlhf.models.trees import Tree, TreeAttention, hiding, places
from rlhf.native import trees as native
from rlhf.native.trees import NativeTreeAttention

TREES, MASKED = "rlhf_trees", "rlhf_masked"


def way_for(device: str) -> str:
    """The fastest on a device."""
    return MASKED if is_gpu(device) else TREES


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
    masked: bool = False,
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
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    dtype, cpu = query.dtype, query.device.type == "cpu"
    if trees is not None and masked:
        parts = [
            _attend(query[:, :, s.start : s.stop], s.seen(key), s.seen(value), s.mask, scaling, softcap)
            for s in spans(tuple(trees), query.device, dtype)
        ]
        return torch.cat(parts, 2).transpose(1, 2).contiguous(), None
    if trees is not None and cpu and softcap is None:
        compiled = native.serves(query, key, value)
        if compiled or all(tree.short for tree in trees):
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            way = NativeTreeAttention if compiled else TreeAttention
            return way.apply(query[0], key[0], value[0], trees, scale).transpose(0, 1)[None], None
    if cpu:
        query, key, value = query.float(), key.float(), value.float()
    if trees is None:
        out = _attend(query, key, value, _additive(attention_mask, query), scaling, softcap)
    else:
        parts = [
            _attend(
                query[:, :, at + part.start : at + part.stop],
                part.keys(key[0], at)[None],
                part.keys(value[0], at)[None],
                part.mask,
                scaling,
                softcap,
            )
            for at, tree in places(trees)
            for part in tree.parts(query)
        ]
        out = torch.cat(parts, 2)
    return out.transpose(1, 2).to(dtype, memory_format=torch.contiguous_format), None


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
        mask = hiding(0, [query.shape[2]]).to(scores)
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
def tried(model: PreTrainedModel, way: str | None = None) -> Iterator[Trial]:
    """Makes the model attend by `attention`, in a way of it (None: that of its device); for good, if the block sets
    `kept`."""
    before = getattr(getattr(model, "config", None), "_attn_implementation", None)
    trial = Trial(before is not None and model._can_set_attn_implementation())
    if trial.possible:
        model.set_attn_implementation(way or way_for(model.device.type))
    try:
        yield trial
    finally:
        if trial.possible and not trial.kept:
            model.set_attn_implementation(before)


def is_ours(model: Any) -> bool:
    """Whether the model attends by `attention`: any other would take no notice of trees."""
    return model.config._attn_implementation in (TREES, MASKED)


AttentionInterface.register(TREES, attention)
AttentionInterface.register(MASKED, partial(attention, masked=True))
for _way in (TREES, MASKED):
    AttentionMaskInterface.register(_way, sdpa_mask)
