"""When a learner's state is saved, and how: copied between two steps, written beside the next ones."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.learner_group import LearnerGroup
from rlhf.checkpoints import Checkpoints
from rlhf.config import CheckpointConfig

log = logging.getLogger(__name__)


@dataclass
class _Saving:
    step: int
    folder: Path
    files: list[ray.ObjectRef]  # of each rank
    state: Mapping[str, Any] | None = None  # the driver's, once the step is over


class Saver:
    """One checkpoint at a time. `start` asks the ranks, after all that they were asked before; `trained` adds what the
    driver knows after the step; once both are there, `tend` makes a checkpoint of them."""

    def __init__(
        self,
        config: CheckpointConfig,
        checkpoints: Checkpoints,
        learner: LearnerGroup,
        step: int,
        before: Callable[[int], None] = lambda _: None,
        also: Callable[[int], bool] = lambda _: False,
        besides: Callable[[], Sequence[int]] = tuple,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            before: called with the step before its checkpoint is made valid.
            also: whether a step is saved whatever the configuration says.
            besides: steps whose checkpoints are kept beside the newest.
        """
        self._config, self._checkpoints, self._learner, self._clock = config, checkpoints, learner, clock
        self._before, self._also, self._besides = before, also, besides
        self._saving: _Saving | None = None
        self._told = False  # that steps wait
        self._last, self.saved = clock(), step  # when the last one was begun, and of which step the newest is

    def due(self, step: int) -> bool:
        """Whether the state after this step is to be saved."""
        every, minutes = self._config.every, self._config.minutes
        if self._also(step) or (every is not None and step % every == 0):
            return True
        late = minutes is not None and self._clock() - self._last >= 60 * minutes
        return late and not self.busy

    @property
    def busy(self) -> bool:
        """Whether one is under way."""
        return self._saving is not None

    def start(self, step: int) -> None:
        assert not self.busy
        folder = self._checkpoints.begin(step)
        self._saving, self._last = _Saving(step, folder, self._learner.checkpoint(folder)), self._clock()

    def drop(self) -> None:
        """The step was not trained: what is saved is of the one before."""
        if self._saving is not None and self._saving.state is None:
            self._saving = None

    def trained(self, step: int, state: Callable[[], Mapping[str, Any]]) -> None:
        """The step is over."""
        if self._saving is not None and self._saving.step == step:
            self._saving.state = state()

    def tend(self) -> None:
        """Commits what is written."""
        saving = self._saving
        if saving is not None and saving.state is not None:
            done, _ = ray.wait(saving.files, num_returns=len(saving.files), timeout=0)
            if len(done) == len(saving.files):
                self._commit(saving)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Saves a step, between two of them, and waits for it."""
        self.finish()
        if step > self.saved:
            self.start(step)
            self.trained(step, lambda: state)
            self.finish()

    def finish(self) -> None:
        """Waits for what is under way."""
        if self._saving is not None:
            self._commit(self._saving)

    def _commit(self, saving: _Saving) -> None:
        parts = self._learner.written(saving.files)
        assert saving.state is not None, saving
        self._before(saving.step)
        files = {part.name: (part.size, part.checksum) for part in parts}
        for waited in {part.waited for part in parts if part.waited} if not self._told else ():
            log.warning("%s", waited)
            self._told = True
        self._checkpoints.commit(saving.step, saving.folder, saving.state, files, self._besides())
        self._saving, self.saved = None, saving.step
