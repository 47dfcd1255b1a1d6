"""Linear layers by compiled code: a weight in panels that are read once from memory, for any number of rows."""

from __future__ import annotations

from typing import Any

import torch

from rlhf.native import addresses, library, over, takes

PANEL = 32
"""Outputs of a panel, as in rlhf/native/linear.c."""


class Panels:
    """A weight [outputs, inputs] as `linear` of rlhf/native/linear.c reads it; `inputs` is even."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.outputs, self.inputs = weight.shape
        self._count = -(-self.outputs // PANEL)
        self._words = torch.empty(self._count * PANEL * self.inputs // 2, dtype=torch.int32)
        self.take(weight)

    @staticmethod
    def serves(weight: torch.Tensor) -> bool:
        return takes(weight) and weight.shape[1] % 2 == 0 and library() is not None

    def take(self, weight: torch.Tensor) -> None:
        native: Any = library()
        weight = weight.to(torch.bfloat16).contiguous()
        data = addresses(weight, self._words)
        over(self._count, lambda a, b: native.pack_linear(*data, a, b, self.inputs, self.outputs))

    def multiply(self, x: int, bias: int | None, residual: int | None, out: int, rows: int) -> None:
        """out = x weight^T + bias + residual, all by address, rows side by side; `out` may be `residual`."""
        native: Any = library()
        words, threads = self._words.data_ptr(), torch.get_num_threads()
        native.linear(x, words, bias, residual, out, rows, self.inputs, self.outputs, threads)

    def __call__(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """x: bfloat16 [..., inputs]."""
        if not takes(x) or x.shape[-1] != self.inputs:
            raise TypeError(f"bfloat16 [..., {self.inputs}] is needed, not {x.dtype} {list(x.shape)}")
        x = x.contiguous()
        out = x.new_empty(*x.shape[:-1], self.outputs)
        at = None if bias is None else bias.data_ptr()
        self.multiply(x.data_ptr(), at, None, out.data_ptr(), x.numel() // self.inputs)
        return out
