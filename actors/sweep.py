"""A sweep: its jobs share one Ray and its processes, and the cells of a study are compared at the end."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from actors.session import Session
from rlhf.config import Config


def reason(error: BaseException) -> str:
    """A user's error in one line; of an error in an actor, the actor and its own words."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        where = error.function_name
        cause: BaseException = error.cause
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        return f"{cause} (in {where})"
    return str(error)


class Sweep(Callback):
    """Hydra's callback (conf/config.yaml). A cell of a study that fails by a user's error is told of, and the others go
    on with new processes; any other failed job ends the sweep."""

    current: ClassVar[Sweep | None] = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        self._session, self._started = Session(), time.perf_counter()
        self._cells: list[tuple[Config, float, str | None]] = []
        self._folder = Path(config.hydra.sweep.dir).absolute()
        self._failed: list[str] = []
        Sweep.current = self

    def job(self, config: Config, folder: Path, resolved: str, run: Callable[..., None]) -> None:
        """Runs one job of the sweep."""
        started, failed = time.perf_counter(), None
        try:
            run(config, folder, resolved, self._session)
        except ValueError as error:
            if config.study is None:
                raise
            failed = reason(error)
            self._session.release()  # a failed run may have left work in its processes
            self._failed.append(
                f"{config.study.arm}, point {config.study.point}, seed {config.seed}: {failed}"
            )
            sys.stderr.write(f"failed: {self._failed[-1]}\n")
        except Exception:  # Hydra would go on with the next job
            traceback.print_exc()
            sys.exit(f"error: job {folder.name} of the sweep failed; what was done before it is kept")
        if config.study is not None:
            self._cells.append((config, time.perf_counter() - started, failed))

    def finish(self) -> None:
        """After the last job: compares the cells. (Not a callback of Hydra's, which turns errors into warnings.)"""
        self.close()
        if self._cells:
            from actors.study import compare_cells

            try:
                summary = compare_cells(self._cells, self._folder, time.perf_counter() - self._started)
            except ValueError as error:
                sys.exit(f"error: {error}")
            sys.stdout.write(summary + f"\n{self._folder}/comparison.html\n")
        if self._failed:
            sys.exit(f"error: {len(self._failed)} cells failed: {'; '.join(self._failed)}")

    @classmethod
    def close(cls) -> None:
        """Ends the sweep's processes, if there are any left."""
        if cls.current is not None:
            cls.current._session.stop()
            cls.current = None
