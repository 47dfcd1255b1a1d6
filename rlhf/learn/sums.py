"""Gradients that PyTorch adds up in bfloat16 on a CPU, added up in float32.

Those are of embeddings, over the places where a token stands, and of layer norms, over all tokens: 4096 times 1/256 is
1 there, not 16. What other layers add up is float32 within.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable


def sum_in_float32(model: torch.nn.Module) -> None:
    """Makes the embeddings and layer norms of a model, with weights of bfloat16 on a CPU, add up so. What they compute
    stays as it is."""
    modules: list[Any] = [module for module in model.modules() if "forward" not in vars(module)]
    for module in modules:
        kind = type(module)
        if issubclass(kind, torch.nn.Embedding) and _by_id(module):
            module.forward = partial(_looked_up, module, module.forward)
        elif kind is torch.nn.LayerNorm:
            module.forward = partial(_normalised, module, module.forward)


@torch.no_grad()
def _by_id(embedding: Any) -> bool:
    """Whether an embedding takes ids alone and an id's output is the same wherever it stands."""
    if len(inspect.signature(type(embedding).forward).parameters) != 2:  # itself and the ids
        return False
    ids = torch.tensor([0, embedding.num_embeddings - 1], device=embedding.weight.device)
    places = torch.tensor([[0, 1, 0]], device=ids.device)
    return torch.equal(embedding(ids[places]), embedding(ids)[places])


def _concerned(module: Any) -> bool:
    weight = module.weight
    return (
        torch.is_grad_enabled()
        and weight is not None
        and weight.requires_grad
        and (weight.dtype, weight.device.type) == (torch.bfloat16, "cpu")
    )


def _looked_up(module: Any, plain: Callable[..., torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    if not _concerned(module):
        return plain(ids)
    distinct, places = ids.unique(return_inverse=True)
    return _Rows.apply(plain(distinct), places)


def _normalised(module: Any, plain: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if not _concerned(module):
        return plain(x)
    bias = None if module.bias is None else module.bias.float()
    shape, weight = module.normalized_shape, module.weight.float()
    return torch.nn.functional.layer_norm(x.float(), shape, weight, bias, module.eps).to(x.dtype)


class _Rows(torch.autograd.Function):
    """rows[places], [*places, width]."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.shape = rows.shape
        return rows[places]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        sums = gradient.new_zeros(ctx.shape, dtype=torch.float32)
        sums.index_add_(0, places.flatten(), gradient.reshape(-1, gradient.shape[-1]).float())
        return sums.to(gradient.dtype), None
