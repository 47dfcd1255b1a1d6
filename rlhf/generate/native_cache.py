"""`SharedCache` in bfloat16 for compiled attention: nothing moves when rows leave; one call attends for a layer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.generate.shared_cache import SharedCache
from rlhf.models.reach import attention_window, by_layer
from rlhf.native import LANES, addresses, check, library, takes
from rlhf.native.decoder import NativeDecoder, Shape


class NativeCache(SharedCache):
    """Prompts as words of two bfloat16, as `decode` of rlhf/native/attention.c reads them; own tokens
    [slots, key heads, room, width] of each layer, where a row has a slot as long as it lives."""

    def __init__(
        self, model: PreTrainedModel, max_new: int, budget: int, decoder: NativeDecoder | None = None
    ) -> None:
        super().__init__(model, max_new, budget)
        self._decoder, self._head = decoder, model.get_output_embeddings()
        self._words: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}  # by layer and place
        self._fresh: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # this step's, by layer
        self._free: list[int] = []
        self._slots = np.zeros(0, np.int32)  # [R]
        self._most_slots = 0

    @staticmethod
    def serves(model: PreTrainedModel) -> bool:
        text = model.config.get_text_config()
        heads = getattr(text, "num_attention_heads", None)
        plain = text.hidden_size // heads if heads else 1
        return (
            takes(next(model.parameters()))
            and all((width or plain) % LANES == 0 for width in by_layer(text, "head_dim"))
            and attention_window(model.config) is None
            and getattr(text, "attn_logit_softcapping", None) is None
            and library() is not None
        )

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        kept = self._fresh if self._new is None else self._new
        kept[layer_idx] = (key_states, value_states)
        return key_states, value_states

    def _store(
        self, handles: list[int], lengths: list[int], new: dict[int, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        for layer, pair in new.items():
            keys, values = (x[0].split(lengths, 1) for x in pair)
            for place, key, value in zip(handles, keys, values, strict=True):
                self._words[layer, place] = (_by_columns(key), _by_tokens(value))

    def join(self, handles: Sequence[int]) -> None:
        missing = len(handles) - len(self._free)
        if missing > 0:
            self._free += range(self._most_slots, self._most_slots + missing)
            self._most_slots += missing
        taken, self._free = self._free[: len(handles)], self._free[len(handles) :]
        self._slots = np.concatenate([self._slots, np.array(taken, np.int32)])
        self._handle = torch.cat([self._handle, torch.tensor(handles, dtype=torch.long)])
        self._count = torch.cat([self._count, torch.zeros(len(handles), dtype=torch.long)])
        self._arrange()

    def keep(self, rows: torch.Tensor) -> None:
        stay = rows.numpy()
        self._free += np.delete(self._slots, stay).tolist()
        self._slots = self._slots[stay]
        self._handle, self._count = self._handle[rows], self._count[rows]
        self._arrange()

    def release(self, handle: int) -> None:
        super().release(handle)
        for key in [key for key in self._words if key[1] == handle]:
            del self._words[key]

    def clear(self) -> None:
        super().clear()
        self._words, self._free, self._most_slots = {}, [], 0

    def _fit(self) -> None:
        """Makes room for this step's tokens: twice as much each time, up to the longest response."""
        wanted = self._wanted()
        if wanted > self._own_room:
            self._own_room = min(self._max_new, max(wanted, 2 * self._own_room))
        self._counts = self._count.numpy().astype(np.int32)
        arrays = (self._present_lengths, self._starts, self._order, self._slots, self._counts)
        self._rows_at = addresses(*arrays)

    def _arrange(self) -> None:
        """The rows by prompt, and where the prompts' words are, by layer."""
        handles = self._handle.numpy()
        self._order = np.argsort(handles, kind="stable").astype(np.int32)
        present, counts = np.unique(handles, return_counts=True)
        self._starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        self._present = present.tolist()
        self._present_lengths = np.array([self._lengths[p] for p in self._present], np.int32)
        self._prompts_at: dict[int, tuple[list[int], list[np.ndarray]]] = {}

    def _prompts_of(self, layer: int) -> list[int]:
        """Where the addresses of the prompts' keys, and of their values, are."""
        if layer not in self._prompts_at:
            pairs = [self._words[layer, place] for place in self._present]
            held = [np.array([pair[i].data_ptr() for pair in pairs], np.uint64) for i in (0, 1)]
            self._prompts_at[layer] = (addresses(*held), held)
        return self._prompts_at[layer][0]

    def _own_of(self, layer: int, key_heads: int, width: int) -> tuple[torch.Tensor, ...]:
        """The layer's own keys and values, made as large as slots and room."""
        own = self._own.get(layer)
        size = (self._most_slots, key_heads, self._own_room, width)
        if own is None or own[0].shape != size:
            grown = tuple(torch.empty(size, dtype=torch.bfloat16) for _ in range(2))
            if own is not None:
                slots, _, room, _ = own[0].shape
                alive = self._slots[self._slots < slots]
                for fresh, old in zip(grown, own, strict=True):
                    fresh[alive, :, :room] = old[alive]
            self._own[layer] = own = grown
        return own

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        window: int | None,
    ) -> torch.Tensor:
        assert softcap is None
        assert window is None
        new_key, new_value = (x.contiguous() for x in self._fresh.pop(layer))
        rows, heads, _, width = query.shape
        key_heads = new_key.shape[1]
        kinds = {(x.shape[0], x.shape[3], x.dtype) for x in (query, new_key, new_value)}
        if kinds != {(rows, width, torch.bfloat16)} or width % LANES or heads % key_heads:
            raise ValueError(
                f"policy: attention of this shape cannot be sampled from: {kinds}, {heads} heads"
            )
        query = query.contiguous()
        out = torch.empty_like(query)
        shape = Shape(heads, key_heads, width, width**-0.5 if scaling is None else scaling)
        self.decode(layer, shape, *addresses(query, new_key, new_value, out))
        return out

    def decode(self, layer: int, shape: Shape, query: int, key: int, value: int, out: int) -> None:
        own = addresses(*self._own_of(layer, shape.key_heads, shape.width))
        data = (query, key, value, out, *own, *self._prompts_of(layer), *self._rows_at)
        groups = shape.heads // shape.key_heads
        sizes = (len(self._present), shape.key_heads, groups, shape.width, self._own_room)
        native: Any = library()
        check(native.decode(*data, *sizes, shape.scale, torch.get_num_threads()))

    def _logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        if self._decoder is None:
            return super()._logits(tokens, positions)
        return self._head(self._decoder.step(tokens, positions, self))


def _by_columns(key: torch.Tensor) -> torch.Tensor:
    """[heads, L, width] as words [heads, width / 2, places] of two neighbouring columns."""
    heads, length, width = key.shape
    words = torch.zeros(heads, width // 2, _places(length), dtype=torch.int32)
    words[:, :, :length] = key.contiguous().view(torch.int32).transpose(1, 2)
    return words


def _by_tokens(value: torch.Tensor) -> torch.Tensor:
    """[heads, L, width] as words [heads, places / 2, width] of two neighbouring tokens."""
    heads, length, width = value.shape
    tokens = value.new_zeros(heads, _places(length), width)
    tokens[:, :length] = value
    pairs = tokens.view(heads, -1, 2, width).transpose(2, 3).contiguous()
    return pairs.view(torch.int32).view(heads, -1, width)


def _places(length: int) -> int:
    return -(-length // LANES) * LANES
