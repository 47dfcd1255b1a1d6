"""The history of an alignment: an append-only log of what became of each work item, one line of JSON for each event.

    python -m rlhf.flow.history FILE     one line: clean, or what is untrue and where (status 1); see `flow/check.py`

An attempt is what one set of roles did, from the step of the checkpoint that it began from. What earlier attempts did
after that step is undone; the rest of them and the last attempt are the surviving history.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, BinaryIO

FILE = "history.jsonl"


@dataclass(frozen=True)
class Began:
    """An attempt begins at a step: 0, or that of a checkpoint. No item is held."""

    step: int
    steps: int  # to be trained in all
    items_per_step: int
    staleness: int
    why: str  # what ended the attempt before; empty for the first


@dataclass(frozen=True)
class Admitted:
    """Items may be sampled from now on."""

    items: tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """An item is given to a generator, to be sampled from weights of `version` at least."""

    item: int
    generator: int
    version: int


@dataclass(frozen=True)
class Sampled:
    item: int
    version: int  # that it was sampled from
    responses: int
    tokens: int


@dataclass(frozen=True)
class Rewarded:
    item: int


@dataclass(frozen=True)
class Trained:
    """A batch turned weights of `version` into `version` + 1. By item: the attempt that its rollouts were sampled in,
    kept beside them (`History.attempt` when they came), and the version that they were sampled from."""

    version: int
    items: tuple[int, ...]
    attempts: tuple[int, ...]
    versions: tuple[int, ...]


@dataclass(frozen=True)
class Lost:
    """What was made of an item is lost, wherever it was: it waits for a generator again."""

    item: int
    why: str


@dataclass(frozen=True)
class Checkpoint:
    """Said before the checkpoint of a step takes its place: the disk never has one that is newer than the history."""

    step: int


@dataclass(frozen=True)
class Evaluated:
    step: int


@dataclass(frozen=True)
class Ended:
    """The last step is trained; `early`: why it is not that of the configuration, else empty."""

    step: int
    early: str


Event = Began | Admitted | Asked | Sampled | Rewarded | Trained | Lost | Checkpoint | Evaluated | Ended
EVENTS: dict[str, type[Any]] = {
    kind.__name__.lower(): kind
    for kind in (Began, Admitted, Asked, Sampled, Rewarded, Trained, Lost, Checkpoint, Evaluated, Ended)
}
_TYPES: dict[str, Any] = {"int": int, "str": str, "tuple[int, ...]": tuple}
_BEGAN = b'{"event": "began"'


@dataclass(frozen=True)
class Line:
    """An event with its place in the file, its attempt (1, 2, ...), and when it was written (Unix time, seconds)."""

    number: int
    attempt: int
    time: float
    event: Event


class History:
    """Writes a history. Each event is one write, so that a killed process leaves whole lines; `Began`, `Checkpoint` and
    `Ended` wait for the disk. A file that is there is continued: `begin` ends a line that a full disk or a power
    failure has cut off, and counts on from the attempts before.

    >>> import tempfile
    >>> history = History(Path(tempfile.mkdtemp()) / "history.jsonl")
    >>> history.begin(Began(0, steps=1, items_per_step=1, staleness=0, why=""))
    >>> history.add(Admitted((0,)))
    >>> history.attempt, [type(line.event).__name__ for line in read(history.path)]
    (1, ['Began', 'Admitted'])
    """

    def __init__(self, path: Path, clock: Callable[[], float] = time.time) -> None:
        self.path, self._clock = path, clock
        self.attempt = 0
        self._file: BinaryIO | None = None

    def begin(self, began: Began) -> None:
        """The first event of an attempt: of the file, after a fault, or in a new process."""
        self.close()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        before, whole = _attempts(self.path)
        self.attempt = before + 1
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - open for as long as the attempt
        if not whole:
            self._write(b"\n")
        self.add(began)

    def add(self, event: Event) -> None:
        """
        Raises:
            OSError: the disk is full, say; nothing can be added then but a new attempt.
        """
        self._write(text(Line(0, self.attempt, round(self._clock(), 3), event)).encode() + b"\n")
        if isinstance(event, Began | Checkpoint | Ended):
            assert self._file is not None
            os.fsync(self._file.fileno())

    def _write(self, line: bytes) -> None:
        assert self._file is not None, "an attempt has to begin first"
        file, self._file = self._file, None
        while line:
            line = line[file.write(line) :]
        self._file = file

    def close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            file.close()


def copy_until(source: Path, target: Path, step: int) -> None:
    """Copies a history up to where the checkpoint of a step was said.

    Raises:
        ValueError: it says nothing of that checkpoint.
    """
    lines = list(read(source))
    last = max((line.number for line in lines if line.event == Checkpoint(step)), default=0)
    if last == 0:
        raise ValueError(f"{source} says nothing of a checkpoint of step {step}")
    kept = source.read_bytes().splitlines(keepends=True)[:last]
    target.write_bytes(b"".join(kept))


def _attempts(path: Path) -> tuple[int, bool]:
    """How many attempts a file has, and whether its last line is whole."""
    if not path.exists():
        return 0, True
    found, line = 0, b"\n"
    with open(path, "rb") as file:
        for line in file:
            found += line.startswith(_BEGAN) and _whole(line)
    return found, line.endswith(b"\n")


def _whole(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def read(path: Path) -> Iterator[Line]:
    """The events of a file. A line that is cut off is left out at the end of an attempt, and an error elsewhere.

    Raises:
        ValueError: a line is no event; it names file and line.
    """
    cut = ""
    with open(path, "rb") as file:
        for number, text in enumerate(file, 1):
            if cut and not text.startswith(_BEGAN):
                raise ValueError(cut)
            try:
                line, cut = _line(number, text), ""
            except (ValueError, TypeError) as error:
                cut = f"{path}:{number}: not an event of a history ({error})"
                continue
            yield line


def _line(number: int, text: bytes) -> Line:
    found = json.loads(text)
    if not isinstance(found, dict) or found.get("event") not in EVENTS:
        raise ValueError("of no known kind")
    found = {k: tuple(v) if isinstance(v, list) else v for k, v in found.items()}
    kind = EVENTS[found.pop("event")]
    attempt, when = found.pop("attempt", None), found.pop("time", None)
    if type(attempt) is not int or type(when) not in (int, float):
        raise ValueError("attempt and time must be numbers")
    event: Any = kind(**found)
    for field in fields(kind):
        value: Any = getattr(event, field.name)
        expected = _TYPES[str(field.type)]
        if type(value) is not expected or (expected is tuple and any(type(v) is not int for v in value)):
            raise ValueError(f"{field.name} must be of type {field.type}")
    return Line(number, attempt, when, event)


def text(line: Line) -> str:
    """A line as it stands in the file."""
    head = {"event": type(line.event).__name__.lower(), "attempt": line.attempt, "time": line.time}
    return json.dumps(head | vars(line.event))


if __name__ == "__main__":
    from rlhf.flow.check import main

    sys.exit(main(sys.argv[1:]))
