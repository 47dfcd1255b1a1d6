"""What a logger is, and the run that it is told of."""

from __future__ import annotations

import importlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlhf.config import LoggingConfig
from rlhf.files import write_atomic
from rlhf.shown import redacted

KEPT = "loggers"  # the folder, of an alignment's, that says by which id each logger knows it


class Unreachable(Exception):
    """A service does not answer. At the start of a new run that is an error, later it is told."""


@dataclass(frozen=True)
class Run:
    """An alignment. Its identity is that of its folder: whatever command goes on with it, it is the same run."""

    name: str
    config: Mapping[str, Any]  # as it is saved: without secrets
    folder: Path  # of metrics.jsonl
    step: int  # that it goes on from; the record has these steps

    def kept(self, kind: str) -> dict[str, Any] | None:
        """What the logger of this kind wrote down of the run."""
        path = self.folder / KEPT / f"{file_name(kind)}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def keep(self, kind: str, values: Mapping[str, Any]) -> None:
        """Writes down what the logger needs to go on with the run; once, for a finished folder does not change."""
        (self.folder / KEPT).mkdir(exist_ok=True)
        write_atomic(self.folder / KEPT / f"{file_name(kind)}.json", json.dumps(dict(values)))


class Logger(Protocol):
    """Sends metrics to one place. `check` is called in the main thread before Ray starts, all else in a thread of the
    logger's own. Whatever `begin`, `write`, `finish` or `close` raises ends this logger, not the run: the steps
    that are missing then are sent when the run goes on, or by its report.
    """

    @property
    def later(self) -> str:
        """How to send what could not be sent, in words."""

    def __init__(self, settings: LoggingConfig, outputs: Path) -> None:
        """outputs: the folder of all runs."""

    def check(self) -> None:
        """
        Raises:
            ValueError: a setting is impossible, the library is not installed, or a key is missing or refused; it names
                the key of the configuration, or the environment variable.
            Unreachable: the service does not answer.
        """

    def begin(self, run: Run) -> int:
        """Begins the run, or goes on with it if it has begun; returns the last step that the logger has, 0 for none."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Adds a step; they rise."""

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        """Adds the final figures of the run, which has ended after this step."""

    def close(self) -> None:
        """Returns when all is sent, or kept to be sent. It is called after errors too, also of `begin`."""


def library(kind: str, name: str, extra: str, module: str | None = None) -> Any:
    """The module of a logger's library.

    Raises:
        ValueError: it is not installed; it says how it is.
    """
    try:
        return importlib.import_module(module or name)
    except ImportError as error:
        missing = error.name or name
        raise ValueError(
            f"logging.loggers: {kind} needs {missing.partition('.')[0]}, which is not installed: pip install "
            f"'rlhf[{extra}]' (or pip install {name})"
        ) from None


def choose(key: str, value: str, allowed: tuple[str, ...]) -> None:
    """
    Raises:
        ValueError: the value is none of these.
    """
    if value not in allowed:
        raise ValueError(f"{key}={value} is not one of {', '.join(allowed)}")


def without_secret(key: str, value: str | None, variables: str) -> None:
    """
    Raises:
        ValueError: the value has a password or a token in it, whose place is the environment.
    """
    if value is not None and redacted(value) != value:
        raise ValueError(f"{key}={redacted(value)} has a secret in it: leave it out, and set {variables}")


def from_environment(*names: str) -> str | None:
    """The value of the first of these variables that is set."""
    return next((os.environ[name] for name in names if os.environ.get(name)), None)


def file_name(kind: str) -> str:
    """
    >>> file_name("my.package:Logger")
    'my.package-Logger'
    """
    return re.sub(r"[^\w.]+", "-", kind)


def flat(config: Mapping[str, Any], key: str = "") -> dict[str, Any]:
    """The leaves of nested groups, by dotted keys.

    >>> flat({"align": {"steps": 3}, "seed": 0})
    {'align.steps': 3, 'seed': 0}
    """
    found: dict[str, Any] = {}
    for name, value in config.items():
        inner = f"{key}.{name}" if key else str(name)
        found |= flat(value, inner) if isinstance(value, Mapping) and value else {inner: value}
    return found
