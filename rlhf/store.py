"""Where stages keep their outputs, named by a fingerprint of what went in, so that equal work is done once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

ADAPTER = "adapter_config.json"  # peft's name for what an adapter's folder holds
MADE_BY = 2
"""Counts the times that the same inputs came to give something else: what earlier code made is not taken for it."""
WHOLE = 64 << 20  # files up to this many bytes are hashed whole, larger ones by size and time


def fingerprint(*parts: Any) -> str:
    """A short stable hash of JSON-like values and dataclasses.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1})
    True
    """
    text = json.dumps([MADE_BY, *parts], sort_keys=True, default=_plain)
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    raise TypeError(f"no fingerprint for {type(value)}")


def source_fingerprint(source: str | Sequence[str]) -> str:
    """Of a file or folder its content, of an adapter's also its base's; of anything else (a hub name) the name; of
    several sources all of them."""
    if not isinstance(source, str):
        return fingerprint([source_fingerprint(one) for one in source])
    path = Path(source).expanduser()
    if not path.exists():
        return fingerprint(source)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    digest = hashlib.blake2b(digest_size=8)
    if (path / ADAPTER).is_file():
        base = json.loads((path / ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path")
        digest.update(source_fingerprint(str(base)).encode())
    for file in files:
        digest.update(str(file.relative_to(path)).encode())
        stat = file.stat()
        if stat.st_size <= WHOLE:
            digest.update(file.read_bytes())
        else:
            digest.update(f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


class Store:
    """Folders `root/stage/fingerprint`. A folder is there whole or not at all: it is made beside and renamed.

    >>> import tempfile
    >>> store = Store(Path(tempfile.mkdtemp()))
    >>> folder = store.make("sft", "0a", lambda folder: (folder / "model").write_text("..."))
    >>> store.has("sft", "0a"), (folder / "model").read_text()
    (True, '...')
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, stage: str, name: str) -> Path:
        return self.root / stage / name

    def has(self, stage: str, name: str) -> bool:
        return self.folder(stage, name).is_dir()

    def make(self, stage: str, name: str, fill: Callable[[Path], Any]) -> Path:
        """Makes a folder by `fill(empty folder)`. Of two jobs that make the same, the first to end has its place, which
        others may read by then; what the second made is left out."""
        final = self.folder(stage, name)
        beside = _beside(final)
        beside.mkdir(parents=True)
        try:
            fill(beside)
            try:
                os.rename(beside, final)
            except OSError:
                if not final.is_dir():
                    raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
        return final


def _beside(path: Path) -> Path:
    """A name in the same folder that nobody else takes, on this machine or another."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}")


def check_writable(key: str, folder: str) -> None:
    """Refuses a folder in which nothing can be written; makes it if it is not there.

    Raises:
        ValueError: names the key and what the system says.
    """
    if not folder.strip():
        raise ValueError(f"{key} is empty: give a folder")
    try:
        path = Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path) as file:
            file.write(bytes(4096))
            file.flush()
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody's home
        said = error.strerror if isinstance(error, OSError) else error
        if isinstance(error, FileExistsError):
            said = "a file has that name"
        raise ValueError(f"{key}={folder}: {said}; give a folder that can be written") from None


def write_atomic(path: Path, text: str) -> None:
    """Writes beside, to the disk, and renames: a reader sees the old file or the new one."""
    beside = _beside(path)
    with open(beside, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def link(path: Path, target: Path) -> None:
    """Points `path` at `target` by a relative symbolic link, replacing an older one at once."""
    beside = _beside(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside.symlink_to(os.path.relpath(target, path.parent))
    os.replace(beside, path)
