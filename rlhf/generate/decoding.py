"""What sampling keeps of the tokens so far, by row.

Models whose attention is ours have the cache of `rlhf/generate/shared_cache.py`. Others have `PlainCache`: their own,
kept as `generate` of transformers keeps it. A model without one is called on whole sequences (`NoCache`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import Cache, DynamicCache, PreTrainedModel

from rlhf.models.attempt import takes_argument


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


def by_length(rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The places of rows of equal length."""
    places: dict[int, list[int]] = {}
    for i, row in enumerate(rows):
        places.setdefault(len(row), []).append(i)
    return list(places.values())


class PlainCache:
    """A model's own cache. A prompt's is repeated for its rows, which start together and leave.

    Args:
        padded: prompts of all lengths share calls, padded on the left; else those of one length do.
    """

    joins = False

    def __init__(self, model: PreTrainedModel, padded: bool) -> None:
        self._model, self._padded = model, padded
        self._parts: list[_Part] = []

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], torch.Tensor]:
        together = [list(range(len(prompts)))] if self._padded else by_length(prompts)
        self._parts, logits = [], []
        for places in together:
            part = _Part(self._model, np.array(places))
            logits.append(part.prefill([prompts[i] for i in places]))
            self._parts.append(part)
        order = torch.tensor([i for places in together for i in places], device=logits[0].device)
        return list(range(len(prompts))), torch.cat(logits)[order.argsort()]

    def join(self, handles: Sequence[int]) -> None:
        wanted = np.array(handles, np.int64)
        for part in self._parts:
            part.select(wanted)
        self._parts = [part for part in self._parts if len(part.rows)]

    def keep(self, rows: torch.Tensor) -> None:
        self.join(rows.tolist())

    def release(self, handle: int) -> None:
        """Prompts leave with their rows."""

    def clear(self) -> None:
        self._parts = []

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        found = [part.step(tokens[part.where]) for part in self._parts]
        order = torch.cat([part.where for part in self._parts])
        return torch.cat(found)[order.argsort()]


class _Part:
    """Rows that share calls: `rows[i]` is the place of the i-th among all."""

    def __init__(self, model: PreTrainedModel, rows: np.ndarray) -> None:
        self._model: Any = model
        self._device = next(model.parameters()).device
        self.rows = rows
        self._given: dict[str, Any] = {"use_cache": True}
        if takes_argument(self._model.forward, "logits_to_keep"):
            self._given["logits_to_keep"] = 1

    @property
    def where(self) -> torch.Tensor:
        return torch.from_numpy(self.rows).to(self._device)

    def prefill(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Computes prompts, padded on the left where they differ in length; their next logits, float32."""
        width = max(len(p) for p in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.as_tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        self._given["attention_mask"] = mask.to(self._device)
        if takes_argument(self._model.forward, "position_ids"):
            self._given["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0).to(self._device)
        if self._model._supports_default_dynamic_cache():
            name = (
                "cache_params" if takes_argument(self._model.forward, "cache_params") else "past_key_values"
            )
            self._given[name] = DynamicCache(config=self._model.config.get_text_config(decoder=True))
        return self._call(ids.to(self._device), is_first_iteration=True)

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._call(tokens[:, None], next_sequence_length=1)

    def _call(self, ids: torch.Tensor, **kind: Any) -> torch.Tensor:
        inputs = self._model.prepare_inputs_for_generation(ids, **kind, **self._given)
        output = self._model(**inputs, return_dict=True)
        self._given = self._model._update_model_kwargs_for_generation(output, self._given)
        return output.logits[:, -1].float()

    def select(self, wanted: np.ndarray) -> None:
        """Takes on the rows that are the `wanted` of all, in their order, as often as they are wanted."""
        place = {int(row): i for i, row in enumerate(self.rows)}
        mine = np.array([n for n, row in enumerate(wanted) if int(row) in place], np.int64)
        chosen = torch.tensor([place[int(wanted[n])] for n in mine], dtype=torch.long, device=self._device)
        self.rows = mine
        if len(mine):
            self._given = {name: _selected(value, chosen) for name, value in self._given.items()}


def _selected(value: Any, rows: torch.Tensor) -> Any:
    """Rows of whatever a model is given again at the next step."""
    if isinstance(value, Cache):
        value.reorder_cache(rows)
        return value
    if isinstance(value, torch.Tensor):
        return value.index_select(0, rows)
    if isinstance(value, list | tuple):
        return type(value)(_selected(part, rows) for part in value)
    return value


@dataclass
class NoCache:
    """Whole sequences at every step, those of one length together: the model's own pass itself."""

    model: Any
    joins = True

    def __post_init__(self) -> None:
        self._prompts: list[list[int]] = []
        self._rows: list[list[int]] = []

    def prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[list[int], torch.Tensor]:
        first = len(self._prompts)
        self._prompts += [list(map(int, p)) for p in prompts]
        return list(range(first, len(self._prompts))), self._logits(self._prompts[first:])

    def join(self, handles: Sequence[int]) -> None:
        self._rows += [list(self._prompts[h]) for h in handles]

    def keep(self, rows: torch.Tensor) -> None:
        self._rows = [self._rows[i] for i in rows.tolist()]

    def release(self, handle: int) -> None:
        """Handles are places: a prompt stays until `clear`."""

    def clear(self) -> None:
        self._prompts, self._rows = [], []

    def step(self, tokens: torch.Tensor) -> torch.Tensor:
        for row, token in zip(self._rows, tokens.tolist(), strict=True):
            row.append(token)
        return self._logits(self._rows)

    def _logits(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        device = next(self.model.parameters()).device
        last = {"logits_to_keep": 1} if takes_argument(self.model.forward, "logits_to_keep") else {}
        parts, order = [], []
        for places in by_length(rows):
            ids = torch.tensor([rows[i] for i in places], device=device)
            mask = torch.ones_like(ids)
            found = self.model(input_ids=ids, attention_mask=mask, use_cache=False, **last)
            parts.append(found.logits[:, -1].float())
            order += places
        return torch.cat(parts)[torch.tensor(order, device=device).argsort()]
