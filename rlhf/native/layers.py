"""Normalisation, gating and rotary positions by compiled code, in models whose own layers compute just that."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from rlhf.models.attempt import Failure, attempt
from rlhf.native import LANES, addresses, library, over, takes
from rlhf.native.rotary import fuse_rotary

ACTIVATIONS = {"SiLU", "SiLUActivation"}
PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}

log = logging.getLogger(__name__)


def fuse(model: torch.nn.Module) -> None:
    """Makes RMS norms, SiLU-gated MLPs and rotary positions of a model run compiled code, where it gives what they do.

    Only for bfloat16 on a CPU; whatever else they are called with, they compute as before. Parameters keep their names.
    """
    if library() is None or any(p.device.type != "cpu" for p in model.parameters()):
        return
    fuse_rotary(model)
    for module in model.modules():
        plain = module.forward
        if "forward" in vars(module):  # fused before
            continue
        if type(module).__name__.endswith("RMSNorm") and _normalises(module):
            module.forward = partial(_norm, module, plain, _epsilon(module))
        elif _gates(module):
            module.forward = partial(_gated, module, plain)


def fused_epsilon(module: torch.nn.Module) -> float | None:
    """What a fused norm adds to the mean square; None: it is not fused."""
    forward = vars(module).get("forward")
    return forward.args[2] if isinstance(forward, partial) and forward.func is _norm else None


def is_fused_gate(module: torch.nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is _gated


def _epsilon(module: Any) -> Any:
    return getattr(module, "variance_epsilon", None) or getattr(module, "eps", None)


def _norm(module: Any, plain: Callable[..., Any], epsilon: float, *given: Any, **named: Any) -> Any:
    if named or len(given) != 1 or not takes(given[0], module.weight):
        return plain(*given, **named)
    if torch.is_grad_enabled():
        return NativeNorm.apply(given[0], module.weight, epsilon)
    return _normed(given[0].contiguous(), module.weight, epsilon)[0]


@torch.no_grad()
def _normalises(module: Any) -> bool:
    """Whether a norm, in bfloat16, gives what compiled code gives: for numbers of common size, small ones and zeros."""
    weight, epsilon = getattr(module, "weight", None), _epsilon(module)
    if weight is None or epsilon is None or weight.ndim != 1 or len(weight) % LANES:
        return False
    theirs = copy.deepcopy(module).bfloat16()
    rows = torch.linspace(-3, 2, 4 * len(weight)).sin().view(4, -1)
    x = (rows * torch.tensor([[3.0], [1.0], [epsilon**0.5], [0.0]])).bfloat16()
    expected = attempt(lambda: theirs(x))
    if isinstance(expected, Failure):  # not a function of x alone
        log.info("%s keeps its own forward pass: %s", type(module).__name__, expected.reason)
        return False
    return bool(torch.allclose(_normed(x, theirs.weight, epsilon)[0], expected, rtol=2e-2, atol=1e-3))


@torch.no_grad()
def _gates(module: Any) -> bool:
    """Whether a module is down(silu(gate(x)) * up(x)): by its parts, and by what it gives for small and large x."""
    if {name for name, _ in module.named_children()} != PARTS:
        return False
    gate, up, down = module.gate_proj, module.up_proj, module.down_proj
    if type(module.act_fn).__name__ not in ACTIVATIONS or getattr(gate, "out_features", 1) % LANES:
        return False
    if not hasattr(gate, "in_features"):
        return False
    x = torch.linspace(-1, 1, 2 * gate.in_features).view(1, 2, -1).to(gate.weight)
    x = torch.cat([x, 30 * x, 1000 * x], 1)
    plain = attempt(lambda: down(torch.nn.functional.silu(gate(x)) * up(x)))
    own = attempt(lambda: module(x))
    if isinstance(plain, Failure) or isinstance(own, Failure):
        log.info("%s keeps its own forward pass: %s, %s", type(module).__name__, plain, own)
        return False
    return torch.equal(plain, own)


def _gated(module: Any, plain: Callable[..., torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    if not takes(x):
        return plain(x)
    gate, up = module.gate_proj(x), module.up_proj(x)
    if torch.is_grad_enabled():
        return module.down_proj(NativeGate.apply(gate, up))
    return module.down_proj(_gate_times(gate, up))


def _normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The normalised rows, and 1 / rms of each, float32 [rows]."""
    width = x.shape[-1]
    rows = x.numel() // width
    out, inverse = torch.empty_like(x), x.new_empty(rows, dtype=torch.float32)
    native: Any = library()
    data = addresses(x, weight, out, inverse)
    over(rows, lambda a, b: native.norm_forward(*data, a, b, width, epsilon))
    return out, inverse


def _gate_times(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    width = gate.shape[-1]
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    native: Any = library()
    data = addresses(gate, up, out)
    over(gate.numel() // width, lambda a, b: native.gate_forward(*data, a, b, width))
    return out


class NativeNorm(torch.autograd.Function):
    """x / sqrt(mean(x^2) + epsilon) * weight over the last dimension (arXiv 1910.07467), bfloat16 [..., width]."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        x = x.contiguous()
        out, inverse = _normed(x, weight, epsilon)
        ctx.save_for_backward(x, weight, inverse)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        gradient = gradient.contiguous()
        width = x.shape[-1]
        of_x = torch.empty_like(x)
        parts: dict[int, torch.Tensor] = {}  # by the first row
        native: Any = library()

        def work(first: int, last: int) -> int:
            of_weight = parts[first] = x.new_zeros(width, dtype=torch.float32)
            data = addresses(x, weight, inverse, gradient, of_x, of_weight)
            return native.norm_backward(*data, first, last, width)

        over(len(inverse), work)
        every = torch.stack([parts[first] for first in sorted(parts)])
        return of_x, every.sum(0).to(weight.dtype), None


class NativeGate(torch.autograd.Function):
    """silu(gate) * up (arXiv 2002.05202), bfloat16 of any shape whose last dimension is a multiple of LANES."""

    @staticmethod
    def forward(ctx: Any, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        return _gate_times(gate, up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        gate, up = ctx.saved_tensors
        of_gate, of_up = torch.empty_like(gate), torch.empty_like(up)
        width = gate.shape[-1]
        native: Any = library()
        gradient = gradient.contiguous()
        data = addresses(gate, up, gradient, of_gate, of_up)
        over(gate.numel() // width, lambda a, b: native.gate_backward(*data, a, b, width))
        return of_gate, of_up
