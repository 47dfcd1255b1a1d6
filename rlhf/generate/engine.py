"""What a generation engine is. Those of this package are listed in `rlhf/generate/engines.py`."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Self

import numpy as np

from rlhf.config import RolloutConfig
from rlhf.types import Rollouts, WorkItem

if TYPE_CHECKING:
    import torch

    from rlhf.data.chat import ChatFormat


class Engine(ABC):
    """Samples responses from a policy of a known version.

    A generator opens one for each policy it is given, and calls it from one thread.
    """

    version: int
    notes: list[str]  # what to tell the user of how the policy is sampled

    @classmethod
    def check(cls, rollout: RolloutConfig, gpus: float) -> None:
        """Refuses settings that cannot be, before Ray starts; here, any of the engine's own.

        Args:
            rollout: the settings; `rollout.options` are the engine's own.
            gpus: of each generator.

        Raises:
            ValueError: it names the key and what to do.
        """
        if rollout.options:
            raise ValueError(
                f"rollout.options: rollout.engine={rollout.engine} has none, and {sorted(rollout.options)} are given"
            )

    @classmethod
    def identity(cls, rollout: RolloutConfig) -> object:
        """What its samples depend on beside the policy and the settings of `rollout` that all engines have: settings
        of its own, versions of libraries. As JSON can hold it."""
        return dict(rollout.options)

    @classmethod
    @abstractmethod
    def open(cls, policy: str, chat: ChatFormat, rollout: RolloutConfig, device: str) -> Self:
        """An engine with a saved policy, as version 0.

        Args:
            policy: a folder or a hub name.
            device: "cpu" or "cuda".
        """

    def close(self) -> None:  # noqa: B027 - most have nothing to give back
        """Gives back what it holds outside of Python's memory. It is not called again."""

    def rest(self) -> None:  # noqa: B027 - most keep nothing
        """Gives back what it keeps for the next work item, as memory for other roles on the same GPU. Nothing is under
        way; any other call is answered as before."""

    @abstractmethod
    def set_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Replaces the policy's parameters and takes on their version. Responses under way go on with them.

        Args:
            weights: all parameters by their names in the saved policy's model, flat, in any floating dtype; they may be
                kept until the next call, and do not change until then.

        Raises:
            ValueError: a name is missing or unknown, or a size is another.
        """

    @property
    @abstractmethod
    def busy(self) -> bool:
        """Whether a work item is under way."""

    @abstractmethod
    def submit(self, item: WorkItem) -> int:
        """Takes a work item on beside those under way; its ticket. The same item and weights give the same rollouts,
        whatever else is under way.

        Raises:
            ValueError: a prompt is too long for the policy.
        """

    @abstractmethod
    def advance(self) -> list[tuple[int, Rollouts]]:
        """Goes on with the work for a moment; what is finished, by ticket. After an exception it is of no use."""

    @abstractmethod
    def logprobs(self, rollouts: Rollouts) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Log-probabilities of the rollouts' response tokens under the current weights, at the rollouts' temperature,
        as they are computed: places among the T tokens, int64 [t], and their log-probabilities, float32 [t]."""

    def generate(self, item: WorkItem) -> Rollouts:
        """Samples one work item, alone."""
        assert not self.busy
        self.submit(item)
        while True:
            done = self.advance()
            if done:
                return done[0][1]
