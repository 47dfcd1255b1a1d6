"""Rotary positions (arXiv 2104.09864) by compiled code, in the modelling files of transformers that rotate halves."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.autograd.function import once_differentiable

from rlhf.models.attempt import Failure, attempt
from rlhf.native import LANES, addresses, library, over, takes

NAME = "apply_rotary_pos_emb"
"""What transformers' modelling files call it: a function of each file, found by name at every call."""
MARK = "rlhf_plain"
"""The attribute of ours that holds theirs."""

log = logging.getLogger(__name__)


def fuse_rotary(model: torch.nn.Module) -> None:
    """Makes the modelling files of a model rotate by compiled code, if theirs rotates halves. Only for bfloat16 on a
    CPU; whatever else it is called with goes to their own function."""
    for name in {type(module).__module__ for module in model.modules()}:
        file: Any = sys.modules.get(name)
        theirs = getattr(file, NAME, None)
        if theirs is not None and not hasattr(theirs, MARK) and _same(theirs):
            setattr(file, NAME, _ours(theirs))


def rotates(module: torch.nn.Module) -> bool:
    """Whether the modelling file of a module rotates by compiled code."""
    return hasattr(getattr(sys.modules[type(module).__module__], NAME, None), MARK)


def _ours(theirs: Callable[..., Any]) -> Callable[..., Any]:
    def apply_rotary_pos_emb(*given: Any, **named: Any) -> Any:
        if named or len(given) != 4 or not _fits(*given):
            return theirs(*given, **named)
        q, k, cos, sin = given
        cos, sin = (x.expand(q.shape[0], -1, -1).contiguous() for x in (cos, sin))
        return Rotated.apply(q, cos, sin), Rotated.apply(k, cos, sin)

    setattr(apply_rotary_pos_emb, MARK, theirs)
    return apply_rotary_pos_emb


def _fits(q: Any, k: Any, cos: Any, sin: Any) -> bool:
    """q, k: [B, heads, T, width]; cos, sin: [B or 1, T, width]."""
    if not all(isinstance(x, torch.Tensor) for x in (q, k, cos, sin)):
        return False
    width = q.shape[-1]
    shaped = q.ndim == k.ndim == 4 and cos.ndim == sin.ndim == 3 and q.shape[2] == k.shape[2] == cos.shape[1]
    return (
        takes(q, k, cos, sin)
        and shaped
        and k.shape[-1] == cos.shape[-1] == width
        and width % (2 * LANES) == 0
    )


@torch.no_grad()
def _same(theirs: Callable[..., Any]) -> bool:
    """Whether a function gives what compiled code gives, on a few numbers."""
    if library() is None:
        return False
    numbers = torch.linspace(-2, 2, 2 * 3 * 4 * 32, device="cpu").sin().bfloat16()
    q, k = numbers.view(2, 3, 4, 32), numbers.flip(0).view(2, 3, 4, 32)
    angles = torch.linspace(0, 9, 2 * 4 * 16).view(2, 4, 16).repeat(1, 1, 2)
    cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
    found = attempt(lambda: theirs(q, k, cos, sin))
    if isinstance(found, Failure):
        log.info("%s.%s is not compiled: %s", theirs.__module__, NAME, found.reason)
        return False
    ours = _ours(theirs)(q, k, cos, sin)
    return all(torch.allclose(a, b, rtol=2e-2, atol=1e-3) for a, b in zip(found, ours, strict=True))


class Rotated(torch.autograd.Function):
    """x: bfloat16 [B, heads, T, width]; cos, sin: bfloat16 [B, T, width]. As x, laid out as [B, T, heads, width]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, back=False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _rotated(gradient, cos, sin, back=True), None, None


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, back: bool) -> torch.Tensor:
    batch, heads, tokens, width = x.shape
    x = x.transpose(1, 2)
    if x.stride(-1) != 1 or (tokens > 1 and batch > 1 and x.stride(0) != tokens * x.stride(1)):
        x = x.contiguous()  # rows, of batch and token, at one distance
    out = x.new_empty(batch, tokens, heads, width)
    strides = np.array([x.stride(1 if tokens > 1 else 0), x.stride(2), heads * width, width], np.int64)
    native: Any = library()
    data = addresses(x, cos, sin, out, strides)
    over(batch * tokens, lambda a, b: native.rotate(*data, a, b, heads, width, int(back)))
    return out.transpose(1, 2)
