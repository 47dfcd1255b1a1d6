"""Conversations as batches for a classifier: packed, with the beginnings that neighbours share, or padded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from rlhf.learn.batching import TokenBatch, by_length, pack
from rlhf.types import Ragged

Row = Sequence[int] | np.ndarray
"""The tokens of one conversation."""


@dataclass(frozen=True)
class ScoreBatch:
    """Conversations that are scored together: `rows[i]` is the i-th score's place among all."""

    rows: list[int]
    inputs: Callable[[torch.Tensor], dict[str, Any]]  # on the device of a tensor

    def scores(self, model: torch.nn.Module, like: torch.Tensor) -> torch.Tensor:
        return model(**self.inputs(like)).float()


def packed(rows: Sequence[Row], part: Sequence[int], kin: Sequence[int], budget: int) -> list[ScoreBatch]:
    """Batches of the rows `part`, of at most `budget` tokens; neighbours of one `kin` share how they begin."""
    shared, own, group = split([rows[i] for i in part], [kin[i] for i in part])
    batches = pack(shared, own, group, range(len(part)), budget, ends=True)
    return [ScoreBatch([part[n] for n in b.rows.tolist()], partial(_packed, b)) for b in batches]


def _packed(batch: TokenBatch, like: torch.Tensor) -> dict[str, Any]:
    assert batch.last is not None
    return batch.inputs(like) | {"last": batch.last.to(like.device)}


def padded(rows: Sequence[Row], part: Sequence[int], pad: int | None, budget: int | None) -> list[ScoreBatch]:
    """Batches of the rows `part`, padded on the right to at most `budget` tokens; without one, a row each."""
    alone = [[n] for n in range(len(part))]
    chosen = alone if budget is None else by_length([len(rows[i]) for i in part], budget)
    return [padded_batch(rows, [part[n] for n in batch], pad) for batch in chosen]


def padded_batch(rows: Sequence[Row], chosen: Sequence[int], pad: int | None) -> ScoreBatch:
    """The rows `chosen`, padded on the right. A model that finds their ends itself must have a padding token."""
    width = max(len(rows[i]) for i in chosen)
    fill = pad if pad is not None and pad >= 0 else 0
    ids = torch.full((len(chosen), width), fill, dtype=torch.long)
    mask = torch.zeros(len(chosen), width, dtype=torch.long)
    for n, i in enumerate(chosen):
        ids[n, : len(rows[i])] = torch.as_tensor(np.asarray(rows[i], np.int64))
        mask[n, : len(rows[i])] = 1
    return ScoreBatch(
        list(chosen), lambda like: {"input_ids": ids.to(like.device), "attention_mask": mask.to(like.device)}
    )


def split(rows: Sequence[Row], kin: Sequence[int]) -> tuple[Ragged, Ragged, np.ndarray]:
    """Each run of neighbours of one kin as their common beginning and what follows it, at least a token each."""
    arrays = [np.asarray(row, np.int32) for row in rows]
    shared: list[np.ndarray] = []
    group: list[int] = []
    for i, row in enumerate(arrays):
        common = _common(shared[-1], row[:-1]) if i and kin[i] == kin[i - 1] else 0
        if common:
            shared[-1] = shared[-1][:common]
        else:
            shared.append(row[:-1])
        group.append(len(shared) - 1)
    own = [row[len(shared[g]) :] for row, g in zip(arrays, group, strict=True)]
    return Ragged.of(shared, np.int32), Ragged.of(own, np.int32), np.array(group)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n
