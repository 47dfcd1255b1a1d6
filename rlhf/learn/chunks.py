"""A module computed in parts within one call of it, none of which is kept for the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.function import once_differentiable

Part = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(states [n, width], targets int64 [n]) to values [rows, n]."""


@contextmanager
def computing(module: torch.nn.Module, forward: Callable[[torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Within this context a call of the module computes `forward`, with all hooks of the module around it."""
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def in_chunks(
    part: Part,
    states: torch.Tensor,
    targets: torch.Tensor,
    size: int,
    parameters: Iterable[torch.nn.Parameter],
) -> torch.Tensor:
    """`part` of all rows, `size` at a time, [rows, N]. More than one chunk is computed again in the backward pass.

    The gradients of `parameters`, those that `part` depends on, add up in float32 over chunks, and come in the same
    order for any number of them: ZeRO 2 adds up over ranks what comes first on each, second on each and so on.
    """
    if not torch.is_grad_enabled():
        return _over_chunks(part, states, targets, size)
    return _InChunks.apply(part, size, targets, states, *(p for p in parameters if p.requires_grad))


def _over_chunks(part: Part, states: torch.Tensor, targets: torch.Tensor, size: int) -> torch.Tensor:
    if len(states) <= size:
        return part(states, targets)
    parts = zip(states.split(size), targets.split(size), strict=True)
    return torch.cat([part(s, t) for s, t in parts], -1)


class _InChunks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        part: Part,
        size: int,
        targets: torch.Tensor,
        states: torch.Tensor,
        *parameters: torch.nn.Parameter,
    ) -> torch.Tensor:
        ctx.part, ctx.size, ctx.parameters = part, size, parameters
        if len(states) > size:
            ctx.save_for_backward(targets, states)
            return _over_chunks(part, states, targets, size)
        ctx.only = _again(part, states, targets)
        return ctx.only[1].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if not ctx.saved_tensors:
            start, found = ctx.only
            ctx.only = None
            return None, None, None, *torch.autograd.grad(found, [start, *ctx.parameters], gradient)
        targets, states = ctx.saved_tensors
        of_states = torch.empty_like(states)
        sums = [torch.zeros_like(p, dtype=torch.float32) for p in ctx.parameters]
        rows = (x.split(ctx.size) for x in (states, targets, of_states))
        for s, t, out, g in zip(*rows, gradient.split(ctx.size, -1), strict=True):
            start, found = _again(ctx.part, s, t)
            first, *others = torch.autograd.grad(found, [start, *ctx.parameters], g)
            out.copy_(first)
            for total, other in zip(sums, others, strict=True):
                total.add_(other)
        of_parameters = [total.to(p.dtype) for total, p in zip(sums, ctx.parameters, strict=True)]
        return None, None, None, of_states, *of_parameters


def _again(part: Part, states: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The states as the start of a graph of their own, and `part` of them."""
    start = states.detach().requires_grad_()
    with torch.enable_grad():
        return start, part(start, targets)
