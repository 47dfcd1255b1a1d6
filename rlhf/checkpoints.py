"""Checkpoints of a stage: folders that are there whole or not at all, checked before they are used."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.checksums import wrong
from rlhf.files import sync, write_atomic

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a stage saved after a step."""

    folder: Path
    step: int
    state: Mapping[str, Any]  # what the driver knew, as JSON can hold it


class Checkpoints:
    """The checkpoints `folder/step-NNNNNN` of a stage.

    One is written in three moves, of which the last makes it valid: `begin` gives an empty folder beside; who has the
    state fills it; `commit` adds the manifest (state, and each file's size and checksum) and renames it. So a process
    that is killed in between leaves none.

    >>> import tempfile
    >>> checkpoints = Checkpoints(Path(tempfile.mkdtemp()), keep=1)
    >>> for step in (1, 2): checkpoints.commit(step, checkpoints.begin(step), {"factor": step / 2}, {})
    >>> found = checkpoints.newest(print); found.step, found.state
    (2, {'factor': 1.0})
    """

    def __init__(self, folder: Path, keep: int) -> None:
        self._folder, self._keep = folder, keep

    def begin(self, step: int) -> Path:
        beside = self._folder / f".{_name(step)}"
        shutil.rmtree(beside, ignore_errors=True)  # of a process that was killed
        beside.mkdir(parents=True)
        return beside

    def commit(
        self,
        step: int,
        written: Path,
        state: Mapping[str, Any],
        files: Mapping[str, Sequence[Any]],
        besides: Sequence[int] = (),
    ) -> None:
        """Makes a checkpoint of what was written, and removes those that are too many; of the steps `besides` they are
        kept.

        Args:
            files: size and checksum (`rlhf.checksums`) by name.
        """
        content = {"step": step, "state": state, "files": files}
        write_atomic(written / MANIFEST, json.dumps({**content, "checksum": _checksum(content)}, indent=1))
        final = self._folder / _name(step)
        shutil.rmtree(final, ignore_errors=True)  # of a history that was set back
        os.rename(written, final)
        sync(self._folder)
        for old in self.steps()[: -self._keep]:
            if old not in besides:
                shutil.rmtree(self._folder / _name(old))

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, rising."""
        return sorted(int(p.name.split("-")[1]) for p in self._folder.glob("step-*"))

    def newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The newest one that is as it was written. A damaged one is told of and removed."""
        for step in reversed(self.steps()):
            folder = self._folder / _name(step)
            try:
                return read(folder)
            except ValueError as error:
                say(f"{error}; one before it is used, if there is any")
                shutil.rmtree(folder)
        return None

    def newest_unread(self) -> Checkpoint | None:
        """The newest one, by its manifest alone: for telling of it."""
        for step in reversed(self.steps()):
            with suppress(ValueError):
                return _manifest(self._folder / _name(step))[0]
        return None

    def at(self, step: int) -> Checkpoint:
        """The one of a step.

        Raises:
            ValueError: it is damaged, or missing.
        """
        return read(self._folder / _name(step))

    def back_to(self, step: int) -> None:
        """Removes those of later steps."""
        for later in self.steps():
            if later > step:
                shutil.rmtree(self._folder / _name(later))


def read(folder: Path) -> Checkpoint:
    """
    Raises:
        ValueError: the folder is no checkpoint, or is not as it was written.
    """
    found, files = _manifest(folder)
    damage = wrong(folder, files)
    if damage is not None:
        raise ValueError(f"checkpoint {folder} is damaged: {damage}")
    return found


def _manifest(folder: Path) -> tuple[Checkpoint, dict[str, Any]]:
    try:
        found = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        content = {key: found[key] for key in ("step", "state", "files")}
        whole = found["checksum"] == _checksum(content)
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(
            f"{folder} is no whole checkpoint: {MANIFEST} is missing or cannot be read"
        ) from None
    if not whole:
        raise ValueError(f"checkpoint {folder} is damaged: the checksum of {MANIFEST} is wrong")
    return Checkpoint(folder, content["step"], content["state"]), content["files"]


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
