"""Reads the files that W&B writes offline: a log of LevelDB's format, of W&B's own messages.

W&B's reader of them is no part of its Python package.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEADER, BLOCK = 7, 1 << 15  # bytes
_HEAD = struct.Struct("<IHB")  # of each part: its checksum, length and kind
FULL, LAST = 1, 4  # kinds of parts that end a message


def messages(path: Path) -> Iterator[Any]:
    """The messages that are there whole; the last one of a process that was killed may not be."""
    from wandb.proto import wandb_internal_pb2

    data = path.read_bytes()
    at, parts = HEADER, b""
    while at + _HEAD.size <= len(data):
        if BLOCK - at % BLOCK < _HEAD.size:  # the rest of a block that has no room for a head
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        if kind == 0 or at + length > len(data):
            return
        parts += data[at : at + length]
        at += length
        if kind in (FULL, LAST):
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def history(path: Path) -> dict[int, dict[str, Any]]:
    """The metrics of a file, by step."""
    found = {}
    for message in messages(path):
        if message.WhichOneof("record_type") == "history":
            items = message.history.item
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            found[message.history.step.num] = row
    return found


def files_of(folder: Path, run: str) -> list[Path]:
    """Those of a run, in the order in which they were begun; of one second they have a number behind."""
    return sorted(folder.glob(f"offline-run-*-{run}*/run-{run}.wandb"))


def last_step(folder: Path, run: str) -> int:
    return max((step for path in files_of(folder, run) for step in history(path)), default=0)


def wait_for_end(path: Path, seconds: float) -> None:
    """Returns when a file has all of its run.

    Raises:
        TimeoutError: it has not.
    """
    end = time.monotonic() + seconds
    while not any(message.WhichOneof("record_type") == "exit" for message in messages(path)):
        if time.monotonic() > end:
            raise TimeoutError(f"{path} has not been written to its end in {seconds:g} s")
        time.sleep(0.05)
