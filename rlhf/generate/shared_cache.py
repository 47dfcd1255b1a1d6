"""What sampling keeps for models that attend by `rlhf/models/attention.py`: responses of one prompt attend to its one
copy, and rows join and leave at any step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, PreTrainedModel

from rlhf.models.attempt import takes_argument
from rlhf.models.last_layer import LastLayer
from rlhf.models.reach import attention_window
from rlhf.models.trees import Tree

ROOM = 16
"""Own tokens by which the room for them grows."""
HIDDEN = torch.finfo(torch.float32).min


class SharedCache(Cache):
    """Prompts [P, key heads, L, width] and own tokens [R, key heads, room, width] of each layer.

    On a CPU they are float32, whatever the model computes in, and without gaps: a processor reads what lies in a row
    several times as fast as pieces of it.
    """

    joins = True

    def __init__(self, model: PreTrainedModel, max_new: int, budget: int) -> None:
        super().__init__(layers=[])
        self._model, self._max_new, self._budget = model, max_new, budget
        self._device = next(model.parameters()).device
        self._last = LastLayer(model.base_model)
        self._window = attention_window(model.config)
        self._keeps = takes_argument(model.forward, "logits_to_keep")
        self.first = 0  # the position of a prompt's first token
        self._prompts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by layer
        self._own: dict[int, tuple[torch.Tensor, ...]] = {}
        self._new: dict[int, tuple[torch.Tensor, torch.Tensor]] | None = None  # a prefill's, by layer
        self._lengths: list[int] = []  # of the prompt in each place; 0: free
        self._handle = torch.zeros(0, dtype=torch.long)  # [R], the place of each row's prompt
        self._count = torch.zeros(0, dtype=torch.long)  # [R], own tokens so far
        self._count_there = self._count  # of this step, on the device
        self._own_room = 0  # tokens
        self._nexts: dict[int, torch.Tensor] = {}  # by key heads
        self._masks: dict[int | None, torch.Tensor] = {}  # additive [R, 1, 1, L + own], by window

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions are given with every call

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0  # of a prompt by itself: other calls bring their mask

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What a layer calls with its new keys and values, [1, heads, T, width] or [R, heads, 1, width]."""
        if self._new is not None:
            self._new[layer_idx] = (key_states, value_states)
            return key_states, value_states
        pair = (key_states, value_states)
        if layer_idx not in self._own:
            self._own[layer_idx] = tuple(
                x.new_zeros(*x.shape[:2], self._own_room, x.shape[3], dtype=self._dtype(x)) for x in pair
            )
        for kept, new in zip(self._own[layer_idx], pair, strict=True):
            kept.flatten(0, 2).index_copy_(0, self._next(new.shape[1]), new.flatten(0, 2).to(kept.dtype))
        return key_states, value_states

    def _next(self, heads: int) -> torch.Tensor:
        """Where the rows' next tokens go among all rows, heads and places, int64 [R * heads]."""
        if heads not in self._nexts:
            row = torch.arange(heads * len(self._handle), device=self._device)
            self._nexts[heads] = row * self._own_room + self._count_there.repeat_interleave(heads)
        return self._nexts[heads]

    def _fit(self) -> None:
        """Makes own keys and values as large as the rows and the room that they need."""
        self._own_room = max(self._own_room, self._wanted())
        size = (len(self._handle), self._own_room)
        for layer, pair in self._own.items():
            if pair[0].shape[::2] != size:
                self._own[layer] = tuple(_enlarged(x, *size) for x in pair)

    def _dtype(self, like: torch.Tensor) -> torch.dtype:
        return torch.float32 if like.device.type == "cpu" else like.dtype

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], torch.Tensor]:
        handles, logits = [], []
        start = 0
        while start < len(prompts):
            stop, tokens = start + 1, len(prompts[start])
            while stop < len(prompts) and tokens + len(prompts[stop]) <= self._budget:
                if self._beyond(prompts[start]) or self._beyond(prompts[stop]):
                    break
                tokens += len(prompts[stop])
                stop += 1
            found, last = self._prefill(prompts[start:stop])
            handles += found
            logits.append(last)
            start = stop
        return handles, torch.cat(logits)

    def _beyond(self, prompt: Sequence[int]) -> bool:
        """Whether the prompt is longer than a layer's window, of which trees know nothing: it goes alone, under the
        model's own masks."""
        return self._window is not None and len(prompt) > self._window

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], torch.Tensor]:
        lengths = [len(p) for p in prompts]
        ids = torch.tensor([t for p in prompts for t in p], device=self._device)[None]
        positions = torch.cat([torch.arange(n, device=self._device) for n in lengths])[None]
        given: dict[str, Any] = {"trees": [Tree(n) for n in lengths]}
        if self._beyond(prompts[0]):
            given = {"attention_mask": torch.ones_like(ids)}
        self._new = {}
        ends = torch.tensor(lengths, device=self._device).cumsum(0) - 1
        if self._keeps:
            given["logits_to_keep"] = ends
        with self._last.only(ends):
            logits = self._call(ids, positions + self.first, **given)[0]
        logits = logits if self._keeps else logits[ends]
        new, self._new = self._new, None
        handles = [self._place(n) for n in lengths]
        self._store(handles, lengths, new)
        return handles, logits.float()

    def _store(
        self, handles: list[int], lengths: list[int], new: dict[int, tuple[torch.Tensor, torch.Tensor]]
    ) -> None:
        """Keeps the keys and values of prompts, [1, heads, sum of lengths, width] of each layer."""
        for layer, pair in new.items():
            for kept, given in zip(self._room(layer, *pair), pair, strict=True):
                for place, part in zip(handles, given[0].split(lengths, 1), strict=True):
                    kept[place, :, : part.shape[1]] = part.to(kept.dtype)

    def _place(self, length: int) -> int:
        for place, used in enumerate(self._lengths):
            if not used:
                self._lengths[place] = length
                return place
        self._lengths.append(length)
        return len(self._lengths) - 1

    def _room(self, layer: int, keys: torch.Tensor, values: torch.Tensor) -> list[torch.Tensor]:
        """The layer's prompts, made large enough for all places."""
        places, longest = len(self._lengths), max(self._lengths)
        old = self._prompts.get(layer)
        if old is None or old[0].shape[0] < places or old[0].shape[2] < longest:
            grown = []
            for i, like in enumerate((keys, values)):
                size = (places, like.shape[1], longest)
                if old is not None:
                    size = (max(places, old[i].shape[0]), like.shape[1], max(longest, old[i].shape[2]))
                fresh = like.new_zeros((*size, like.shape[-1]), dtype=self._dtype(like))
                if old is not None:
                    fresh[: old[i].shape[0], :, : old[i].shape[2]] = old[i]
                grown.append(fresh)
            self._prompts[layer] = (grown[0], grown[1])
        return list(self._prompts[layer])

    def join(self, handles: Sequence[int]) -> None:
        self._handle = torch.cat([self._handle, torch.tensor(handles, dtype=torch.long)])
        self._count = torch.cat([self._count, torch.zeros(len(handles), dtype=torch.long)])
        self._fit()
        self._arrange()

    def keep(self, rows: torch.Tensor) -> None:
        self._handle, self._count = self._handle[rows], self._count[rows]
        self._own_room = min(self._own_room, self._wanted())
        rows = rows.to(self._device)
        self._own = {
            layer: tuple(x[:, :, : self._own_room][rows] for x in own) for layer, own in self._own.items()
        }
        self._arrange()

    def release(self, handle: int) -> None:
        self._lengths[handle] = 0

    def clear(self) -> None:
        assert not len(self._handle)
        self._prompts, self._own, self._lengths, self._own_room = {}, {}, [], 0

    def _wanted(self) -> int:
        """Own tokens to have room for, so that it rarely grows."""
        most = int(self._count.max()) + 1 if len(self._count) else 0
        return min(self._max_new, -(-most // ROOM) * ROOM)

    def _arrange(self) -> None:
        """Where each row is among its prompt's rows, for attention to a prompt by all of its rows at once."""
        places = max(len(self._lengths), 1)
        taken = [0] * places
        spot = []
        for handle in self._handle.tolist():
            spot.append(taken[handle])
            taken[handle] += 1
        width = max(taken)
        flat = self._handle * width + torch.tensor(spot, dtype=torch.long)
        source = torch.zeros(places * width, dtype=torch.long)
        source[flat] = torch.arange(len(flat))
        self._shape = (places, width)
        self._in_order = bool((source == torch.arange(len(source))).all()) and len(flat) == len(source)
        self._source, self._flat = source.to(self._device), flat.to(self._device)

    @property
    def _prompt_lengths(self) -> torch.Tensor:
        return torch.tensor(self._lengths)[self._handle]

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self._count = self._count.clamp_max(self._max_new - 1)  # a row that has ended stays where it is
        lengths = self._prompt_lengths.to(self._device)
        self._count_there = self._count.to(self._device)
        positions = self.first + lengths + self._count_there
        self._masks, self._nexts = {}, {}
        self._fit()
        logits = self._logits(tokens, positions)
        self._count = self._count + 1
        return logits.float()

    def _logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Of the token after a row's newest, [R, V]."""
        return self._call(tokens[:, None], positions[:, None], decoding=self)[:, -1]

    def _call(self, ids: torch.Tensor, positions: torch.Tensor, **given: Any) -> torch.Tensor:
        given.setdefault("attention_mask", torch.zeros(1, 1, 1, 1, device=self._device))
        return self._model(
            input_ids=ids, position_ids=positions, past_key_values=self, use_cache=True, **given
        ).logits

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        scaling: float | None,
        softcap: float | None,
        window: int | None,
    ) -> torch.Tensor:
        """Each row's new token over its prompt and its own tokens. Query [R, heads, 1, width]; as the result."""
        (prompt_k, prompt_v), (own_k, own_v) = self._prompts[layer], self._own[layer]
        rows, heads, _, width = query.shape
        places, most = self._shape
        key_heads = own_k.shape[1]
        groups = heads // key_heads
        mask = self._mask(window)
        scale = width**-0.5 if scaling is None else scaling
        q = query.to(own_k.dtype).view(rows, key_heads, groups, width)
        prompt_k, prompt_v = prompt_k[:places], prompt_v[:places]

        def by_prompt(x: torch.Tensor) -> torch.Tensor:
            """[R, key heads, groups, n] -> [P, key heads, most * groups, n]"""
            x = (x if self._in_order else x[self._source]).view(places, most, key_heads, groups, -1)
            return x.transpose(1, 2).reshape(places, key_heads, most * groups, -1)

        def by_row(x: torch.Tensor) -> torch.Tensor:
            x = x.view(places, key_heads, most, groups, -1).transpose(1, 2)
            x = x.reshape(places * most, key_heads, groups, -1)
            return x if self._in_order else x[self._flat]

        scores = torch.cat(
            [
                by_row(by_prompt(q) @ prompt_k.transpose(-1, -2)),
                q @ own_k.transpose(-1, -2),
            ],
            -1,
        ).float()
        scores *= scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        shares = torch.softmax(scores + mask, -1).to(own_v.dtype)
        left, right = shares.split([prompt_k.shape[2], own_k.shape[2]], -1)
        out = by_row(by_prompt(left) @ prompt_v) + right @ own_v
        return out.reshape(rows, heads, 1, -1).to(query.dtype)

    def _mask(self, window: int | None) -> torch.Tensor:
        """Additive float32 [R, 1, 1, L + own]; the token being computed is among its own."""
        if window is not None and int((self._prompt_lengths + self._count).max()) < window:
            window = None  # all within it
        if window not in self._masks:
            longest = next(iter(self._prompts.values()))[0].shape[2]
            at, count = torch.arange(longest, device=self._device)[None], self._count_there[:, None]
            lengths = self._prompt_lengths.to(self._device)[:, None]
            own = torch.arange(self._own_room, device=self._device)[None]
            hidden_prompt, hidden_own = at >= lengths, own > count
            if window is not None:
                hidden_prompt = hidden_prompt | (lengths + count - at >= window)
                hidden_own = hidden_own | (count - own >= window)
            hidden = torch.cat([hidden_prompt, hidden_own], 1)
            mask = torch.zeros(hidden.shape, device=self._device).masked_fill_(hidden, HIDDEN)
            self._masks[window] = mask[:, None, None]
        return self._masks[window]


def _enlarged(x: torch.Tensor, rows: int, room: int) -> torch.Tensor:
    """[R, heads, room, width] with zeros after its rows and tokens."""
    x = torch.cat([x, x.new_zeros(*x.shape[:2], room - x.shape[2], x.shape[3])], 2)
    return torch.cat([x, x.new_zeros(rows - len(x), *x.shape[1:])])
