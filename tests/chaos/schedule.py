"""What is done to which process, and when: seeded, or from a file."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

PROCESSES = (
    "generator",
    "replica",
    "ingress",
    "controller",
    "baseline",
    "queue",
    "learner",
    "raylet",
    "gcs",
)
"""Kinds of processes that a command has, beside the driver, which is the command itself."""

KINDS = (
    *(f"{action}-{target}" for target in PROCESSES for action in ("kill", "stop", "delay")),
    *(f"{action}-driver" for action in ("kill", "term", "delay")),
    "fill-disk",
)
"""kill: SIGKILL; stop: SIGSTOP for good; delay: SIGSTOP, and SIGCONT after `seconds`; term: SIGTERM; fill: no file of
the driver and the learner ranks may grow for `seconds`. (A limit on the size of files, RLIMIT_FSIZE, stands for the
disk's: it needs no file system of its own, and so no rights. Its error is EFBIG where a full disk's is ENOSPC.)"""

ENDS = {"kill-driver": (-9,), "term-driver": (143,), "fill-disk": (1,)}
"""Faults after which the command may end, with these statuses; it is then run again, as a user would."""


@dataclass(frozen=True)
class Fault:
    kind: str
    gap: int  # steps trained since the last fault was mended, before this one
    seconds: float  # of a delay or a full disk
    which: int  # of the processes of that kind, by number modulo theirs

    @property
    def action(self) -> str:
        return self.kind.split("-")[0]

    @property
    def target(self) -> str:
        return self.kind.split("-")[1]


def random_schedule(seed: int, faults: int, only: Sequence[str] = ()) -> list[Fault]:
    """Every kind comes up before any comes up again. `only`: kinds, or parts of their names.

    >>> len({f.kind for f in random_schedule(0, len(KINDS))}) == len(KINDS)
    True
    >>> {f.kind for f in random_schedule(0, 9, ["kill-queue", "raylet"])}  == {
    ...     "kill-queue", "kill-raylet", "stop-raylet", "delay-raylet"}
    True
    """
    kinds = [k for k in KINDS if not only or any(o == k or o in k.split("-") for o in only)]
    if not kinds:
        raise ValueError(f"--only {','.join(only)}: none of {', '.join(KINDS)}")
    rng = random.Random(seed)
    bag: list[str] = []
    found: list[Fault] = []
    for _ in range(faults):
        bag = bag or rng.sample(kinds, len(kinds))
        kind = bag.pop()
        seconds = 0.0
        if kind.startswith(("delay", "fill")):
            seconds = round(rng.uniform(1, 3), 2) * (2 if kind == "fill-disk" else 1)
        found.append(Fault(kind, rng.randint(1, 3), seconds, rng.randrange(8)))
    return found


def write_schedule(path: Path, faults: Sequence[Fault]) -> None:
    """JSON lines, for `--schedule`."""
    path.write_text("".join(json.dumps(asdict(f)) + "\n" for f in faults))


def read_schedule(path: Path) -> list[Fault]:
    found = [Fault(**json.loads(line)) for line in path.read_text().splitlines()]
    for fault in found:
        if fault.kind not in KINDS:
            raise ValueError(f"{path}: '{fault.kind}' is not one of {', '.join(KINDS)}")
    return found
