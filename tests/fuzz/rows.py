"""Bad rows of data: good ones with a part replaced, in each kind of file, read and made into tokens."""

from __future__ import annotations

import copy
import csv
import datetime
import io
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet

from rlhf.data.chat import ChatFormat
from rlhf.data.demonstrations import load_demonstrations
from rlhf.data.json_text import deeper
from rlhf.data.preferences import load_preferences
from rlhf.data.prepare import RunData, check_lengths
from rlhf.data.prompts import load_prompts
from rlhf.data.rows import at
from rlhf.models.reach import Reach
from tests.fuzz.trial import Trial
from tests.tiny import config, tokenizer

USER, ANSWER = {"role": "user", "content": "what is tea ?"}, {"role": "assistant", "content": "tea is good ."}
OTHER = {"role": "assistant", "content": "no ."}
GOOD: dict[str, list[dict[str, Any]]] = {
    "prompts": [
        {"prompt": "what is tea ?", "r": 0.5},
        {"prompt": [USER], "r": 1},
        {"messages": [{"role": "system", "content": "yes"}, USER, ANSWER], "r": 2.0},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER], "r": 3},
    ],
    "preferences": [
        {"prompt": "what is tea ?", "chosen": "tea is good .", "rejected": "no ."},
        {"prompt": [USER], "chosen": [ANSWER], "rejected": [OTHER]},
        {"chosen": "\n\nHuman: what?\n\nAssistant: tea", "rejected": "\n\nHuman: what?\n\nAssistant: no"},
    ],
    "demonstrations": [
        {"prompt": "what is tea ?", "completion": "tea is good ."},
        {"prompt": [USER], "completion": [ANSWER]},
        {"messages": [USER, ANSWER]},
    ],
}
NESTED: Any = "x"
for _ in range(60):
    NESTED = {"x": NESTED}
PARTS: list[Any] = [
    None, True, False, 0, -1, 1.5, float("nan"), float("inf"), 10**400, "", " ", "\n\t", "x", "0", "nan", "x" * 10**6,
    "tea " * 2000, "a\x00b", "\x1b[31mred\x1b[0m", "\ud83d", "a\udcffb", "\u202eabc", "\ufeffx", "\n\nHuman:",
    "\n\nHuman: a\n\nAssistant:", "\n\nAssistant: a", "[", "[{", '[{"role": "user"}]', "[{'role': 1}]",
    '[{"role": "user", "content": "x"}, 1]', "<|assistant|>", "<eos>", "{{ 1/0 }}", [], [[]], [None], [1], ["x"],
    [[USER]], {}, USER, {"role": "user"}, {"content": "x"}, {"role": "robot", "content": "x"},
    {"role": None, "content": None}, {"role": ["user"], "content": "x"}, {"role": {}, "content": "x"},
    [ANSWER, USER], [USER, USER], [ANSWER], [ANSWER, ANSWER], [{"role": "system", "content": "x"}],
    [{"role": "user", "content": [{"type": "image", "url": "x"}]}], [{"role": "user", "content": [{"type": "text"}]}],
    [{"role": "user", "content": [{"type": "text", "text": ["x"]}]}], [{"role": "user", "content": ["x"]}],
    [USER, {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}],
    [USER, {"role": "assistant", "tool_calls": "x"}], [USER, {"role": "tool", "content": ""}], NESTED,
    "2020-01-01", datetime.date(2020, 1, 1), datetime.datetime(2020, 1, 1), b"\xff\x00", ["x", 1, None],
]  # fmt: skip
COLUMNS = ("image", "images", "tools", "label", "input", "messages", "prompt", "chosen", "completion", "")
KINDS = (".jsonl", ".json", ".csv", ".parquet")


def rows(number: int, seed: int, folder: Path) -> Iterator[Trial]:
    """So many trials, the same for a seed; each is a file of `folder` with a bad row among good ones."""
    draw = random.Random(seed)
    chat, reach = ChatFormat(tokenizer(), "policy"), Reach.of(config(26))
    for i in range(number):
        task = draw.choice(sorted(GOOD))
        kind = draw.choice((".jsonl", *KINDS))
        made = [copy.deepcopy(draw.choice(GOOD[task])) for _ in range(draw.randrange(5))]
        place = draw.randrange(len(made) + 1)
        made.insert(place, _mutated(draw, draw.choice(GOOD[task])))
        data, spoiled = _written(kind, made), draw.random() < 0.15
        if data is None:  # a kind of file that cannot hold it
            kind, data = ".jsonl", _written(".jsonl", made)
        assert data is not None
        named = _named(f"{i}{kind}", made, place, data)
        if spoiled:
            data, named = _spoiled(draw, data), f"{i}{kind}"
        path = folder / f"{i}{kind}"

        def run(path: Path = path, data: bytes = data, task: str = task) -> None:
            path.write_bytes(data)
            READ[task](path, chat, reach)
            path.unlink()

        yield Trial(f"row {i} ({task}{kind}, row {place + 1}): {made[place]!r:.300}", run, (named,))


