"""The processes of a command, by what they do; nothing else is ever signalled."""

from __future__ import annotations

import re
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import suppress

import psutil

LOOK = 0.3  # seconds between two looks for new processes

TITLES = {
    "generator": r"ray::Generator\b",
    "replica": r"ray::ServeReplica:.*:(?!ingress)[^:]*$",
    "ingress": r"ray::ServeReplica:.*:ingress",
    "controller": r"ray::ServeController\b",
    "baseline": r"ray::BaselineEstimator\b",
    "queue": r"ray::ExperienceQueue\b",
    "learner": r"ray::LearnerRank\b",
    "raylet": r"raylet$",
    "gcs": r"gcs_server$",
}
"""What begins the command line of each kind, as Ray sets it; of Ray's own programs the file."""


class Family:
    """All processes that descend from those added, once they were seen: also those whose parents have ended since."""

    def __init__(self) -> None:
        self._known: set[psutil.Process] = set()  # equal by number and time of start
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def add(self, pid: int) -> None:
        with self._lock:
            self._known.add(psutil.Process(pid))

    def _watch(self) -> None:
        while not self._closed.wait(LOOK):
            self.look()

    def look(self) -> None:
        parents = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                parents[process] = process.ppid()
        with self._lock:
            numbers = {p.pid for p in self._known if p in parents}
            found = True
            while found:
                new = {p for p, parent in parents.items() if parent in numbers} - self._known
                found = bool(new)
                self._known |= new
                numbers |= {p.pid for p in new}

    def alive(self) -> list[psutil.Process]:
        """Those that are there, oldest first. One that has ended, and whose parent has not heard of it, is not."""
        with self._lock:
            known = list(self._known)
        found = []
        for process in known:
            with suppress(psutil.Error):
                if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                    found.append((process.create_time(), process.pid, process))
        return [process for _, _, process in sorted(found)]

    def of(self, kind: str) -> list[psutil.Process]:
        """Those of a kind that are there; stopped ones only if there are no others."""
        found = [p for p in self.alive() if re.match(TITLES[kind], title(p))]
        return [p for p in found if not _stopped(p)] or found

    def end(self) -> None:
        for process in self.alive():
            send(process, signal.SIGKILL)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()


def _stopped(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_STOPPED
    except psutil.Error:
        return True


def title(process: psutil.Process) -> str:
    """As the process calls itself; of Ray's own programs the file's name."""
    try:
        words = process.cmdline()
    except psutil.Error:
        return ""
    first = words[0] if words else ""
    return first if first.startswith("ray::") else first.rsplit("/", 1)[-1]


def send(process: psutil.Process, number: signal.Signals) -> bool:
    """Whether it was still there. (psutil compares the time of its start: the number may be another's by now.)"""
    with suppress(psutil.Error):
        process.send_signal(number)
        return True
    return False


def full(processes: list[psutil.Process], yes: bool) -> None:
    """From now on no file of these can grow, or can again."""
    for process in processes:
        with suppress(psutil.Error, ProcessLookupError):
            _, most = resource.prlimit(process.pid, resource.RLIMIT_FSIZE)
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0 if yes else most, most))


def names(processes: list[psutil.Process]) -> Iterator[str]:
    for process in processes:
        yield f"{title(process) or '?'} ({process.pid})"
