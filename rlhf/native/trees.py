"""Attention over trees by compiled code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from rlhf.models.trees import Tree
from rlhf.native import LANES, addresses, library, over, takes


def serves(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether there is compiled attention for these."""
    fits = query.shape[-1] == value.shape[-1] and query.shape[-1] % LANES == 0
    return fits and takes(query, key, value) and library() is not None


class NativeTreeAttention(torch.autograd.Function):
    """softmax(query key' scale) value of each token over what it sees in its tree, bfloat16, on a CPU.

    Products are summed in float32, the softmax is float32, its shares are rounded to bfloat16. The backward pass
    computes them again from the logarithm of each query's sum (arXiv 2205.14135).

    Args:
        query, key, value: bfloat16 [heads, T, width].

    Returns:
        bfloat16 [heads, T, width], laid out as [T, heads, width].
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        trees: Sequence[Tree],
        scale: float,
    ) -> torch.Tensor:
        query, key, value = (_in_rows(x) for x in (query, key, value))
        heads, tokens, width = query.shape
        out = _rows_like(query)
        logs = query.new_empty(heads, tokens, dtype=torch.float32)
        strides, shape = _strides(query, key, value, out), _shape(trees)
        data = addresses(query, key, value, out, logs, strides, shape)
        native: Any = library()

        def work(first: int, last: int) -> int:
            return native.tree_forward(*data, len(trees), first, last, tokens, width, scale)

        over(heads, work)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(query, key, value, out, logs)
            ctx.shape, ctx.trees, ctx.scale = shape, len(trees), scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, logs = ctx.saved_tensors
        heads, tokens, width = query.shape
        of = tuple(_rows_like(x) for x in (query, key, value))
        given = (query, key, value, out, _in_rows(gradient), *of)
        strides = _strides(*given)
        data = addresses(*given, logs, strides, ctx.shape)
        native: Any = library()

        def work(first: int, last: int) -> int:
            return native.tree_backward(*data, ctx.trees, first, last, tokens, width, ctx.scale)

        over(heads, work)
        return *of, None, None


def _in_rows(x: torch.Tensor) -> torch.Tensor:
    """With the elements of a token's head side by side, two to a word."""
    straight = x.stride(-1) == 1 and not any(s % 2 for s in (*x.stride()[:-1], x.storage_offset()))
    return x if straight else x.contiguous()


def _rows_like(x: torch.Tensor) -> torch.Tensor:
    heads, tokens, width = x.shape
    return x.new_empty(tokens, heads, width).transpose(0, 1)


def _strides(*tensors: torch.Tensor) -> np.ndarray:
    return np.array([s for x in tensors for s in x.stride()[:2]], np.int64)


def _shape(trees: Sequence[Tree]) -> np.ndarray:
    return np.array([n for t in trees for n in (t.prompt, len(t.responses), *t.responses)], np.int32)
