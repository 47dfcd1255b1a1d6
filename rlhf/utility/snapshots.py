"""Baseline statistics as one file: a header in JSON, and arrays, of which equal ones are there once."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.utility.columns import Column
from rlhf.utility.moments import Moments
from rlhf.utility.sketch import GridSketch
from rlhf.utility.tables import CompactTable, RewardTable

FORMAT = 2
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Snapshot:
    """What a file holds."""

    exact: int
    frozen: bool
    keys: dict[str, str]  # model -> fingerprint
    columns: dict[str, dict[str, Column]]  # kind -> model -> rewards


def share_ids(columns: list[Column]) -> None:
    """Lets tables with equal prompt ids, or equal offsets, have the same array."""
    seen: list[np.ndarray] = []

    def shared(array: np.ndarray) -> np.ndarray:
        equal = [other for other in seen if other is array or np.array_equal(other, array)]
        seen.extend([] if equal else [array])
        return equal[0] if equal else array

    for column in columns:
        if column.compact is not None:
            table = column.compact
            column.compact = replace(table, ids=shared(table.ids), offsets=shared(table.offsets))
        else:
            exact = column.table()
            column.tables[:] = [replace(exact, ids=shared(exact.ids), offsets=shared(exact.offsets))]


def write(path: Path, snapshot: Snapshot) -> None:
    """Atomically: the path has the old file or the new one, never a part."""
    share_ids([column for models in snapshot.columns.values() for column in models.values()])
    arrays: Arrays = {}
    named: dict[int, str] = {}
    columns = []
    for kind, models in snapshot.columns.items():
        for i, (model, column) in enumerate(models.items()):
            parts = _parts(column)
            names = {part: named.setdefault(id(array), f"{kind}.{i}.{part}") for part, array in parts.items()}
            arrays |= {names[part]: array for part, array in parts.items()}
            columns.append({"kind": kind, "model": model, "arrays": names, **_described(column)})
    header = {"exact": snapshot.exact, "frozen": snapshot.frozen, "keys": snapshot.keys, "columns": columns}
    text = json.dumps(header)
    check = {
        "format": np.array(FORMAT),
        "header": np.array(text),
        "checksum": np.array(_checksum(text, arrays)),
    }
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with beside.open("wb") as file:
        np.savez(file, allow_pickle=False, **check, **arrays)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def read(path: Path) -> Snapshot:
    """What `write` wrote.

    Raises:
        ValueError: the content is not what was written, or in another format; it names the file.
    """
    try:
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in stored.files}
    except (OSError, EOFError, ValueError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        # cut short, an array by itself, or pickled objects, which are never loaded
        raise ValueError(
            f"{path}: no baseline statistics can be read from it ({error}); delete it or give another file"
        ) from error
    version = arrays.pop("format", None)
    if version is None or version.shape or version != FORMAT or not {"header", "checksum"} <= arrays.keys():
        raise ValueError(f"{path}: the baseline statistics are in an older format; delete the file")
    text, checksum = str(arrays.pop("header")), str(arrays.pop("checksum"))
    if checksum != _checksum(text, arrays):
        raise ValueError(f"{path}: the baseline statistics in it are damaged; delete the file")
    header = json.loads(text)
    columns: dict[str, dict[str, Column]] = {}
    for entry in header["columns"]:
        parts = {part: arrays[name] for part, name in entry["arrays"].items()}
        columns.setdefault(entry["kind"], {})[entry["model"]] = _column(header["exact"], entry, parts)
    return Snapshot(header["exact"], header["frozen"], header["keys"], columns)


def _parts(column: Column) -> Arrays:
    """The arrays of a settled column, by name."""
    table = column.compact or column.table()
    parts: Arrays = {"ids": table.ids, "offsets": table.offsets}
    if isinstance(table, CompactTable):
        parts |= {"codes": table.codes, "moments": table.moments}
        parts |= {f"pinned.{level!r}": pinned for level, pinned in table.pinned.items()}
    else:
        parts["values"] = table.values
    sketches = [column.sketches[prompt] for prompt in sorted(column.sketches)]
    if sketches:
        parts["sketches.ids"] = np.array(sorted(column.sketches), np.uint64)
        parts["sketches.bins"] = np.array([[s.bins, len(s.edges), s.exponent] for s in sketches], np.int64)
        parts["sketches.range"] = np.array([[s.low, s.high] for s in sketches], np.float64)
        parts["sketches.edges"] = np.concatenate([s.edges for s in sketches])
        parts["sketches.counts"] = np.concatenate([s.counts for s in sketches])
    return parts


def _described(column: Column) -> dict[str, Any]:
    return {
        "digest": column.digest(),
        "items": sorted(column.items, key=repr),
        "moments": _numbers(column.moments),
        "sketches": [_numbers(column.sketches[prompt].moments) for prompt in sorted(column.sketches)],
    }


def _numbers(moments: Moments) -> list[str]:
    return [f"{number:x}" for number in (moments.count, moments.total, moments.squares)]


def _column(exact: int, entry: Mapping[str, Any], parts: Arrays) -> Column:
    column = Column(
        exact,
        items={tuple(item) if isinstance(item, list) else item for item in entry["items"]},
        moments=_moments(entry["moments"]),
        sketches=_sketches(entry["sketches"], parts),
        known_digest=entry["digest"],
    )
    if "codes" in parts:
        pinned = {float(p.removeprefix("pinned.")): parts[p] for p in parts if p.startswith("pinned.")}
        column.compact = CompactTable(
            parts["ids"], parts["offsets"], parts["codes"], parts["moments"], pinned
        )
    else:
        column.tables, column.sorted = [RewardTable(parts["ids"], parts["offsets"], parts["values"])], True
    return column


def _moments(numbers: list[str]) -> Moments:
    return Moments(*(int(number, 16) for number in numbers))


def _sketches(moments: list[list[str]], parts: Arrays) -> dict[int, GridSketch]:
    if not moments:
        return {}
    bins, spread = parts["sketches.bins"].tolist(), parts["sketches.range"].tolist()
    ends = np.cumsum([size for _, size, _ in bins])[:-1]
    edges, counts = (np.split(parts[f"sketches.{part}"], ends) for part in ("edges", "counts"))
    return {
        prompt: GridSketch(
            bins[i][0], bins[i][2], edges[i], counts[i], spread[i][0], spread[i][1], _moments(moments[i])
        )
        for i, prompt in enumerate(parts["sketches.ids"].tolist())
    }


def _checksum(text: str, arrays: Arrays) -> str:
    digest = hashlib.blake2b(text.encode(), digest_size=16)
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()
