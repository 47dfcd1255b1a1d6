"""What a generation engine is. The embedded one is `rlhf/generate/transformers_engine.py`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from rlhf.types import Rollouts, WorkItem


class Engine(Protocol):
    """Samples responses from a policy of a known version."""

    version: int

    def set_weights(self, weights: Mapping[str, np.ndarray], version: int) -> None:
        """Replaces the policy's parameters (all of them, by name) and takes on their version."""

    def generate(self, item: WorkItem) -> Rollouts:
        """Samples a work item. The same item and weights give the same rollouts."""

    def logprobs(self, rollouts: Rollouts) -> np.ndarray:
        """Log-probabilities of the rollouts' response tokens under the current weights, float32 [T]."""
