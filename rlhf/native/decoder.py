"""A step of sampling through a whole model by compiled code: with a token a row, PyTorch's calls take longer than what
they compute."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from rlhf.models.packed import PackedLinear
from rlhf.native import LANES, addresses, library
from rlhf.native.layers import fused_epsilon, is_fused_gate
from rlhf.native.rotary import rotates

BODY = {"embed_tokens", "layers", "norm", "rotary_emb"}
LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}
PROJECTIONS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = {"q_norm", "k_norm"}


class Attends(Protocol):
    """Keys and values of the tokens so far."""

    def decode(self, layer: int, shape: Shape, query: int, key: int, value: int, out: int) -> None:
        """Appends a token's key and value to each row and attends; by address, bfloat16 [R, heads, width]."""


@dataclass(frozen=True)
class Shape:
    """Of a layer's attention."""

    heads: int
    key_heads: int
    width: int  # of a head
    scale: float  # of the scores

    @staticmethod
    def of(attention: Any) -> Shape:
        width = int(attention.head_dim)
        heads, key_heads = (p.panels.outputs // width for p in (attention.q_proj, attention.k_proj))
        return Shape(heads, key_heads, width, float(attention.scaling))


class NativeDecoder:
    """The layers of a Llama-style model: RMS norms before attention and before a SiLU-gated MLP, rotary positions, and
    perhaps norms of the heads of queries and keys. Its linear layers are packed, its norms and gates fused.

    `of` looks at a model's parts, not at how it puts them together: try what `step` gives against the model.
    """

    def __init__(self, body: Any) -> None:
        self._body = body
        self._layers = [_Layer(layer) for layer in body.layers]
        self._norm = _norm(body.norm)
        self._width = self._layers[0].shape.width
        self._room = _Room(self._layers, 0)

    @staticmethod
    def of(model: torch.nn.Module) -> NativeDecoder | None:
        """The decoder of a transformers model, if it is made of such parts."""
        body: Any = getattr(model, "base_model", None)
        if body is None or _children(body) != BODY or fused_epsilon(body.norm) is None:
            return None
        if (
            not all(map(_serves, body.layers))
            or len({layer.self_attn.head_dim for layer in body.layers}) != 1
        ):
            return None
        return NativeDecoder(body)

    def step(self, tokens: torch.Tensor, positions: torch.Tensor, cache: Attends) -> torch.Tensor:
        """The last hidden states, bfloat16 [R, width], of a token in each row at its position; both int64 [R]."""
        rows = len(tokens)
        x = self._body.embed_tokens(tokens)
        turns = [part[:, 0].contiguous() for part in self._body.rotary_emb(x[:, None], positions[:, None])]
        if {(t.dtype, *t.shape) for t in turns} != {(x.dtype, rows, self._width)}:
            raise ValueError("policy: its rotary positions are not those of its heads")
        if rows > self._room.rows:
            self._room = _Room(self._layers, rows)
        at, angles = x.data_ptr(), addresses(*turns)
        for layer in self._layers:
            layer.step(at, rows, angles, self._room, cache)
        out = torch.empty_like(x)
        self._norm(at, out.data_ptr(), self._room.inverse, rows)
        return out


class _Room:
    """Where the parts of a layer put what they compute, by address; all layers use the same."""

    def __init__(self, layers: list[_Layer], rows: int) -> None:
        self.rows = rows
        stream = max(layer.inputs for layer in layers)
        queries = max(layer.shape.heads * layer.shape.width for layer in layers)
        inner = max(layer.inner for layer in layers)
        sizes = [stream, queries, queries, queries, queries, inner, inner, 2 * queries]
        self._kept = [torch.empty(rows * size, dtype=torch.bfloat16) for size in sizes]
        found = addresses(*self._kept)
        self.normed, self.query, self.key, self.value, self.attended, self.gate, self.up, self.inverse = found


class _Layer:
    def __init__(self, module: Any) -> None:
        attention, mlp = module.self_attn, module.mlp
        self.index, self.shape = int(attention.layer_idx), Shape.of(attention)
        self.inputs, self.inner = attention.q_proj.panels.inputs, mlp.gate_proj.panels.outputs
        self._before, self._after = _norm(module.input_layernorm), _norm(module.post_attention_layernorm)
        self._query, self._key, self._value, self._out = (
            _linear(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")
        )
        self._gate, self._up, self._down = map(_linear, (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        self._turn_queries, self._turn_keys = (
            _turn(heads, self.shape.width, getattr(attention, name, None))
            for heads, name in ((self.shape.heads, "q_norm"), (self.shape.key_heads, "k_norm"))
        )

    def step(self, x: int, rows: int, angles: list[int], room: _Room, cache: Attends) -> None:
        """Adds what this layer computes to the residual stream `x`."""
        native: Any = library()
        self._before(x, room.normed, room.inverse, rows)
        self._query(room.normed, room.query, rows)
        self._key(room.normed, room.key, rows)
        self._value(room.normed, room.value, rows)
        self._turn_queries(room.query, angles, room.inverse, rows)
        self._turn_keys(room.key, angles, room.inverse, rows)
        cache.decode(self.index, self.shape, room.query, room.key, room.value, room.attended)
        self._out(room.attended, x, rows, x)
        self._after(x, room.normed, room.inverse, rows)
        self._gate(room.normed, room.gate, rows)
        self._up(room.normed, room.up, rows)
        native.gate_forward(room.gate, room.up, room.gate, 0, rows, self.inner)
        self._down(room.gate, x, rows, x)


def _norm(module: Any) -> Callable[[int, int, int, int], None]:
    """Of rows at an address to another, which may be the same; and where their 1 / rms go, float32."""
    native: Any = library()
    width, epsilon = len(module.weight), fused_epsilon(module)

    def compute(x: int, out: int, inverse: int, rows: int) -> None:
        native.norm_forward(x, module.weight.data_ptr(), out, inverse, 0, rows, width, epsilon)

    return compute


def _linear(module: PackedLinear) -> Callable[..., None]:
    """Of rows at an address to another, where it may add to a residual."""
    panels = module.panels
    assert panels is not None

    def compute(x: int, out: int, rows: int, residual: int | None = None) -> None:
        bias = None if module.bias is None else module.bias.data_ptr()
        panels.multiply(x, bias, residual, out, rows)

    return compute


def _turn(heads: int, width: int, norm: Any) -> Callable[[int, list[int], int, int], None]:
    """Turns the heads of rows to their positions in place, once they are normed."""
    native: Any = library()
    normed = None if norm is None else _norm(norm)
    strides = np.array([heads * width, width] * 2, np.int64)

    def compute(x: int, angles: list[int], inverse: int, rows: int) -> None:
        if normed is not None:
            normed(x, x, inverse, rows * heads)
        native.rotate(x, *angles, x, strides.ctypes.data, 0, rows, heads, width, 0)

    return compute


def _children(module: Any) -> set[str]:
    return {name for name, _ in module.named_children()}


def _serves(layer: Any) -> bool:
    """Whether a decoder layer consists of the parts that compiled code computes."""
    if _children(layer) != LAYER:
        return False
    attention, mlp = layer.self_attn, layer.mlp
    norms = [layer.input_layernorm, layer.post_attention_layernorm]
    own = _children(attention) - PROJECTIONS
    if own not in (set(), HEAD_NORMS) or not rotates(attention) or not is_fused_gate(mlp):
        return False
    linear = [getattr(attention, name, None) for name in PROJECTIONS]
    linear += [mlp.gate_proj, mlp.up_proj, mlp.down_proj]
    if not all(isinstance(part, PackedLinear) and part.panels is not None for part in linear):
        return False
    width = getattr(attention, "head_dim", 0)
    queries, keys, values = (getattr(attention, f"{name}_proj").panels.outputs for name in "qkv")
    head_norms = [getattr(attention, name) for name in own]
    return (
        width > 0
        and width % (2 * LANES) == 0
        and keys == values
        and keys % width == queries % keys == 0
        and attention.o_proj.panels.inputs == queries
        and all(fused_epsilon(norm) is not None for norm in norms + head_norms)
        and all(len(norm.weight) == width for norm in head_norms)
        and getattr(attention, "scaling", None) is not None
    )
