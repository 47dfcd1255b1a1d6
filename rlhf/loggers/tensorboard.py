"""TensorBoard: event files in the alignment's folder, which `tensorboard --logdir outputs` shows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.config import LoggingConfig
from rlhf.loggers.logger import Run

FOLDER = "tensorboard"


class TensorBoardLogger:
    later = "the same command with stages=[report]"

    def __init__(self, settings: LoggingConfig, outputs: Path) -> None:
        self._board: Any = None

    def check(self) -> None:
        """Its library is one of this package's own."""

    def begin(self, run: Run) -> int:
        from torch.utils.tensorboard import SummaryWriter

        folder = run.folder / FOLDER
        has = min(_last_step(folder), run.step)
        # what the files have of later steps, of a history that was set back, a board then leaves out
        self._board = SummaryWriter(str(folder), purge_step=has + 1 if has else None)
        return has

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            self._board.add_scalar(key, value, step)
        self._board.flush()

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        self.write(step, figures)

    def close(self) -> None:
        if self._board is not None:
            self._board.close()


def _last_step(folder: Path) -> int:
    if not folder.is_dir():
        return 0
    from tensorboard.backend.event_processing.event_accumulator import SCALARS, EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={SCALARS: 1})  # the last is kept
    events.Reload()
    return events.Scalars("step")[-1].step if "step" in events.Tags()[SCALARS] else 0
