"""Linear layers whose weights lie as the CPU's matrix kernels want them, for models that are not trained.

PyTorch rearranges a weight at every call; here that is done once. bfloat16 takes the panels of rlhf/native/linear.c
where they serve: for a few rows at a time twice as fast as oneDNN's layout, for many alike. Others take oneDNN's, by
`torch.ops.mkldnn`, which PyTorch's own compiler uses for frozen models. Where both are missing or give other results,
layers stay as they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from rlhf.models.attempt import Failure, attempt
from rlhf.native.linear import Panels

log = logging.getLogger(__name__)


class PackedLinear(torch.nn.Module):
    """A linear layer, for inference.

    Args:
        rows: what a call typically has.
        source: the name of the weight in the model, which may be an embedding's.
    """

    def __init__(self, linear: torch.nn.Linear, rows: int, source: str) -> None:
        super().__init__()
        self.bias, self.source = linear.bias, source
        self._shape, self._dtype, self._rows = linear.weight.shape, linear.weight.dtype, rows
        self.panels = Panels(linear.weight.detach()) if Panels.serves(linear.weight) else None
        if self.panels is None:
            self.take(linear.weight.detach())

    def take(self, weight: torch.Tensor) -> None:
        """Takes a new weight [outputs, inputs]."""
        weight = weight.view(self._shape).to(self._dtype)
        if self.panels is not None:
            self.panels.take(weight)
        else:
            self._packed: Any = torch.ops.mkldnn._reorder_linear_weight(weight, self._rows)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.panels is not None:
            return self.panels(x, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self.bias, "none", [], "")


def pack(model: torch.nn.Module, rows: int, leave: torch.nn.Module | None = None, tied: bool = False) -> None:
    """Packs the linear layers of a model on the CPU. A model that uses their weights itself keeps them.

    Args:
        model: called with `input_ids` and `attention_mask`.
        rows: what a call typically has.
        leave: a layer to leave as it is.
        tied: also layers whose weight is an embedding's as well: it then lies in memory twice.
    """
    if next(model.parameters()).device.type != "cpu":
        return
    shared: dict[int, int] = {}
    for parameter in (p for m in model.modules() for p in m.parameters(recurse=False)):
        shared[id(parameter)] = shared.get(id(parameter), 0) + 1
    sources = {id(parameter): name for name, parameter in model.named_parameters()}
    plain: list[tuple[torch.nn.Module, str, torch.nn.Linear]] = []
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not torch.nn.Linear or child is leave:
                continue
            if tied or shared[id(child.weight)] == 1:
                packed = _packed(child, rows, sources[id(child.weight)])
                if packed is not None:
                    plain.append((parent, name, child))
                    setattr(parent, name, packed)
    fault = attempt(partial(_call, model)) if plain else None
    if isinstance(fault, Failure):
        log.warning("%s: its layers keep PyTorch's layout: %s", type(model).__name__, fault.reason)
        for parent, name, child in plain:
            setattr(parent, name, child)


@torch.no_grad()
def _call(model: torch.nn.Module) -> None:
    ids = torch.zeros(1, 4, dtype=torch.long)
    model(input_ids=ids, attention_mask=torch.ones_like(ids))


@torch.no_grad()
def _packed(linear: torch.nn.Linear, rows: int, source: str) -> PackedLinear | None:
    """The packed layer, if this PyTorch and processor have it and it computes the same."""
    x = torch.linspace(-1, 1, 2 * linear.in_features, dtype=linear.weight.dtype).view(1, 2, -1)
    packed = attempt(lambda: PackedLinear(linear, rows, source))
    found = packed if isinstance(packed, Failure) else attempt(lambda: packed(x).float())
    if isinstance(packed, Failure) or isinstance(found, Failure):
        log.warning("%s keeps PyTorch's layout: %s", source, found)
        return None
    plain = linear(x).float()
    near = 2e-2 * (plain.abs() + plain.abs().max())
    same = ((found - plain).abs() <= near).all()  # false where a weight is NaN
    return packed if same else None


def receivers(model: torch.nn.Module) -> dict[str, list[Callable[[torch.Tensor], Any]]]:
    """What takes a new weight, by its name in the model before it was packed."""
    found: dict[str, list[Callable[[torch.Tensor], Any]]] = {}
    for name, parameter in model.named_parameters():
        found[name] = [partial(_copy, parameter)]
    for module in model.modules():
        if isinstance(module, PackedLinear):
            found.setdefault(module.source, []).append(module.take)
    return found


@torch.no_grad()
def _copy(parameter: torch.Tensor, weight: torch.Tensor) -> None:
    parameter.copy_(weight.view(parameter.shape))
