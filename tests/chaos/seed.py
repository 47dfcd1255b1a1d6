"""One seed: a job, the faults done to it, and whether it came through."""

from __future__ import annotations

import json
import math
import re
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.flow.check import check
from rlhf.flow.history import read
from tests.chaos.job import TICK, Job, Mark
from tests.chaos.processes import full, names, send
from tests.chaos.schedule import ENDS, Fault

LIMIT = 150.0  # seconds in which a step must be trained, and in which the job must end after its last step
APPEAR = 60.0  # seconds in which a process must be there to be hit
GONE = 30.0  # seconds after its end in which nothing of a command may be left
RUNS = 3  # of the command, without a step trained between

Say = Callable[[str], None]


@dataclass
class Outcome:
    """What became of a fault."""

    kind: str
    seconds: float | None  # until a step was trained that had not begun before it
    how: str


@dataclass
class Result:
    """Of a seed; it passed if there are no problems."""

    seed: int
    outcomes: list[Outcome] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    told: str = ""


@dataclass(frozen=True)
class Undisturbed:
    """What the same job gives, and leaves, by itself."""

    store: Path
    joint: tuple[float, float, float]  # win rate of the aligned policy, and its 95 % interval
    left: frozenset[str]  # names of files


class Stuck(Exception):
    """Nothing is trained any more."""


class Chaos:
    """Does a schedule's faults to a job, one after another: each once some steps were trained after the one before."""

    def __init__(self, job: Job, result: Result, say: Say) -> None:
        self.job, self._result, self._say = job, result, say
        self._runs = 0  # of the command, since a step was trained

    def run(self, schedule: Sequence[Fault]) -> None:
        self.job.start()
        try:
            for fault in schedule:
                if self._advance(fault.gap):
                    left = len(schedule) - len(self._result.outcomes)
                    self._problem(f"{left} faults left when the job had ended: it needs more steps")
                    return
                self._do(fault)
            self._until_the_end()
        except Stuck as stuck:
            self._problem(str(stuck))
            self.job.family.end()

    def _problem(self, text: str) -> None:
        self._result.problems.append(text)
        self._say(f"    ! {text}")

    def _advance(self, steps: int) -> bool:
        """Waits for steps; whether the job has ended."""
        target, end = self.job.trained() + steps, time.monotonic() + LIMIT
        while self.job.trained() < target:
            if self._ended(()):
                return True
            if time.monotonic() > end:
                raise Stuck(f"no {steps} steps in {LIMIT:.0f} s: {self._where()}")
            time.sleep(TICK)
        return False

    def _ended(self, expected: Sequence[int]) -> bool:
        """Whether the job is done. A command that ended otherwise is run again."""
        status = self.job.status
        if status is None:
            return False
        if status == 0:
            return True
        if status not in expected:
            self._problem(f"the command ended with status {status}: {self.job.last_words()[:300]}")
        self._runs += 1
        if self._runs > RUNS:
            raise Stuck(f"the command was run {RUNS} times without training a step")
        self.job.start()
        return False

    def _where(self) -> str:
        processes = ", ".join(names(self.job.family.alive()))
        return f"status {self.job.status}, processes: {processes}"

    def _do(self, fault: Fault) -> None:
        step, commands = self.job.trained(), self.job.commands
        when = self._inflict(fault)
        if when is None:
            return
        mark, end = Mark(self.job, when), time.monotonic() + LIMIT
        seconds = None
        while (seconds := mark.mended()) is None:
            if self._ended(ENDS.get(fault.kind, ())):
                break
            if time.monotonic() > end:
                raise Stuck(f"nothing trained in {LIMIT:.0f} s after {fault.kind}: {self._where()}")
            time.sleep(TICK)
        self._runs = 0
        how = mark.how(self.job.commands - commands)
        self._result.outcomes.append(Outcome(fault.kind, seconds, how))
        took = "no step left" if seconds is None else f"{seconds:6.1f} s"
        number = len(self._result.outcomes)
        self._say(f"  fault {number:2d}  {fault.kind:16s} after {step:3d} steps trained  {took}  {how}")

    def _inflict(self, fault: Fault) -> float | None:
        """When it was done; None: there is no such process."""
        if fault.kind == "fill-disk":
            writers = [*self.job.of("driver"), *self.job.of("learner")]
            when = time.time()
            full(writers, True)
            time.sleep(fault.seconds)
            full(writers, False)
            return when
        end = time.monotonic() + APPEAR
        while not (found := self.job.of(fault.target)):
            if self.job.status is not None or time.monotonic() > end:
                self._problem(f"{fault.kind}: there is no {fault.target}")
                return None
            time.sleep(TICK)
        process = found[fault.which % len(found)]
        when = time.time()
        number = {"kill": signal.SIGKILL, "term": signal.SIGTERM}.get(fault.action, signal.SIGSTOP)
        send(process, number)
        if fault.action == "stop":
            self.job.stopped.append(process)
        if fault.action == "delay":
            time.sleep(fault.seconds)
            send(process, signal.SIGCONT)
        return when

    def _until_the_end(self) -> None:
        end, trained = time.monotonic() + LIMIT, self.job.trained()
        while not self._ended(()):
            if self.job.trained() > trained:
                end, trained = time.monotonic() + LIMIT, self.job.trained()
            if time.monotonic() > end:
                raise Stuck(f"not ended {LIMIT:.0f} s after the last step: {self._where()}")
            time.sleep(TICK)


