"""What each process of a run was busy with, and when: a Chrome trace for people, shares for the report.

A *track* is a process: "generator 0", "reward helpful", "learner 1". What is not in a span of its track is waiting.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.files import write_atomic

WAITS = {
    "generator": "work (the learner, or its weights)",
    "reward": "rollouts",
    "learner": "experiences",
}
"""What a process of each kind waits for when it is not busy, by the first word of its track."""


@dataclass(frozen=True)
class Span:
    track: str
    name: str
    start: float  # seconds since the epoch
    end: float


class Recorder:
    """Collects the spans of one process."""

    def __init__(self, track: str) -> None:
        self.track = track
        self._spans: list[Span] = []

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        start = time.time()
        try:
            yield
        finally:
            self.add(name, start)

    def add(self, name: str, start: float) -> None:
        """A span that ends now."""
        self._spans.append(Span(self.track, name, start, time.time()))

    def take(self) -> tuple[Span, ...]:
        """The spans since the last call."""
        spans, self._spans = tuple(self._spans), []
        return spans


def shares(spans: Sequence[Span], start: float, end: float) -> dict[str, dict[str, float]]:
    """By track, the share of the time from `start` to `end` spent on each name, and on "waiting".

    >>> spans = [Span("learner 0", "train", 1.0, 3.0), Span("learner 0", "publish", 3.0, 3.5)]
    >>> shares(spans, 0.0, 4.0)
    {'learner 0': {'train': 0.5, 'publish': 0.125, 'waiting': 0.375}}
    """
    found: dict[str, dict[str, float]] = {}
    for span in spans:
        seconds = max(0.0, min(span.end, end) - max(span.start, start))
        names = found.setdefault(span.track, {})
        names[span.name] = names.get(span.name, 0.0) + seconds / (end - start)
    for names in found.values():
        names["waiting"] = max(0.0, 1.0 - sum(names.values()))
    return dict(sorted(found.items()))


def covered(spans: Sequence[Span], start: float, end: float) -> float:
    """The share of the time from `start` to `end` in which at least one track was busy.

    >>> covered([Span("a", "x", 0.0, 2.0), Span("b", "x", 1.0, 3.0)], 0.0, 4.0)
    0.75
    """
    busy, at = 0.0, start
    for span in sorted(spans, key=lambda s: s.start):
        busy += max(0.0, min(span.end, end) - max(span.start, at))
        at = max(at, min(span.end, end))
    return busy / (end - start)


def write(path: Path, spans: Sequence[Span]) -> None:
    """Writes a Chrome trace (JSON): one row for each track, times in microseconds from the first span."""
    zero = min((s.start for s in spans), default=0.0)
    numbers = {track: n for n, track in enumerate(sorted({s.track for s in spans}))}
    events: list[dict[str, Any]] = [
        {"ph": "M", "name": "thread_name", "pid": 0, "tid": n, "args": {"name": track}}
        for track, n in numbers.items()
    ]
    events += [
        {
            "ph": "X",
            "name": s.name,
            "cat": s.track.split()[0],
            "pid": 0,
            "tid": numbers[s.track],
            "ts": round(1e6 * (s.start - zero)),
            "dur": round(1e6 * (s.end - s.start)),
        }
        for s in spans
    ]
    write_atomic(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}))


def read(path: Path) -> list[Span]:
    """The spans of a file that `write` wrote; times are seconds from the first."""
    events = json.loads(path.read_text())["traceEvents"]
    tracks = {e["tid"]: e["args"]["name"] for e in events if e["ph"] == "M"}
    return [
        Span(tracks[e["tid"]], e["name"], e["ts"] / 1e6, (e["ts"] + e["dur"]) / 1e6)
        for e in events
        if e["ph"] == "X"
    ]
