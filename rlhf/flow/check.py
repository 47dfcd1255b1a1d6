"""Whether a history is true: in what survived of it each item was trained once, in order, from rollouts it may use."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.flow.history import (
    Admitted,
    Asked,
    Began,
    Checkpoint,
    Ended,
    Evaluated,
    Line,
    Lost,
    Rewarded,
    Sampled,
    Trained,
    read,
)


@dataclass(frozen=True)
class Verdict:
    """`violation`: the first thing that is untrue, with its line; None: nothing is."""

    violation: str | None
    attempts: int
    steps: int  # trained, of the surviving history
    items: int  # likewise
    lost: int  # times that an item had to be sampled again
    undone: int  # trained steps that a later attempt did again

    @property
    def clean(self) -> bool:
        return self.violation is None

    def __str__(self) -> str:
        if self.violation is not None:
            return f"untrue: {self.violation}"
        return (
            f"clean: {self.items} items, each trained once, in {self.steps} steps; {self.attempts} attempts, "
            f"{self.lost} items lost and sampled again, {self.undone} steps undone and trained again"
        )


def check(lines: Iterable[Line]) -> Verdict:
    """The verdict on a whole history, which must have ended.

    What it asks for: an attempt begins at step 0 or at a checkpoint of the surviving history; items are admitted once
    each, in order; an item is sampled from no older version than asked for and from none that is yet to be trained,
    rewarded after that, and trained after that; a batch is the next items in order, trained by the learner's version,
    each item from its last rollouts, which are of this attempt and at most `staleness` versions older; the last step
    is the configuration's, unless the history says why not.
    """
    state = _State()
    number = 0
    try:
        for line in lines:
            number = line.number
            state.take(line)
        state.finish()
    except _Untrue as untrue:
        return state.verdict(f"line {number}: {untrue}")
    except ValueError as error:  # of the reader
        return state.verdict(str(error))
    return state.verdict(None)


class _Untrue(Exception):
    pass


def _must(condition: bool, otherwise: str) -> None:
    if not condition:
        raise _Untrue(otherwise)


@dataclass
class _Item:
    stage: str = "waiting"  # asked, sampled, rewarded
    version: int = 0  # asked for; once it is sampled, sampled from


@dataclass
class _State:
    starts: list[int] = field(default_factory=list)  # the step that each attempt began from
    began: Began | None = None  # the last
    version: int = 0  # of the learner: the steps of the surviving history
    checkpoints: set[int] = field(default_factory=set)
    items: dict[int, _Item] = field(default_factory=dict)  # admitted, not trained
    admitted: int = 0  # the next item to be admitted
    ended: bool = False
    lost: int = 0
    undone: int = 0

    def verdict(self, violation: str | None) -> Verdict:
        size = 0 if self.began is None else self.began.items_per_step
        steps = self.version
        return Verdict(violation, len(self.starts), steps, steps * size, self.lost, self.undone)

    def take(self, line: Line) -> None:
        event, began = line.event, isinstance(line.event, Began)
        expected = len(self.starts) + began
        _must(line.attempt == expected, f"of attempt {line.attempt}, where attempt {expected} is under way")
        _must(began or line.attempt > 0, "no attempt has begun")
        _must(began or not self.ended, "comes after the end")
        match event:
            case Began():
                self._begin(event)
            case Admitted(items):
                for item in items:
                    self._admit(item)
            case Asked(item):
                self._move(item, "waiting", "asked", event.version)
                _must(
                    event.version <= self.version,
                    f"item {item} is asked for from {self._future(event.version)}",
                )
            case Sampled(item):
                asked = self._move(item, "asked", "sampled", event.version)
                _must(
                    event.version >= asked,
                    f"item {item} is sampled from version {event.version}, older than {asked}, asked for",
                )
                _must(
                    event.version <= self.version,
                    f"item {item} is sampled from {self._future(event.version)}",
                )
            case Rewarded(item):
                self._move(item, "sampled", "rewarded")
            case Trained():
                self._train(event)
            case Lost(item):
                _must(item in self.items, f"item {item} is lost, which is not held")
                _must(self.items[item].stage != "waiting", f"item {item} is lost, of which nothing was made")
                self.items[item] = _Item()
                self.lost += 1
            case Checkpoint(step):
                self._reached(step, "a checkpoint")
                self.checkpoints.add(step)
            case Evaluated(step):
                self._reached(step, "an evaluation")
            case Ended():
                self._end(event)

    def _begin(self, event: Began) -> None:
        before, step = self.began, event.step
        _must(min(event.step, event.staleness) >= 0 < event.items_per_step, "numbers below 0")
        _must(
            before is None or step == 0 or before.items_per_step == event.items_per_step,
            "another number of items per step than in the attempt before",
        )
        _must(
            step <= self.version,
            f"begins at step {step}, which the {self.version} steps before it do not reach",
        )
        _must(
            step == 0 or step in self.checkpoints,
            f"begins at step {step}, of which the surviving history has no checkpoint",
        )
        self.undone += self.version - step
        self.starts.append(step)
        self.began, self.version, self.ended = event, step, False
        self.checkpoints = {c for c in self.checkpoints if c <= step}
        self.items, self.admitted = {}, step * event.items_per_step

    def _future(self, version: int) -> str:
        return f"version {version}, which is not trained: the learner has version {self.version}"

    def _admit(self, item: int) -> None:
        _must(item >= self.admitted, f"item {item} is admitted twice")
        _must(item == self.admitted, f"item {item} is admitted, and item {self.admitted} is not")
        self.items[item] = _Item()
        self.admitted += 1

    def _move(self, item: int, before: str, after: str, version: int | None = None) -> int:
        """The version that it had."""
        _must(item in self.items, f"item {item} is {after}, which is not held")
        held = self.items[item]
        _must(held.stage == before, f"item {item} is {after}, but it was {held.stage}, not {before}")
        self.items[item] = _Item(after, held.version if version is None else version)
        return held.version

    def _train(self, event: Trained) -> None:
        assert self.began is not None
        size = self.began.items_per_step
        first = self.version * size
        _must(
            len(event.items) == len(event.attempts) == len(event.versions),
            "not one attempt and one version for each item trained",
        )
        for item in event.items:
            _must(item >= first, f"item {item} is trained twice")
        _must(
            event.items == tuple(range(first, first + size)),
            f"items {_some(event.items)} are trained out of order: {first} to {first + size - 1} are next",
        )
        _must(
            event.version == self.version,
            f"version {event.version} is trained, and the learner has version {self.version}",
        )
        for item, attempt, version in zip(event.items, event.attempts, event.versions, strict=True):
            self._use(item, attempt, version)
        self.version += 1

    def _use(self, item: int, attempt: int, version: int) -> None:
        assert self.began is not None
        made = f"item {item} is trained from rollouts of version {version}"
        now = len(self.starts)
        _must(0 < attempt <= now, f"{made} of attempt {attempt}, which is not there")
        undone = any(version > start for start in self.starts[attempt:])
        _must(not undone, f"{made} of attempt {attempt}, which was rolled back")
        _must(attempt == now, f"{made} of attempt {attempt}, and not of this one")
        behind = self.version - version
        _must(
            behind <= self.began.staleness,
            f"{made} by version {self.version}: staleness {behind}, above {self.began.staleness}",
        )
        held = self.items.get(item)
        _must(held is not None and held.stage == "rewarded", f"item {item} is trained without rewards")
        assert held is not None
        _must(version == held.version, f"{made}, and its last rollouts are of version {held.version}")
        del self.items[item]

    def _reached(self, step: int, what: str) -> None:
        start = self.starts[-1]
        _must(
            start <= step <= self.version,
            f"{what} of step {step}, in an attempt that has steps {start} to {self.version}",
        )

    def _end(self, event: Ended) -> None:
        assert self.began is not None
        _must(event.step == self.version, f"ends with step {event.step}, and {self.version} are trained")
        _must(
            bool(event.early) or self.version == self.began.steps,
            f"ends with {self.version} of {self.began.steps} steps trained, and does not say why",
        )
        self.ended = True

    def finish(self) -> None:
        _must(self.began is not None, "empty")
        assert self.began is not None
        _must(self.ended, f"has not ended: {self.version} of {self.began.steps} steps are trained")


def _some(items: Sequence[int]) -> str:
    shown = ", ".join(map(str, items[:8]))
    return shown if len(items) <= 8 else f"{shown}, ..."


def main(arguments: Sequence[str]) -> int:
    """The command: one line, and the exit status."""
    if len(arguments) != 1:
        sys.stderr.write("usage: python -m rlhf.flow.history FILE\n")
        return 2
    try:
        verdict = check(read(Path(arguments[0])))
    except OSError as error:
        sys.stderr.write(f"error: {arguments[0]}: {error.strerror}\n")
        return 2
    sys.stdout.write(f"{verdict}\n")
    return 0 if verdict.clean else 1
