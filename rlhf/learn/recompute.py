"""Activations that are not kept for the backward pass: each decoder layer's are computed again in it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.models import probe
from rlhf.models.attempt import Failure, attempt

KEY = "deepspeed.activation_checkpointing"
TRIED = 8
"""Tokens that it is tried on."""
TOLERANCE = 1e-3
"""Of their gradient, relative to the largest."""


def recompute_layers(model: Any) -> None:
    """Makes a model keep the inputs of its decoder layers only, in passes with gradient.

    Raises:
        ValueError: the model has no layers that can be computed twice, or gets other gradients so. It names the model
            and `deepspeed.activation_checkpointing`.
    """
    layers = recomputable(model)
    if not layers:
        raise ValueError(_refusal(model, "its code has no layers that transformers can compute again"))
    before = _gradient(model, layers)
    for layer in layers:
        layer.forward = partial(_again, layer.forward)
    after = attempt(lambda: _gradient(model, layers))
    if isinstance(after, Failure):
        raise ValueError(_refusal(model, after.reason))
    for expected, found in zip(before, after, strict=True):
        if (found - expected).abs().max() > TOLERANCE * expected.abs().max():
            raise ValueError(_refusal(model, "its gradient becomes another"))


def recomputable(model: Any) -> list[Any]:
    """The outermost decoder layers, but for one with hooks (`LastLayer`): what they do holds while they are called
    first. That is the last one, whose activations are the first to be needed."""
    found: list[Any] = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    inside = {id(part) for layer in found for part in layer.modules() if part is not layer}
    return [layer for layer in found if id(layer) not in inside and not _hooked(layer)]


def _hooked(layer: torch.nn.Module) -> bool:
    return any(part._forward_pre_hooks or part._forward_hooks for part in layer.modules())


def _again(plain: Callable[..., Any], *given: Any, **named: Any) -> Any:
    if not torch.is_grad_enabled():
        return plain(*given, **named)
    return checkpoint(plain, *given, use_reentrant=False, preserve_rng_state=False, **named)


def _gradient(model: Any, layers: list[Any]) -> tuple[torch.Tensor, ...]:
    """Of the first layer that is trained, tried on random tokens."""
    inner = getattr(model, "inner", model)
    trained = ([p for p in layer.parameters() if p.requires_grad] for layer in layers)
    wanted = next((own for own in trained if own), [])
    config: Any = inner.config
    vocabulary = config.get_text_config().vocab_size
    ids = torch.from_numpy(probe.sequences([TRIED], vocabulary)[0])[None].to(next(inner.parameters()).device)
    with torch.enable_grad():
        logits = inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).logits
        found = torch.autograd.grad(logits.float().square().sum(), wanted, allow_unused=True)
    return tuple(part for part in found if part is not None)


def _refusal(model: Any, why: str) -> str:
    inner = getattr(model, "inner", model)
    plain = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
    return f"{KEY}=true: {type(plain).__name__} cannot be trained so: {why}; set it to false"
