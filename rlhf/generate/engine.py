"""What a generation engine is. The embedded one is `rlhf/generate/transformers_engine.py`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rlhf.types import Rollouts, WorkItem

if TYPE_CHECKING:
    import torch


class Engine(Protocol):
    """Samples responses from a policy of a known version."""

    version: int

    def set_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Replaces the policy's parameters (all of them, by name) and takes on their version. Responses under way
        go on with them; their rollouts keep the version of their first token."""

    def generate(self, item: WorkItem) -> Rollouts:
        """Samples a work item. The same item and weights give the same rollouts."""

    @property
    def busy(self) -> bool:
        """Whether a work item is under way."""

    def submit(self, item: WorkItem) -> int:
        """Takes a work item on beside those under way; its ticket."""

    def advance(self) -> list[tuple[int, Rollouts]]:
        """Goes on with the work; what is finished, by ticket."""

    def logprobs(self, rollouts: Rollouts) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Log-probabilities of the rollouts' response tokens under the current weights, as they are computed: places
        among the T tokens, int64 [t], and their log-probabilities, float32 [t]."""
