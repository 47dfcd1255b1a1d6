"""The quick job under faults, seed by seed.

    python -m tests.chaos --seeds 10 --faults 20
    python -m tests.chaos --seeds 1 --only generator,kill-raylet align.staleness=1
    python -m tests.chaos --seeds 1 --schedule outputs/chaos/seed-3/schedule.jsonl

A line for each fault: its kind, the seconds until the next step was trained that had not begun before it, and how. A
line for each seed, and at last `N passed, N failed` (status 1 if any did). A seed passes when the command ends with
status 0 in the end; its history is clean; the metrics have each step once; no process or temporary file of it is left;
the joint win rate is within noise of that of an undisturbed run, which is made once; and the command never ended by
itself but after faults that end it (`schedule.ENDS`), when it is run again. Stopped processes (SIGSTOP) come to
themselves when their command has ended. The stages before align are made by the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import median

from tests.chaos.job import TICK, Job
from tests.chaos.schedule import KINDS, Fault, random_schedule, read_schedule, write_schedule
from tests.chaos.seed import (
    GONE,
    Chaos,
    Outcome,
    Result,
    Say,
    Undisturbed,
    in_shared_memory,
    joint,
    judge,
    left_of,
)
from tests.e2e.command import ROOT

OVERRIDES = (
    "experiment=quick",
    "align.checkpoint.every=2",
    "recovery.silence=15",
    "recovery.startup=120",
    "recovery.backoff=0.5",
    "recovery.grace=20",
    "logging.live=plain",
)
STEPS = (
    5  # of align for each fault: those between faults, those undone, those trained before a fault is noticed
)


def steps_for(faults: int) -> int:
    return STEPS * (faults + 1)


def undisturbed(folder: Path, overrides: Sequence[str], steps: int, say: Say) -> Undisturbed:
    """Made once for a folder and its overrides."""
    folder, done = folder / "undisturbed", folder / "undisturbed" / "done.json"
    if not done.exists() or json.loads(done.read_text())["overrides"] != list(overrides):
        shutil.rmtree(folder, ignore_errors=True)
        started, shared = time.monotonic(), in_shared_memory()
        job = Job(folder, overrides)
        try:
            job.start()
            while job.status is None:
                time.sleep(TICK)
            if job.status != 0:
                raise SystemExit(f"the undisturbed run ended with status {job.status}: {job.last_words()}")
            job.gone(GONE)
            found = {"overrides": list(overrides), "joint": joint(job.outputs)}
            found["left"] = sorted(left_of(job, shared))
            done.write_text(json.dumps(found))
        finally:
            job.close()
        say(
            f"undisturbed: {steps} steps in {time.monotonic() - started:.0f} s; it leaves {found['left'] or 'nothing'}"
        )
    found = json.loads(done.read_text())
    return Undisturbed(folder / "outputs" / "store", tuple(found["joint"]), frozenset(found["left"]))


def run_seed(
    seed: int,
    schedule: Sequence[Fault],
    folder: Path,
    overrides: Sequence[str],
    steps: int,
    by_itself: Undisturbed | None,
    say: Say,
) -> Result:
    shutil.rmtree(folder, ignore_errors=True)
    result, shared, started = Result(seed), in_shared_memory(), time.monotonic()
    job = Job(folder, overrides, by_itself.store if by_itself is not None else None)
    write_schedule(folder / "schedule.jsonl", schedule)
    try:
        Chaos(job, result, say).run(schedule)
        judge(job, result, steps, by_itself, shared)
    finally:
        job.close()
    (folder / "result.json").write_text(json.dumps(asdict(result), indent=1))
    outcome = "failed" if result.problems else "passed"
    took = f"{len(result.outcomes)} faults, {time.monotonic() - started:.0f} s"
    said = [took, result.told, *result.problems]
    say(f"seed {seed}: {outcome}  {'; '.join(filter(None, said))}")
    return result


def table(outcomes: Sequence[Outcome]) -> str:
    """Recovery by kind of fault, as Markdown."""
    ways = ("in place", "from a checkpoint", "command run again")
    lines = [
        f"| fault | times | seconds, median (most) | {' | '.join(ways)} |",
        "|---" * (3 + len(ways)) + "|",
    ]
    for kind in KINDS:
        mine = [o for o in outcomes if o.kind == kind]
        seconds = [o.seconds for o in mine if o.seconds is not None]
        if mine:
            took = f"{median(seconds):.1f} ({max(seconds):.1f})" if seconds else ""
            counts = [str(sum(o.how == way for o in mine) or "") for way in ways]
            lines.append(f"| {kind.replace('-', ' ')} | {len(mine)} | {took} | {' | '.join(counts)} |")
    return "\n".join(lines) + "\n"


def document(folder: Path, faults: int, overrides: Sequence[str]) -> str:
    """Of all seeds that were run in a folder."""
    results = [json.loads(path.read_text()) for path in sorted(folder.glob("seed-*/result.json"))]
    passed = sum(not r["problems"] for r in results)
    outcomes = [Outcome(**o) for r in results for o in r["outcomes"]]
    what = (
        f"`python -m tests.chaos --seeds {len(results)} --faults {faults} --table` runs the quick job under seeded "
        "faults, and checks of each seed that every work item was trained once, that each step's metrics are there "
        "once, that nothing is left of the command, and that the joint win rate is that of an undisturbed run."
    )
    how = (
        f"On two cores {passed} of {len(results)} seeds passed, with {len(outcomes)} faults. Seconds are those from "
        "the fault until the next step was trained that had not begun before it; a step by itself takes about half a "
        "second. Stopped: SIGSTOP for good, noticed after `recovery.silence=15` seconds where the process is needed. "
        "Delayed: for 1 to 3 seconds. A driver that is killed or terminated, and a disk that is full, end the command: "
        "the seconds are those of the same command run again, Ray's start included."
    )
    parts = ["# What may end or hang, and what it costs", _filled(what), _filled(how), table(outcomes)]
    return "\n\n".join(parts) + f"\nOverrides: `{' '.join(overrides)}`.\n"


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--faults", type=int, default=20, help="for each seed")
    parser.add_argument("--only", default="", help=f"some of {', '.join(KINDS)}, or parts of these")
    parser.add_argument("--schedule", type=Path, help="a schedule.jsonl that was written before")
    parser.add_argument("--folder", type=Path, default=Path("outputs/chaos"), help="of all that is written")
    parser.add_argument("--alone", action="store_true", help="without the undisturbed run to compare with")
    parser.add_argument(
        "--table",
        nargs="?",
        type=Path,
        const=ROOT / "docs" / "recovery.md",
        help="a page of all seeds that the folder has, as Markdown",
    )
    parser.add_argument("overrides", nargs="*", help="of the command's configuration")
    asked = parser.parse_intermixed_args(arguments)

    def say(line: str) -> None:
        print(line, flush=True)

    given = read_schedule(asked.schedule) if asked.schedule is not None else None
    faults = len(given) if given is not None else asked.faults
    steps, folder = steps_for(faults), asked.folder.absolute()
    overrides = [*OVERRIDES, f"align.steps={steps}", *asked.overrides]
    only = [o for o in asked.only.split(",") if o]
    by_itself = None if asked.alone else undisturbed(folder, overrides, steps, say)
    results = []
    for seed in range(asked.first, asked.first + asked.seeds):
        schedule = given if given is not None else random_schedule(seed, faults, only)
        results.append(run_seed(seed, schedule, folder / f"seed-{seed}", overrides, steps, by_itself, say))
    if asked.table is not None:
        asked.table.write_text(document(folder, faults, overrides))
    failed = sum(bool(r.problems) for r in results)
    say(f"{len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # with all that was started
    sys.exit(main(sys.argv[1:]))
