"""Which rows of a model's last layer are needed: its MLP need not compute the others, as nothing looks at them."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from rlhf.models import probe
from rlhf.models.attempt import Failure, attempt

TRIED = 16
"""Tokens that it is tried on."""
TOLERANCE = 1e-3
"""Of their states, relative to the largest."""

log = logging.getLogger(__name__)


class LastLayer:
    """The last decoder layer of a model, whose MLP computes only what is asked for.

    Inside `only(rows)` the model's last hidden states are right at the flat positions `rows` of a batch of one row,
    [1, T]; elsewhere they mean nothing. A model whose last layer or its MLP is of another kind computes all.

    Args:
        body: a transformers base model, without its head.
    """

    def __init__(self, body: torch.nn.Module) -> None:
        self._body: Any = body
        self._rows: torch.Tensor | None = None
        self._tokens = 0
        layers = [m for m in body.modules() if isinstance(m, torch.nn.ModuleList) and len(m)]
        mlp: Any = next((m[-1].mlp for m in reversed(layers) if hasattr(m[-1], "mlp")), None)
        if mlp is None:
            return
        handles = [mlp.register_forward_pre_hook(self._take), mlp.register_forward_hook(self._put)]
        fault = self._fault()
        if fault is not None:
            log.info("%s: its last MLP computes every token: %s", type(body).__name__, fault)
            for handle in handles:
                handle.remove()

    @contextmanager
    def only(self, rows: torch.Tensor | None) -> Iterator[None]:
        """rows: int64, sorted and distinct; None: all."""
        self._rows = rows
        try:
            yield
        finally:
            self._rows = None

    def states(self, rows: torch.Tensor | None, **inputs: Any) -> torch.Tensor:
        """The last hidden states [rows of the batch, T, width], right at the flat positions `rows`; None: at all."""
        with self.only(rows):
            return self._body(**inputs, use_cache=False).last_hidden_state

    def _take(self, _: torch.nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._rows is None:
            return None
        self._tokens = given[0].shape[1]
        return (given[0].index_select(1, self._rows), *given[1:])

    def _put(self, _: torch.nn.Module, __: tuple[Any, ...], out: Any) -> Any:
        if self._rows is None:
            return None
        everywhere = out.new_zeros(1, self._tokens, out.shape[-1])
        return everywhere.index_copy(1, self._rows, out)

    @torch.no_grad()
    def _fault(self) -> str | None:
        """Why the rows asked for are not what they are among all, tried on random tokens; None: they are."""
        config = self._body.config
        tokens = torch.from_numpy(probe.sequences([TRIED], config.get_text_config().vocab_size)[0])[None]
        like = next(self._body.parameters())
        ids, rows = tokens.to(like.device), torch.arange(1, TRIED, 3, device=like.device)
        plain = attempt(lambda: self.states(None, input_ids=ids))
        if isinstance(plain, Failure):
            return plain.reason
        found = attempt(lambda: self.states(rows, input_ids=ids))
        if isinstance(found, Failure):
            return found.reason
        off = (found[0, rows] - plain[0, rows]).abs().max()
        return None if off <= TOLERANCE * plain[0, rows].abs().max() else "other states"
