"""Files and links that are there whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path


def beside(path: Path) -> Path:
    """A name in the same folder that nobody else takes, on this machine or another."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")


def write_atomic(path: Path, text: str) -> None:
    """Writes beside, to the disk, and renames: a reader sees the old file or the new one."""
    new = beside(path)
    try:
        with open(new, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)  # it is there only if the disk is full, or the like


def sync(folder: Path) -> None:
    """Returns when the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link(path: Path, target: Path) -> None:
    """Points `path` at `target` by a relative symbolic link, replacing an older one at once."""
    new = beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    new.symlink_to(os.path.relpath(target, path.parent))
    os.replace(new, path)
