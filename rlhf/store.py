"""Where stages keep their outputs, named by a fingerprint of what went in, so that equal work is done once."""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from rlhf.checksums import damaged, write_checksums
from rlhf.files import beside

log = logging.getLogger(__name__)

ADAPTER = "adapter_config.json"  # peft's name for what an adapter's folder holds
WAIT_TOLD = 60.0  # seconds between two lines that say what is waited for
WHOLE = 64 << 20  # files up to this many bytes are hashed whole, larger ones by size and time


def fingerprint(*parts: Any) -> str:
    """A short stable hash of JSON-like values and dataclasses.

    >>> fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 1})
    True
    """
    text = json.dumps(parts, sort_keys=True, default=_plain)
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
    """Folders `root/kind/name`, the name a fingerprint of what went in. One is there whole, or not at all.

    A folder is made in `root/unfinished`, by one process at a time: another that wants the same waits for it. What an
    interrupted process left there is cleared away, but for a folder with `checkpoints`: the next to make the same goes
    on from that. A finished one has the checksums of its files; it is read once a process, and one that is damaged is
    set aside and made again.

    >>> import tempfile
    >>> store = Store(Path(tempfile.mkdtemp()))
    >>> folder = store.make("sft", "0a", lambda folder: (folder / "model").write_text("..."))
    >>> store.has("sft", "0a"), (folder / "model").read_text()
    (True, '...')
    """

    def __init__(self, root: Path, say: Callable[[str], None] = log.warning) -> None:
        self.root, self._say = root, say
        self._whole: set[Path] = set()  # finished folders that were read

    def folder(self, kind: str, name: str) -> Path:
        return self.root / kind / name

    def unfinished(self, kind: str, name: str) -> Path:
        return self.root / "unfinished" / kind / name

    def has(self, kind: str, name: str) -> bool:
        """Whether a folder is there, as it was written."""
        folder = self.folder(kind, name)
        if folder in self._whole or not folder.is_dir():
            return folder in self._whole and folder.is_dir()
        damage = damaged(folder)
        if damage is not None:
            aside = beside(self.root / "damaged" / kind / name)
            aside.parent.mkdir(parents=True, exist_ok=True)
            os.rename(folder, aside)
            self._say(f"{folder} is damaged ({damage}): it was moved to {aside}")
            return False
        self._whole.add(folder)
        return True

    def make(self, kind: str, name: str, fill: Callable[[Path], Any]) -> Path:
        """Makes a folder by `fill(folder)`. That begins empty, or with what an interrupted call left, if it holds
        `checkpoints`; after an error, too, it is kept if it does."""
        final, work = self.folder(kind, name), self.unfinished(kind, name)
        with _alone(work, self._say) as lock:
            if self.has(kind, name):  # made while this process waited
                shutil.rmtree(work)
                return final
            _clear(work, lock)
            try:
                fill(work)
                _clear_hidden(work)
                write_checksums(work, leave_out=(LOCK, CHECKPOINTS))
                final.parent.mkdir(parents=True, exist_ok=True)
                os.rename(work, final)
                (final / LOCK).unlink()  # afterwards: who waits for it must not find the work without it
            except BaseException:
                if not _resumable(work):
                    shutil.rmtree(work, ignore_errors=True)
                raise
        self._whole.add(final)
        return final

    def sweep(self) -> None:
        """Clears away what interrupted processes left that nobody can go on from."""
        for work in (self.root / "unfinished").glob("*/*"):
            if not _resumable(work):
                with suppress(BlockingIOError), _alone(work, self._say, wait=False):
                    shutil.rmtree(work)


CHECKPOINTS, LOCK = "checkpoints", "lock"


def _resumable(folder: Path) -> bool:
    """Whether it holds what one can go on from."""
    kept = folder / CHECKPOINTS
    return kept.is_dir() and any(not p.name.startswith(".") for p in kept.iterdir())


def _clear(folder: Path, lock: Path) -> None:
    if _resumable(folder):
        _clear_hidden(folder)
        return
    for path in folder.iterdir():
        if path != lock:
            _remove(path)


def _clear_hidden(folder: Path) -> None:
    """Removes the beginnings of files that a process left when it was killed."""
    for path in list(folder.rglob(".*")):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def _alone(folder: Path, say: Callable[[str], None], wait: bool = True) -> Iterator[Path]:
    """Holds the folder's lock, a file in it, which ends with the process; makes the folder. With another at work it is
    waited for, and said so each minute.

    Raises:
        BlockingIOError: another is at work, and is not to be waited for.
    """
    lock, told = folder / LOCK, 0.0
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with open(lock, "a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                if time.monotonic() - told > WAIT_TOLD:
                    told = time.monotonic()
                    file.seek(0)
                    say(f"{folder} is being made by another run ({file.read().strip()}): it is waited for")
                time.sleep(0.5)
                continue
            if not _same(file.fileno(), lock):  # who had it has ended with the folder
                continue
            file.truncate(0)
            file.write(f"process {os.getpid()} of {socket.gethostname()}")
            file.flush()
            yield lock
            return


def _same(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


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
