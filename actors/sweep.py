"""A sweep: its jobs share one Ray and its processes, and the cells of a study are compared at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from hydra.experimental.callback import Callback
from omegaconf import DictConfig

from actors.errors import reason, told
from actors.session import Session
from rlhf.config import Config
from rlhf.store import check_writable


class Sweep(Callback):
    """Hydra's callback (conf/config.yaml). A cell of a study that fails by a user's error is told of, and the others go
    on with new processes; any other failed job ends the sweep."""

    current: ClassVar[Sweep | None] = None

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check_output(config)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _check_output(config)
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
        except Exception as error:  # Hydra would go on with the next job
            failed = reason(error)
            if config.study is None or failed is None:
                sys.exit(f"{told(error)} (job {folder.name} of the sweep; what was done before it is kept)")
            self._session.release()  # a failed run may have left work in its processes
            self._failed.append(
                f"{config.study.arm}, point {config.study.point}, seed {config.seed}: {failed}"
            )
            sys.stderr.write(f"failed: {self._failed[-1]}\n")
        if config.study is not None:
            self._cells.append((config, time.perf_counter() - started, failed))

    def finish(self) -> None:
        """After the last job: compares the cells. (Not a callback of Hydra's, which turns errors into warnings.)"""
        self.close()
        if self._cells:
            from actors.study import compare_cells

            summary = compare_cells(self._cells, self._folder, time.perf_counter() - self._started)
            sys.stdout.write(summary + f"\n{self._folder}/comparison.html\n")
        if self._failed:
            sys.exit(f"error: {len(self._failed)} cells failed: {'; '.join(self._failed)}")

    @classmethod
    def close(cls, exiting: bool = False) -> None:
        """Ends the sweep's processes, if there are any left (`Session.stop`)."""
        if cls.current is not None:
            cls.current._session.stop(exiting)
            cls.current = None


def _check_output(config: DictConfig) -> None:
    """Before Hydra makes its folder there; it turns errors of callbacks into warnings, but for exits."""
    try:
        check_writable("output_dir", str(config.output_dir or ""))
    except ValueError as error:
        sys.exit(told(error))
