"""Rows of a user's dataset, whatever holds it, each with the place it came from.

A source is one of

    prompts.jsonl            one JSON object a line (also .jsonl.gz)
    prompts.json             a JSON list of objects
    prompts.csv              a line of column names, then one row a line, in UTF-8 (also .csv.gz)
    prompts.parquet
    saved/                   a directory written by datasets.save_to_disk; of a DatasetDict: saved/:test
    owner/name               a dataset of the Hugging Face hub
    owner/name:test          one of its splits
    owner/name@config:test   a split of one of its configurations
    shards/*.jsonl           all that match, sorted by name (`**` crosses folders)

or a list of these, whose rows follow each other. The split is `train` where none is given. What exists on
disk wins over a hub dataset, or a pattern, of the same name.

A CSV file holds text alone: nothing is guessed of its values, and an empty one is null. Messages stand in it
as JSON (`rlhf/data/messages.py`), and a column of numbers is read as such where one is asked for.
"""

from __future__ import annotations

import csv
import glob
import gzip
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.json_text import check_characters, parsed

ACCEPTED = (
    ".jsonl, .jsonl.gz, .json, .csv, .csv.gz, .parquet, a directory written by save_to_disk, "
    "a hub name (owner/name), a pattern (shards/*.jsonl)"
)
HUB_NAME = re.compile(r"(?P<name>\w[\w.-]*/\w[\w.-]*)(@(?P<config>[^:@]+))?(:(?P<split>.+))?")
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")  # as JSON escapes it: a pair of them is one character
csv.field_size_limit(1 << 30)  # the module's own limit is 131072 characters a value

Source = str | Sequence[str]


@dataclass(frozen=True)
class Row:
    """One row: its columns, and where it is ("prompts.jsonl:12" or "prompts.parquet, row 12", from 1)."""

    values: dict[str, Any]
    source: str


def read_rows(given: Source) -> list[Row]:
    """All rows of a source or of several, in order.

    Raises ValueError, naming the file and the line, for whatever cannot be read; an empty file included.
    """
    rows: list[Row] = []
    for source in sources(given):
        before = len(rows)
        try:
            rows.extend(_rows(source))
        except (
            OSError,
            EOFError,
            zlib.error,
        ) as error:  # no right to read, cut short, not what its name says
            raise ValueError(
                f"{source}: this file cannot be read ({error}); check or write it again"
            ) from error
        if len(rows) == before:
            raise ValueError(f"{source}: the dataset is empty; give one with at least one row")
    return rows


def sources(given: Source) -> tuple[str, ...]:
    """Every single source: a list as it stands, what matches a pattern in order of name.

    Raises ValueError for a pattern that nothing matches.
    """
    return tuple(s for one in ([given] if isinstance(given, str) else given) for s in _matches(one))


def _matches(source: str) -> list[str]:
    path = os.path.expanduser(source)
    if not glob.has_magic(source) or os.path.exists(path) or HUB_NAME.fullmatch(source):
        return [source]
    if not (found := sorted(glob.glob(path, recursive=True))):
        raise ValueError(
            f"{source}: no file matches this pattern; check it (relative ones start at {Path.cwd()})"
        )
    return found


def named(given: Source) -> str:
    """One or several sources in a message: the first, and how many more there are."""
    first, *more = sources(given)
    return f"{first} and {len(more)} more" if more else first


@contextmanager
def at(place: str) -> Iterator[None]:
    """Names the row in a ValueError that does not know it."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error


def _rows(source: str) -> Iterator[Row]:
    path = Path(source).expanduser()
    if path.is_dir():
        return _directory(source, path, None)
    if path.name.endswith((".jsonl", ".jsonl.gz")):
        return _json_lines(source, _existing(source, path))
    if path.name.endswith((".csv", ".csv.gz")):
        return _csv(source, _existing(source, path))
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
                    values = parsed(line)
                except ValueError as error:  # not JSON, or not UTF-8
                    raise ValueError(
                        f"{place}: this line is not JSON ({error}); write one object a line, in UTF-8"
                    ) from error
                row = _row(values, place)
                yield _of_characters(row) if SURROGATE.search(line) else row


def _json_list(source: str, path: Path) -> Iterator[Row]:
    text = path.read_bytes()
    try:
        values = parsed(text)
    except ValueError as error:
        hint = "if it holds one object a line, name it .jsonl"
        raise ValueError(f"{source}: this file is not JSON ({error}); {hint}") from error
    if not isinstance(values, list):
        raise ValueError(f"{source}: expected a list of objects, found {_kind(values)}; write [{{...}}, ...]")
    rows = _numbered(source, values)
    return map(_of_characters, rows) if SURROGATE.search(text) else rows


def _of_characters(row: Row) -> Row:
    """The row, if all its text can be written."""
    for name, value in row.values.items():
        check_characters([name, value], f"{row.source}: the column {name!r}")
    return row


def _csv(source: str, path: Path) -> Iterator[Row]:
    how: dict[str, Any] = {"encoding": "utf-8-sig", "newline": ""}
    with gzip.open(path, "rt", **how) if path.suffix == ".gz" else path.open("rt", **how) as lines:
        reader = csv.reader(lines, strict=True)
        try:
            header = next(reader, [])
            if repeated := {name for name in header if header.count(name) > 1}:
                raise ValueError(f"{source}:1: two columns have the name {min(repeated)!r}; rename one")
            start = reader.line_num + 1
            for cells in reader:
                place, start = f"{source}:{start}", reader.line_num + 1
                if len(cells) not in (0, len(header)):
                    raise ValueError(
                        f"{place}: {len(cells)} values for the {len(header)} columns of the first line; "
                        "put values that hold a comma, a quote or a line break in double quotes"
                    )
                if cells:
                    yield Row({name: cell or None for name, cell in zip(header, cells, strict=True)}, place)
        except csv.Error as error:
            raise ValueError(f"{source}:{reader.line_num}: this line is not CSV ({error})") from error
        except UnicodeDecodeError as error:
            raise ValueError(f"{source}: this file is not UTF-8 ({error}); save it as UTF-8") from error


def _parquet(source: str, path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(path).to_pylist()
    except ValueError as error:  # Arrow's own, and text that is not UTF-8
        raise ValueError(f"{source}: this file is not Parquet ({error}); write it again") from error
    return _numbered(source, values)


def _directory(source: str, path: Path, split: str | None) -> Iterator[Row]:
    if not any((path / name).is_file() for name in ("dataset_dict.json", "state.json")):
        raise ValueError(
            f"{source}: this directory was not written by datasets.save_to_disk; give one of the files in it, "
            f"or a pattern such as {path}/*.jsonl"
        )
    import datasets

    try:
        saved = datasets.load_from_disk(str(path))
    except ValueError as error:  # not JSON, not Arrow, a kind of column that another version wrote
        raise ValueError(
            f"{source}: datasets cannot load this directory ({_line(error)}); save it again"
        ) from error
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
            f"({type(error).__name__}: {_line(error)}); check owner/name@config:split and the network"
        ) from error
    return _numbered(source, dataset)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _numbered(source: str, values: Iterable[Any]) -> Iterator[Row]:
    return (_row(value, f"{source}, row {number}") for number, value in enumerate(values, start=1))


def _row(values: Any, place: str) -> Row:
    if not isinstance(values, dict):
        raise ValueError(f'{place}: expected an object such as {{"prompt": "..."}}, found {_kind(values)}')
    return Row(values, place)


def _kind(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else "an object")