def _named(file: str, made: list[Any], place: int, data: bytes) -> str:
    """How a refusal names a row."""
    if file.endswith(".jsonl"):
        return f"{file}:{place + 1}:"
    if not file.endswith(".csv"):
        return f"{file}, row {place + 1}:"
    try:
        data.decode()
    except UnicodeDecodeError:
        return file
    return f"{file}:{_csv(made[:place], _columns(made)).count(chr(10)) + 1}:"


def _prompts(path: Path, chat: ChatFormat, reach: Reach) -> None:
    found = load_prompts(str(path))
    lengths = []
    for prompt in found:
        with at(prompt.source):
            lengths.append(len(chat.prompt_tokens(prompt.content)))
    check_lengths(found, lengths, 8, reach)
    if any("r" in p.meta for p in found):
        RunData(found, [], None, {}, {}).column("r")


def _preferences(path: Path, chat: ChatFormat, reach: Reach) -> None:
    for pair in load_preferences(str(path)):
        for response in (pair.chosen, pair.rejected):
            with at(pair.source):
                chat.conversation_tokens(pair.prompt, response)


def _demonstrations(path: Path, chat: ChatFormat, reach: Reach) -> None:
    for shown in load_demonstrations(str(path)):
        with at(shown.source):
            chat.conversation_tokens(shown.prompt, shown.response)


READ: dict[str, Callable[[Path, ChatFormat, Reach], None]] = {
    "prompts": _prompts,
    "preferences": _preferences,
    "demonstrations": _demonstrations,
}


def _mutated(draw: random.Random, row: dict[str, Any]) -> Any:
    """A row with one to three parts, at any depth, replaced, removed or added; or no row at all."""
    if draw.random() < 0.03:
        return copy.deepcopy(draw.choice(PARTS))
    row = copy.deepcopy(row)
    for _ in range(draw.choice((1, 1, 2, 3))):
        places: list[tuple[Any, Any]] = []
        _places(row, places)
        if not places or draw.random() < 0.15:
            row[draw.choice(COLUMNS)] = copy.deepcopy(draw.choice(PARTS))
            continue
        holder, name = draw.choice(places)
        if draw.random() < 0.15:
            del holder[name]
        else:
            holder[name] = copy.deepcopy(draw.choice(PARTS))
    return row


def _places(value: Any, found: list[tuple[Any, Any]]) -> None:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, part in inner:
        found.append((value, name))
        _places(part, found)


def _written(kind: str, made: list[Any]) -> bytes | None:
    """The rows as a file of that kind; None: it cannot hold them."""
    if kind == ".jsonl":
        return b"".join(_json(row) + b"\n" for row in made)
    if kind == ".json":
        return b"[" + b",".join(map(_json, made)) + b"]"
    if not all(isinstance(row, dict) for row in made) or deeper(made, 20):  # Arrow's writer ends the process
        return None
    names = _columns(made)
    if kind == ".csv":
        return _csv(made, names).encode("utf-8", "surrogatepass")
    buffer, whole = io.BytesIO(), [{name: row.get(name) for name in names} for row in made]
    try:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(whole), buffer)
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError):
        return None
    return buffer.getvalue()


def _columns(made: list[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in made for name in row))


def _csv(made: list[dict[str, Any]], names: list[str]) -> str:
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(names)
    for row in made:
        cells = [row.get(name) for name in names]
        writer.writerow([c if isinstance(c, str) else "" if c is None else _json(c).decode() for c in cells])
    return text.getvalue()


def _json(row: Any) -> bytes:
    return json.dumps(row, default=str).encode()


def _spoiled(draw: random.Random, data: bytes) -> bytes:
    """The file's bytes cut short, with other bytes in between, or marks of other systems."""
    at = draw.randrange(len(data) + 1)
    return draw.choice([
        data[:at], data[:at] + b"\xff\xfe" + data[at:], data[:at] + b"\x00" + data[at:], b"\xef\xbb\xbf" + data,
        data.replace(b"\n", b"\r\n"), b"", b"\n\n", draw.randbytes(200), data.decode("latin-1").encode("utf-16"),
        data + data, data + b"]", b"[" * 100_000, data[:at] + b'"' + data[at:],
    ])  # fmt: skip
