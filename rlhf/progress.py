"""What a person sees while a job runs: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from rlhf.shown import shown

EVERY = 5.0  # seconds between plain lines of one stage


class View:
    """Stages and their steps. `mode`: auto (live on a terminal), plain, off."""

    def __init__(self, mode: str) -> None:
        self._console = Console(quiet=mode == "off", highlight=False, soft_wrap=True)
        self._live = mode == "auto" and self._console.is_terminal
        self._started = time.monotonic()

    def line(self, text: str) -> None:
        self._console.print(f"[dim]{time.monotonic() - self._started:6.1f}s[/dim]  {escape(shown(text))}")

    @contextmanager
    def stage(self, name: str, total: int) -> Iterator[StageView]:
        """A stage of `total` steps; tells when it begins and how long it took."""
        started = time.monotonic()
        if self._live:
            columns = (
                TextColumn("{task.description:<14}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("{task.fields[text]}"),
            )
            with Progress(*columns, console=self._console, transient=True) as progress:
                yield StageView(self, name, total, progress)
        else:
            yield StageView(self, name, total, None)
        self.line(f"{name}: done in {time.monotonic() - started:.1f} s")


class StageView:
    def __init__(self, view: View, name: str, total: int, progress: Progress | None) -> None:
        self._view, self._name, self._total, self._progress = view, name, total, progress
        self._task = progress.add_task(name, total=total, text="") if progress is not None else None
        self._last = 0.0

    def extend(self, total: int) -> None:
        """The stage turns out to have `total` steps."""
        self._total = total
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=total)

    def update(self, done: int, text: str = "") -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, completed=done, text=escape(shown(text)))
        elif time.monotonic() - self._last >= EVERY or done == self._total:
            self._last = time.monotonic()
            self._view.line(f"{self._name}: {done}/{self._total}  {text}")
