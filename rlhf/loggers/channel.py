"""One logger on a thread of its own, so that a slow or broken service neither delays a step nor ends a run."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from itertools import islice

from rlhf.loggers.logger import Logger, Run
from rlhf.logs import METRICS, read_row
from rlhf.shown import shown

MOST = 10_000  # steps that wait for a logger; beyond, it is given up
_Call = Callable[[], None]


class Channel:
    """Hands steps to a logger in their order, each once: what it lacks of the record first; what it has already, of a
    history that was set back, not again. After an error it is handed nothing more; that is told once, with how to send
    the rest. `close` waits `patience` seconds at most.
    """

    def __init__(
        self, kind: str, logger: Logger, run: Run, say: Callable[[str], None], patience: float
    ) -> None:
        self.failed = False
        self._kind, self._logger, self._run, self._say, self._patience = kind, logger, run, say, patience
        self._has = 0
        self._told = False  # that steps are not sent twice
        self._calls: queue.Queue[_Call | None] = queue.Queue(MOST)
        self._thread = threading.Thread(target=self._work, name=f"logger {kind}", daemon=True)
        self._thread.start()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        row = dict(metrics)
        self._put(lambda: self._write(step, row))

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        self._put(lambda: self._logger.finish(step, figures))

    def close(self) -> None:
        self._put(None)
        self._thread.join(self._patience)
        if self._thread.is_alive():
            self._fail(f"it has not taken all of them in {self._patience:g} s (logging.patience)")

    def _put(self, call: _Call | None) -> None:
        if self.failed:
            return
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._fail(f"{MOST} steps wait for it")

    def _work(self) -> None:
        try:
            self._has = self._logger.begin(self._run)
            for row in self._record():
                self._write(int(row["step"]), row)
            while not self.failed and (call := self._calls.get()) is not None:
                call()
        except Exception as error:  # whatever a library, or a service, comes up with
            self._fail(f"{type(error).__name__}: {error}")
        try:
            self._logger.close()
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")

    def _record(self) -> Iterator[Mapping[str, float]]:
        """The steps that the run goes on from and the logger may lack."""
        if self._has < self._run.step:
            with open(self._run.folder / METRICS, encoding="utf-8") as lines:
                yield from map(read_row, islice(lines, self._run.step))

    def _write(self, step: int, row: Mapping[str, float]) -> None:
        if self.failed:
            return
        if step > self._has:
            self._logger.write(step, row)
        elif step > self._run.step and not self._told:
            self._told = True
            self._say(
                f"{self._kind}: has steps up to {self._has} of before; those that are trained again are not sent twice"
            )

    def _fail(self, why: str) -> None:
        if not self.failed:
            self.failed = True
            self._say(
                shown(
                    f"{self._kind}: metrics are not sent any more ({' '.join(why.split())}); all are in "
                    f"align/{METRICS}; to send them: {self._logger.later}"
                )
            )
