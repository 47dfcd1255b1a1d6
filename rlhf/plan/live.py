"""The memory that a computation would take, by running it on the meta device: shapes are computed, numbers are not."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


class Live(TorchDispatchMode):
    """Within this context: how many bytes the tensors that are made take while they live (`now`), and took at most
    (`peak`). What an operation takes within itself is not seen.

    >>> with Live() as live:
    ...     x = torch.empty(1000, device="meta")
    ...     y = (x + 1) * 2
    >>> del x
    >>> live.now, live.peak
    (4000, 12000)
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: Any = WeakIdKeyDictionary()

    def leave_out(self, module: torch.nn.Module) -> None:
        """Its parameters and buffers were there before."""
        for tensor in (*module.parameters(), *module.buffers()):
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(
        self, function: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = function(*args, **(kwargs or {}))
        for part in tree_leaves(found):
            if isinstance(part, torch.Tensor):
                self._add(part.untyped_storage())
        return found

    def _add(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size).atexit = False

    def _drop(self, size: int) -> None:
        self.now -= size
