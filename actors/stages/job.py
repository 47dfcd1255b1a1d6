"""One run: its stages in order, and the one way back from whatever ends their processes."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from actors.afresh import afresh, restarts_before
from actors.failures import fault
from actors.roles import Roles
from actors.session import Session
from actors.stages.stage import Output, Stage, Stages
from actors.watchdog import watched
from rlhf.files import link
from rlhf.flow.restarts import Restarts
from rlhf.progress import View


class Job:
    """A run on a session. Roles start when a stage first needs them, and serve all later stages.

    A stage's `make` may fail by a process that ended or is stuck, whichever it is and wherever: the roles are then made
    anew, on a new Ray if the old one does not answer, and `make` is called again, which goes on from its newest
    checkpoint. If that Ray does not start, the command begins anew. A new command takes the same way in: it finds the
    folder that the last one left.
    """

    def __init__(self, stages: Stages, session: Session, run: Path, view: View, started: float) -> None:
        self.stages, self.config, self.run, self.view = stages, stages.config, run, view
        self.roles = Roles(stages, session, view.line)
        self.seconds: dict[str, float] = {}
        self.skipped: list[str] = []
        self.why = ""  # why the stage was begun again last
        self._session, self._started = session, started
        recovery = self.config.recovery
        self._restarts = Restarts(recovery.restarts, recovery.backoff, restarts_before())

    def execute(self) -> None:
        """The stages, and the run's folder with links to what they made."""
        self.make_all()
        for name, path in self.stages.links().items():
            link(self.run / name, path)

    def make_all(self) -> None:
        """The stages."""
        self.seconds["start"] = time.perf_counter() - self._started
        for stage in self.stages.configured():
            started = time.perf_counter()
            stage.execute(self)
            self.seconds[stage.name] = time.perf_counter() - started

    @property
    def total(self) -> float:
        """Seconds since the command began."""
        return time.perf_counter() - self._started

    def skip(self, stage: str, what: str) -> None:
        self.view.line(f"{stage}: skipped, {what}")
        if stage not in self.skipped:
            self.skipped.append(stage)

    def make(self, stage: Stage, output: Output) -> Path:
        def fill(folder: Path) -> None:
            self._persist(output.label, partial(stage.make, self, output, folder))

        return stage.store.make(output.kind, output.name, fill)

    def progressed(self) -> None:
        """The stage is further than it was: restarts are counted anew."""
        self._restarts.progressed()

    def _persist(self, label: str, attempt: partial[None]) -> None:
        """
        Raises:
            ValueError: it fails again and again without progress.
        """
        self.why = ""
        while True:
            try:
                with watched(self._session.fault):
                    attempt()
                return self._restarts.progressed()
            except Exception as error:
                why = self._session.fault() or fault(error)
                if why is None:
                    raise
                entirely = self._restarts.count > 0
                if not self._restarts.again():
                    most = self.config.recovery.restarts
                    raise ValueError(
                        f"{label}: {why} (after {most} restarts without progress in between: recovery.restarts)"
                    ) from error
                self.why = why
                if self._session.stuck:
                    self.view.line(f"{label}: {why}; the command begins anew")
                    afresh(self._restarts.count)
                self.view.line(f"{label}: {why}; its processes are started again")
                self._session.renew(self.config, entirely)
