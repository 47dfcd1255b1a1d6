"""Rows of a user's dataset, whatever holds it, each with the place it came from.

A source is one of

    prompts.jsonl            one JSON object a line (also .jsonl.gz)
    prompts.json             a JSON list of objects
    prompts.parquet
    saved/                   a directory written by datasets.save_to_disk; of a DatasetDict: saved/:test
    owner/name               a dataset of the Hugging Face hub
    owner/name:test          one of its splits
    owner/name@config:test   a split of one of its configurations

The split is `train` where none is given. What exists on disk wins over a hub dataset of the same name.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ACCEPTED = ".jsonl, .jsonl.gz, .json, .parquet, a directory written by save_to_disk, a hub name (owner/name)"
HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<config>[^:@]+))?(:(?P<split>.+))?")


@dataclass(frozen=True)
class Row:
    """One row: its columns, and where it is ("prompts.jsonl:12" or "prompts.parquet, row 12", from 1)."""

    values: dict[str, Any]
    source: str


def read_rows(source: str) -> list[Row]:
    """All rows of `source`, in order.

    Raises ValueError, naming the file and the line, for whatever cannot be read; an empty dataset included.
    """
    rows = list(_rows(source))
    if not rows:
        raise ValueError(f"{source}: the dataset is empty; give one with at least one row")
    return rows


def _rows(source: str) -> Iterator[Row]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _directory(source, path, None)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(source, _existing(source, path))
    if path.suffix == ".json":
        return _json_list(source, _existing(source, path))
    if path.suffix == ".parquet":
        return _parquet(source, _existing(source, path))
    if path.exists():
        raise ValueError(f"{source}: unknown extension {path.suffix!r}; accepted: {ACCEPTED}")
    folder, _, split = source.rpartition(":")
    if folder and Path(folder).expanduser().is_dir():
        return _directory(source, Path(folder).expanduser(), split)
    if hub := HUB_NAME.fullmatch(source):
        return _hub(source, hub["name"], hub["config"], hub["split"])
    raise ValueError(f"{source}: no such file or directory; accepted: {ACCEPTED}")


def _existing(source: str, path: Path) -> Path:
    if not path.is_file():
        raise ValueError(f"{source}: no such file; check the path (relative ones start at {Path.cwd()})")
    return path


def _json_lines(source: str, path: Path) -> Iterator[Row]:
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{source}:{number}"
                try:
                    values = json.loads(line)
                except ValueError as error:  # not JSON, or not UTF-8
                    raise ValueError(
                        f"{place}: this line is not JSON ({error}); write one object a line"
                    ) from error
                yield _row(values, place)


def _json_list(source: str, path: Path) -> Iterator[Row]:
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        hint = "if it holds one object a line, name it .jsonl"
        raise ValueError(f"{source}: this file is not JSON ({error}); {hint}") from error
    if not isinstance(values, list):
        raise ValueError(f"{source}: expected a list of objects, found {_kind(values)}; write [{{...}}, ...]")
    return _numbered(source, values)


def _parquet(source: str, path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(path)
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{source}: this file is not Parquet ({error}); write it again") from error
    return _numbered(source, table.to_pylist())


def _directory(source: str, path: Path, split: str | None) -> Iterator[Row]:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise ValueError(
            f"{source}: this directory was not written by datasets.save_to_disk; give one of the files in it"
        )
    import datasets

    saved = datasets.load_from_disk(str(path))
    if isinstance(saved, datasets.DatasetDict):
        if (chosen := split or "train") not in saved:
            names = ", ".join(f"{path}:{name}" for name in saved)
            raise ValueError(f"{source}: no split {chosen!r} in this directory; give one of {names}")
        saved = saved[chosen]
    elif split:
        raise ValueError(f"{source}: this directory holds a single dataset; leave out ':{split}'")
    return _numbered(source, saved.with_format(None))


def _hub(source: str, name: str, config: str | None, split: str | None) -> Iterator[Row]:
    import datasets

    try:
        dataset = datasets.load_dataset(name, config, split=split or "train")
    except Exception as error:  # the hub client raises many kinds, and each means the same to the user
        raise ValueError(
            f"{source}: no such file or directory, and loading it as a hub dataset failed "
            f"({type(error).__name__}: {error}); check owner/name@config:split and the network"
        ) from error
    return _numbered(source, dataset)


def _numbered(source: str, values: Iterable[Any]) -> Iterator[Row]:
    return (_row(value, f"{source}, row {number}") for number, value in enumerate(values, start=1))


def _row(values: Any, place: str) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f'{place}: expected an object such as {{"prompt": "..."}}, found {_kind(values)}')
    return Row(values, place)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else "an object")
