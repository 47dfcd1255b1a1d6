"""The user's command in a folder of its own, run again when it has ended; what its history says while it runs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import psutil

from tests.chaos.processes import Family, send
from tests.e2e.command import COMMAND, ROOT, environment

TICK = 0.1
MADE_BEFORE = ("align", "evaluate", "unfinished")  # of a store: what a job has to make itself


class Job:
    """`rlhf ...` with its outputs in `folder`, and with its temporary files apart from everyone's."""

    def __init__(self, folder: Path, overrides: Sequence[str], store: Path | None = None) -> None:
        self.folder, self._command = folder, [*COMMAND, *overrides]
        self.temporary = folder / "tmp"
        self.temporary.mkdir(parents=True)
        self._sockets = Path(tempfile.mkdtemp(prefix="rc", dir="/tmp"))  # their paths must be short
        self.outputs = folder / "outputs"
        if store is not None:
            self.outputs.mkdir()
            shutil.copytree(store, self.outputs / "store", ignore=shutil.ignore_patterns(*MADE_BEFORE))
        self.family = Family()
        self.stopped: list[psutil.Process] = []
        self.commands = 0
        self._process: subprocess.Popen[bytes]
        self._copies: list[threading.Thread] = []

    def start(self) -> None:
        self.commands += 1
        self._process = subprocess.Popen(
            self._command,
            cwd=self.folder,
            env=environment(
                TMPDIR=str(self.temporary),
                RAY_TMPDIR=str(self._sockets),
                TORCHINDUCTOR_CACHE_DIR=str(self.folder / "inductor"),  # kept by torch on purpose
                PYTHONPATH=str(ROOT),
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self.family.add(self._process.pid)
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._copies = [
            threading.Thread(target=_copy, args=(pipe, self.folder / name), daemon=True)
            for pipe, name in ((self._process.stdout, "stdout"), (self._process.stderr, "stderr"))
        ]
        for copy in self._copies:
            copy.start()

    def of(self, kind: str) -> list[psutil.Process]:
        """The processes of a kind; none of a command that has ended."""
        if self._process.poll() is not None:
            return []
        return [psutil.Process(self._process.pid)] if kind == "driver" else self.family.of(kind)

    @property
    def status(self) -> int | None:
        """Of the command, once it has ended. Processes of it that were stopped then come to themselves."""
        status = self._process.poll()
        if status is not None:
            self.proceed()
        return status

    def proceed(self) -> None:
        while self.stopped:
            send(self.stopped.pop(), signal.SIGCONT)

    def last_words(self) -> str:
        """The last line of stderr."""
        for copy in self._copies:
            copy.join(5)
        path = self.folder / "stderr"
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        return next((line for line in reversed(lines) if line.strip()), "")

    @property
    def align(self) -> Path | None:
        """The folder of the align stage, finished or not."""
        store = self.outputs / "store"
        found = [*store.glob("align/*/history.jsonl"), *store.glob("unfinished/align/*/history.jsonl")]
        return found[0].parent if found else None

    def events(self, *kinds: str) -> list[tuple[str, float]]:
        """Events of these kinds in the history, as far as it is written, and when they were; of a file that is renamed
        at this moment none."""
        folder = self.align
        if folder is None:
            return []
        try:
            written = (folder / "history.jsonl").read_bytes()
        except FileNotFoundError:
            return []
        heads = tuple(f'{{"event": "{kind}"'.encode() for kind in kinds)
        whole = (line for line in written.splitlines(keepends=True) if line.endswith(b"}\n"))
        found = [json.loads(line) for line in whole if line.startswith(heads)]
        return [(event["event"], event["time"]) for event in found]

    def trained(self) -> int:
        """Steps trained so far, also those that were undone."""
        return len(self.events("trained"))

    def gone(self, within: float) -> list[psutil.Process]:
        """What is left of the command and all that it started, after at most this time."""
        end = time.monotonic() + within
        while (left := self.family.alive()) and time.monotonic() < end:
            time.sleep(TICK)
        return left

    def close(self) -> None:
        self.proceed()
        self.family.look()
        self.family.end()
        self.family.close()
        self._process.wait()
        shutil.rmtree(self._sockets, ignore_errors=True)


def _copy(pipe: IO[bytes], path: Path) -> None:
    """A pipe, and not the file itself: a full disk must not end the command by its own words."""
    with pipe, open(path, "ab", buffering=0) as file:
        while part := os.read(pipe.fileno(), 65536):
            file.write(part)


class Mark:
    """A moment of a history, and what has followed it."""

    def __init__(self, job: Job, when: float) -> None:
        self._job, self._when = job, when

    def _after(self) -> list[tuple[str, float]]:
        events = self._job.events("began", "trained")
        return [(kind, when) for kind, when in events if when >= self._when]

    def mended(self) -> float | None:
        """Seconds until the first step was trained that had not begun at that moment: the first of a later attempt, or
        the second of the same one."""
        after = self._after()
        began = [i for i, (kind, _) in enumerate(after) if kind == "began"]
        trained = [when for kind, when in after[began[-1] if began else 0 :] if kind == "trained"]
        needed = 1 if began else 2
        return trained[needed - 1] - self._when if len(trained) >= needed else None

    def how(self, commands: int) -> str:
        """`commands`: run since then."""
        if commands:
            return "command run again"
        began = any(kind == "began" for kind, _ in self._after())
        return "from a checkpoint" if began else "in place"
