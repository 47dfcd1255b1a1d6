"""Whatever a role does when it is stopped or dies, the command ends and tells the truth.

    python -m tests.chaos.ends          # 12 quick jobs of few steps, without a restart

Learner, generator and reward pool are hit while they compute and while they wait: by SIGSTOP for good, and by SIGKILL.
A case passes when the command ends in time, nothing of it is left, and it tells the truth: status 0 with the report's
name in the last line, and the report there; or status 1 with the role's name in the last line, and no report.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.chaos.__main__ import undisturbed
from tests.chaos.job import TICK, Job
from tests.chaos.processes import names, send
from tests.chaos.seed import GONE

ROLES = {"learner": "learner", "generator": "generator", "replica": "reward"}  # and what a line calls them
LIMIT = 240.0  # seconds of a command
STEPS = 24
OVERRIDES = (
    "experiment=quick",
    f"align.steps={STEPS}",
    "evaluate={samples: 2, best_of: []}",
    "resources.generators.count=1",
    "resources.learner.count=1",
    "recovery={restarts: 0, backoff: 0.5, silence: 8, startup: 60, grace: 20}",
    "logging.live=plain",
)


def busy(process: psutil.Process) -> bool:
    """Whether it computes for most of the next twentieth of a second."""
    try:
        before = sum(process.cpu_times()[:2])
        time.sleep(0.05)
        return sum(process.cpu_times()[:2]) - before > 0.025
    except psutil.Error:
        return False


def hit(job: Job, role: str, computes: bool, number: signal.Signals) -> bool:
    """Waits until a step is trained and a process of the role is in that state; whether there was one."""
    while job.status is None:
        if job.trained() >= 2:
            for process in job.of(role):
                if busy(process) == computes and job.trained() < STEPS - 2:
                    if number == signal.SIGSTOP:
                        job.stopped.append(process)
                    return send(process, number)
        time.sleep(0.01)
    return False


def fault(job: Job, role: str) -> str | None:
    """What is wrong with how the command ended."""
    end = time.monotonic() + LIMIT
    while (status := job.status) is None:
        if time.monotonic() > end:
            return f"not ended after {LIMIT:.0f} s: {', '.join(names(job.family.alive()))}"
        time.sleep(TICK)
    if left := job.gone(GONE):
        return f"processes are left: {', '.join(names(left))}"
    reports = list(job.outputs.glob("runs/*/report.html"))
    if status == 0:
        said = (job.folder / "stdout").read_text().strip().splitlines()[-1]
        return None if reports and "report.html" in said else f"status 0, the last line: {said}"
    words = job.last_words()
    if status == 1 and not reports and ROLES[role] in words.lower():
        return None
    return f"status {status}, {len(reports)} reports, the last line: {words[:300]}"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.ends", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("outputs/ends"), help="of all that is written")
    parser.add_argument("--only", default="", help="cases with this in their names: replica-idle-SIGKILL")
    asked = parser.parse_args(arguments)
    folder = asked.folder.absolute()
    store = undisturbed(folder, OVERRIDES, STEPS, print).store
    failed = 0
    every = itertools.product(ROLES, (True, False), (signal.SIGSTOP, signal.SIGKILL))
    named = {f"{r}-{'busy' if computes else 'idle'}-{n.name}": (r, computes, n) for r, computes, n in every}
    cases = {name: case for name, case in named.items() if asked.only in name}
    for name, (role, computes, number) in cases.items():
        shutil.rmtree(folder / name, ignore_errors=True)
        job, started = Job(folder / name, OVERRIDES, store), time.monotonic()
        try:
            job.start()
            problem = fault(job, role) if hit(job, role, computes, number) else "the role was never so"
            words = "its report is there" if job.status == 0 else job.last_words()
        finally:
            job.close()
        failed += problem is not None
        print(
            f"{name:24s} {'FAILED: ' + problem if problem else 'ended'} with status {job.status} "
            f"after {time.monotonic() - started:.0f} s: {words[:160]}",
            flush=True,
        )
    print(f"{len(cases) - failed} passed, {failed} failed")
    return int(failed > 0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with all that was started
    sys.exit(main(sys.argv[1:]))
