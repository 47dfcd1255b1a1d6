"""Linear layers whose weights lie as the CPU's matrix kernels want them, for models that are not trained.

PyTorch rearranges a weight at every call; oneDNN's layout is made once here: twice as fast for a few rows, a tenth to a
fifth for many. `torch.ops.mkldnn` is what PyTorch's own compiler uses for frozen models; where it is missing or gives
other results, layers stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch


class PackedLinear(torch.nn.Module):
    """`linear`, for inference. With `keep` the plain weight stays, to be changed and packed again."""

    def __init__(self, linear: torch.nn.Linear, rows: int, keep: bool) -> None:
        super().__init__()
        self._rows = rows
        self.weight: Any = linear.weight
        self.bias = linear.bias
        self.pack()
        if not keep:
            self.weight = None

    def pack(self) -> None:
        assert self.weight is not None
        self._packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), self._rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def pack(model: torch.nn.Module, rows: int, keep: bool = False, leave: torch.nn.Module | None = None) -> None:
    """Packs the linear layers of a model on the CPU, but for `leave`; `rows` are what a call typically has."""
    if next(model.parameters()).device.type != "cpu":
        return
    shared: dict[int, int] = {}
    for parameter in (p for m in model.modules() for p in m.parameters(recurse=False)):
        shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is torch.nn.Linear and child is not leave and shared[id(child.weight)] == 1:
                packed = _packed(child, rows, keep)
                if packed is not None:
                    setattr(parent, name, packed)


@torch.no_grad()
def _packed(linear: torch.nn.Linear, rows: int, keep: bool) -> PackedLinear | None:
    """The packed layer, if this PyTorch and processor have it and it computes the same."""
    try:
        packed = PackedLinear(linear, rows, keep=True)
        x = torch.linspace(-1, 1, 2 * linear.in_features, dtype=linear.weight.dtype).view(1, 2, -1)
        found, plain = packed(x).float(), linear(x).float()
    except (AttributeError, RuntimeError):
        return None
    if not torch.allclose(found, plain, rtol=2e-2, atol=2e-2 * float(plain.abs().max())):
        return None
    if not keep:
        packed.weight = None
    return packed


def pack_again(model: torch.nn.Module) -> None:
    """After a change of the weights."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.pack()
