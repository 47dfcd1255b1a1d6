"""Metrics on disk: one JSON line a step. They are the record of a run; loggers (`rlhf/loggers`) have copies."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

METRICS = "metrics.jsonl"


class MetricsWriter:
    """Writes metrics to `folder/metrics.jsonl`.

    It goes on after `steps` steps of those that are there; later ones, of a history that was set back, are cut off.

    Raises:
        ValueError: the file has less steps than that.
    """

    def __init__(self, folder: Path, steps: int = 0) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._file = go_on(folder / METRICS, steps)

    def write(self, metrics: Mapping[str, float]) -> None:
        self._file.write(json.dumps(dict(metrics)) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """Returns when all is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def go_on(path: Path, lines: int) -> TextIO:
    """A file opened to add lines after its first `lines`; what is behind them is cut off."""
    there = path.read_bytes().splitlines(keepends=True)[:lines] if lines else []
    if len(there) < lines or (there and not there[-1].endswith(b"\n")):
        raise ValueError(f"{path} has less than the {lines} lines that its checkpoint speaks of")
    file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - who asks for it closes it
    file.truncate(sum(map(len, there)))
    return file


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return [read_row(line) for line in (folder / METRICS).read_text().splitlines()]


def read_row(line: str) -> dict[str, float]:
    return json.loads(line)