def judge(job: Job, result: Result, steps: int, undisturbed: Undisturbed | None, shared: set[str]) -> None:
    """Whether what the job left is as it must be; `shared`: what was in /dev/shm before. Without an undisturbed run the
    win rate is compared with nothing."""
    problems = result.problems
    processes = job.gone(GONE)
    if processes:
        problems.append(f"processes are left: {', '.join(names(processes))}")
    if job.status != 0 or job.align is None:
        return
    verdict = check(read(job.align / "history.jsonl"))
    if not verdict.clean:
        problems.append(f"history: {verdict}")
    rows = [json.loads(line)["step"] for line in (job.align / "metrics.jsonl").read_text().splitlines()]
    if rows != list(range(1, steps + 1)):
        problems.append(f"metrics.jsonl has the steps {_runs(rows)}, not 1 to {steps}")
    more = left_of(job, shared) - (undisturbed.left if undisturbed is not None else frozenset())
    if more:
        problems.append(f"files are left: {', '.join(sorted(more)[:8])}")
    mine = joint(job.outputs)
    result.told = f"{job.commands} commands; {verdict}; joint win rate {100 * mine[0]:.1f} %"
    if undisturbed is not None:
        its = undisturbed.joint
        noise = math.hypot((mine[2] - mine[1]) / 2, (its[2] - its[1]) / 2)
        result.told += f" (undisturbed {100 * its[0]:.1f} %, within {100 * noise:.1f} points)"
        if abs(mine[0] - its[0]) > noise:
            problems.append("the joint win rate is not within noise of the undisturbed run's")


def joint(outputs: Path) -> tuple[float, float, float]:
    """The joint win rate of the aligned policy and its 95 % interval. Two runs differ by noise alone if by less than
    the root of the sum of squares of the half widths: the interval of the difference of independent rates. (Theirs are
    of the same prompts, and so nearer: a stricter test would take the draws.)"""
    summary = json.loads((outputs / "latest" / "summary.json").read_text())
    low, high = summary["win_rate_ci"]["joint"]["aligned"]
    return summary["win_rate"]["joint"]["aligned"], low, high


def left_of(job: Job, shared: set[str]) -> set[str]:
    """Files that a job should not leave: hidden, half made or damaged ones in its outputs, temporary ones, shared
    memory that no process uses. Numbers within names are as #, so that those of two jobs compare."""
    store = job.outputs / "store"
    found = [p.relative_to(job.outputs) for p in job.outputs.rglob(".*") if not _of_hydra(p)]
    found += [p.relative_to(job.outputs) for p in (*store.glob("unfinished/*/*"), *store.glob("damaged/*/*"))]
    found += [p.relative_to(job.outputs) for p in store.rglob("lock")]
    found += [p.relative_to(job.folder) for p in job.temporary.rglob("*")]
    found += [Path("shm") / name for name in in_shared_memory() - shared if not _mapped(name)]
    return {re.sub(r"[0-9a-f]{8,}|\d+", "#", str(path)) for path in found}


def _of_hydra(path: Path) -> bool:
    return path.name == ".hydra"


def in_shared_memory() -> set[str]:
    return {p.name for p in Path("/dev/shm").iterdir()}


def _mapped(name: str) -> bool:
    """Whether a process has the file, which is then its own."""
    for maps in Path("/proc").glob("[0-9]*/maps"):
        try:
            if f"/dev/shm/{name}" in maps.read_text():
                return True
        except OSError:  # it has ended
            continue
    return False


def _runs(numbers: Sequence[int]) -> str:
    """
    >>> _runs([1, 2, 3, 3, 4, 8])
    '1-3, 3-4, 8'
    """
    parts: list[list[int]] = []
    for number in map(int, numbers):
        if parts and number == parts[-1][1] + 1:
            parts[-1][1] = number
        else:
            parts.append([number, number])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
