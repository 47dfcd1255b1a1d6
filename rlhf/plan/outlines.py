"""Models without weights, on the meta device, that compute as ours do: packed, under our attention, with compiled
layers where this machine has them. What trials find of a model when it is loaded is assumed here."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable
from transformers import AttentionInterface

from rlhf.learn.batching import Layout, TokenBatch
from rlhf.learn.logprobs import CHUNK, PolicyModel
from rlhf.models import attention
from rlhf.models.last_layer import LastLayer
from rlhf.models.reach import Reach
from rlhf.models.trees import Part, Tree, TreeAttention
from rlhf.native import LANES, library
from rlhf.native.layers import PARTS

META = torch.device("meta")


def to_meta(value: Any) -> Any:
    return value.to(META) if isinstance(value, torch.Tensor) else value


class OutlinedLayer(LastLayer):
    def _fault(self) -> str | None:
        return None


class OutlinedPolicy(PolicyModel):
    """A policy whose layout, head and last layer are taken to be as most are."""

    def __init__(self, inner: Any, chunk: int = CHUNK) -> None:
        torch.nn.Module.__init__(self)
        self.inner, self.chunk, self.notes, self.by_chunks = inner, chunk, [], True
        config = self._plain.config
        text = config.get_text_config()
        self._cap = getattr(text, "final_logit_softcapping", None)
        self.lay = Layout(True, Reach.of(config))
        self._vocabulary = text.vocab_size
        self._last = OutlinedLayer(self._plain.base_model)

    def logprobs(self, batch: TokenBatch, temperature: float) -> torch.Tensor:
        """Of the batch's response tokens, as `token_logprobs`."""
        predict, targets = batch.predict.to(META), batch.targets.to(META)
        given = {name: to_meta(value) for name, value in batch.inputs(next(self.parameters())).items()}
        needed = predict.new_empty(len(batch.predict.unique())) if batch.trees is not None else None
        states = self._states(needed, given).flatten(0, 1)[predict]
        return self._of_states(states, targets, temperature, False)


class _Compiled(torch.autograd.Function):
    """What attention that computes its shares again in the backward pass keeps, and gives."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        heads, tokens, _ = query.shape
        out = query.new_empty(tokens, heads, value.shape[-1]).transpose(0, 1)
        ctx.save_for_backward(query, key, value, out, query.new_empty(heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    trees: Sequence[Tree] | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`attention.attention` of a CPU."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    compiled = compiles(query.dtype) and query.shape[-1] == value.shape[-1] and query.shape[-1] % LANES == 0
    if trees is not None and softcap is None and not compiled and all(tree.short for tree in trees):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        for tree in trees:
            _lay_parts(tree, query.dtype)
        out = TreeAttention.apply(query[0], key[0], value[0], trees, scale)
        return out.transpose(0, 1)[None], None
    if not compiled:
        query, key, value = query.float(), key.float(), value.float()
    rows = [_Compiled.apply(q, k, v) for q, k, v in zip(query, key, value, strict=True)]
    return torch.stack(rows).transpose(1, 2).to(module_dtype(module)), None


def _lay_parts(tree: Tree, dtype: torch.dtype) -> None:
    """The parts that a tree has on a CPU, for the meta device."""
    key = (META, torch.float32)
    if key not in tree._parts:
        tree._parts[key] = [
            Part(p.start, p.stop, p.prefix, p.own, None if p.mask is None else p.mask.to(META))
            for p in tree.parts(torch.empty(0))
        ]
    tree._parts[META, dtype] = tree._parts[key]


def module_dtype(module: torch.nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


@contextmanager
def planned_attention() -> Iterator[None]:
    """Within this context the attention of ours takes what it takes on a CPU, and computes nothing."""
    AttentionInterface.register(attention.TREES, _attention)
    try:
        yield
    finally:
        AttentionInterface.register(attention.TREES, attention.attention)


def compiles(dtype: torch.dtype) -> bool:
    """Whether layers of this format are compiled, on a machine like this one."""
    return dtype == torch.bfloat16 and library() is not None


def computes_as_ours(model: Any, dtype: torch.dtype) -> None:
    """Gives an outline our attention, a format, and norms and gates that keep what compiled ones keep."""
    if model._can_set_attn_implementation():
        model.set_attn_implementation(attention.TREES)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    if not compiles(dtype):
        return
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if type(module).__name__.endswith("RMSNorm") and weight is not None:
            module.forward = partial(_Norm.apply, weight)
        elif {name for name, _ in module.named_children()} == PARTS:
            module.forward = partial(_gated, module)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, weight, x.new_empty(x.shape[:-1], dtype=torch.float32))
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(weight), torch.empty_like(x)


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        return torch.empty_like(gate), torch.empty_like(up)


def _gated(module: Any, x: torch.Tensor) -> torch.Tensor:
    return module.down_proj(_Gate.apply(module.gate_proj(x), module.up_proj(x)))
