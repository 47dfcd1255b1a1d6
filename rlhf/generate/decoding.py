"""What sampling keeps of the tokens so far: the keys and values of prompts and of responses, by row.

`PlainCache` is for models whose attention is their own: a prompt's cache is repeated for its rows, which start together
and leave. All others have the cache of `rlhf/generate/shared_cache.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from transformers import DynamicCache, PreTrainedModel


class RowCache(Protocol):
    """Rows are responses being sampled, R of them."""

    joins: bool  # whether rows can be added while others are there

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], torch.Tensor]:
        """Computes prompts: a handle of each, and the logits of the first response token, float32 [prompts, V]."""

    def join(self, handles: Sequence[int]) -> None:
        """Adds a row for each handle, after the rows there are."""

    def keep(self, rows: torch.Tensor) -> None:
        """Keeps these rows only, in this order; int64."""

    def release(self, handle: int) -> None:
        """A prompt that no row will join any more."""

    def clear(self) -> None:
        """Forgets all, when no row is left: what comes next must not depend on what was, not even by rounding."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        """Appends a token to each row, int64 [R]; the logits of the next, float32 [R, V]."""


class PlainCache:
    """transformers' own cache, for models whose attention is their own."""

    joins = False

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._device = next(model.parameters()).device

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], torch.Tensor]:
        width = max(len(p) for p in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.as_tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        self._cache = DynamicCache(config=self._model.config)
        self._mask = mask.to(self._device)
        positions = (self._mask.cumsum(-1) - 1).clamp_min(0)
        return list(range(len(prompts))), self._call(ids.to(self._device), positions)

    def join(self, handles: Sequence[int]) -> None:
        rows = torch.tensor(handles, dtype=torch.long, device=self._device)
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]

    def keep(self, rows: torch.Tensor) -> None:
        self.join(rows.tolist())

    def release(self, handle: int) -> None:
        """Prompts leave with their rows."""

    def clear(self) -> None:
        """The next `prefill` starts a new cache."""

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        self._mask = torch.cat([self._mask, self._mask.new_ones(len(self._mask), 1)], 1)
        return self._call(tokens[:, None], self._mask.sum(-1, keepdim=True) - 1)

    def _call(self, ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
        )
        return output.logits[:, -1].float()
