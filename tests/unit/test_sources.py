"""Several files for one key, CSV, and files that cannot be read: every row, or one line that names the file."""

from __future__ import annotations

import gzip
import json
import os
import re

import pytest

from rlhf.data.prepare import RunData
from rlhf.data.prompts import load_prompts
from rlhf.data.rows import Row, read_rows
from rlhf.store import source_fingerprint


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def put(name: str, text: str | bytes) -> str:
    os.makedirs(os.path.dirname(name) or ".", exist_ok=True)
    with open(name, "wb") as file:
        file.write(text if isinstance(text, bytes) else text.encode())
    return name


def prompts(*texts: str) -> str:
    return "".join(json.dumps({"prompt": text}) + "\n" for text in texts)


def refuses(source, message):
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        read_rows(source)
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)


# Several files


def test_a_list_keeps_its_order_and_a_pattern_is_sorted():
    import datasets

    put("shards/2.jsonl", prompts("c")), put("shards/10.jsonl", prompts("a", "b"))
    put("other/deep/x.csv", "prompt\nd\n")
    datasets.Dataset.from_list([{"prompt": "e"}]).to_parquet("e.parquet")
    found = read_rows(["e.parquet", "shards/*.jsonl", "other/**/*.csv"])
    assert [(row.source, row.values["prompt"]) for row in found] == [
        ("e.parquet, row 1", "e"),
        ("shards/10.jsonl:1", "a"),
        ("shards/10.jsonl:2", "b"),
        ("shards/2.jsonl:1", "c"),
        ("other/deep/x.csv:2", "d"),
    ]


def test_a_file_that_is_named_like_a_pattern_is_that_file():
    put("a[1].jsonl", prompts("it")), put("a1.jsonl", prompts("other"))
    assert [row.source for row in read_rows("a[1].jsonl")] == ["a[1].jsonl:1"]
    assert [row.source for row in read_rows("a[0-9].jsonl")] == ["a1.jsonl:1"]


def test_nothing_matches_or_one_of_several_is_bad(tmp_path):
    put("a.jsonl", prompts("a")), put("b.jsonl", "")
    refuses(
        "c*.jsonl", f"c*.jsonl: no file matches this pattern; check it (relative ones start at {tmp_path})"
    )
    refuses(["a.jsonl", "c*.jsonl"], "c*.jsonl: no file matches")
    refuses("*.jsonl", "b.jsonl: the dataset is empty")
    refuses(["a.jsonl", "c.jsonl"], "c.jsonl: no such file")


def test_duplicates_over_files_are_counted_once(caplog):
    put("a.jsonl", prompts("a", "b")), put("b.jsonl", prompts("b", "c"))
    assert [p.content for p in load_prompts("*.jsonl")] == ["a", "b", "c"]
    assert [r.getMessage()[:48] for r in caplog.records] == [
        "a.jsonl and 1 more: dropped 1 of 4 rows: duplica"
    ]


def test_the_fingerprint_of_several_files_is_of_all():
    given = [put("a.jsonl", prompts("a")), put("b.jsonl", prompts("b"))]
    before = source_fingerprint(given)
    assert before == source_fingerprint(tuple(given)) != source_fingerprint(given[::-1])
    assert before != source_fingerprint(given[:1])
    put("b.jsonl", prompts("c"))
    assert before != source_fingerprint(given)


# CSV


def test_csv_is_text_by_the_names_of_its_first_line():
    text = '\ufeffprompt,topic,n\r\n"a, ""b""\r\nc",x,1.5\r\n\r\né,,2\r\n'
    rows = [
        Row({"prompt": 'a, "b"\r\nc', "topic": "x", "n": "1.5"}, "p.csv:2"),
        Row({"prompt": "é", "topic": None, "n": "2"}, "p.csv:5"),
    ]
    assert read_rows(put("p.csv", text)) == rows
    put("p.csv.gz", gzip.compress(text.encode()))
    assert [row.values for row in read_rows("p.csv.gz")] == [row.values for row in rows]


def test_csv_holds_conversations_as_json_and_long_values():
    talk = [{"role": "user", "content": 'Say "a",\nplease'}]
    pair = [json.dumps([*talk, {"role": "assistant", "content": c}]).replace('"', '""') for c in "xy"]
    put("p.csv", f'chosen,rejected\n"{pair[0]}","{pair[1]}"\n')
    assert [p.content for p in load_prompts("p.csv")] == [talk]
    assert len(read_rows(put("long.csv", "prompt\n" + "a" * 300_000))[0].values["prompt"]) == 300_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,n\na,1\na, b,2\n", "p.csv:3: 3 values for the 2 columns of the first line; put values"),
        ("prompt,n\na\n", "p.csv:2: 1 values for the 2 columns"),
        ('prompt\n"a\n', "p.csv:2: this line is not CSV (unexpected end of data)"),
        ("prompt,prompt\na,b\n", "p.csv:1: two columns have the name 'prompt'"),
        ("prompt\n", "p.csv: the dataset is empty"),
        ("", "p.csv: the dataset is empty"),
        ("prompt\nf\xe9\n".encode("latin-1"), "p.csv: this file is not UTF-8 ("),
    ],
)
def test_csv_that_is_malformed(text, message):
    refuses(put("p.csv", text), message)


def test_a_column_of_numbers_may_be_text():
    put("p.csv", "prompt,r\na,1.5\nb,-2\n")
    data = RunData(load_prompts("p.csv"), [], None, {}, {})
    assert [value for _, value in data.column("r")] == [1.5, -2.0]


@pytest.mark.parametrize("value", ['"high"', '""', "true", "null", "NaN", "1e39", "1" + "0" * 400, "[1]"])
def test_what_float32_cannot_hold_is_no_number(value):
    put("p.jsonl", f'{{"prompt": "a", "r": {value}}}')
    with pytest.raises(ValueError, match=r"^p.jsonl:1: the column 'r' holds .*, not a finite number"):
        RunData(load_prompts("p.jsonl"), [], None, {}, {}).column("r")


# What cannot be read


def test_files_that_are_damaged_or_not_what_their_name_says():
    import datasets

    packed = gzip.compress(prompts(*map(str, range(1000))).encode())
    refuses(
        put("plain.jsonl.gz", prompts("a")), "plain.jsonl.gz: this file cannot be read (Not a gzipped file"
    )
    refuses(
        put("cut.jsonl.gz", packed[:100]), "cut.jsonl.gz: this file cannot be read (Compressed file ended"
    )
    refuses(put("cut.csv.gz", packed[:100]), "cut.csv.gz: this file cannot be read (Compressed file ended")
    datasets.Dataset.from_list([{"prompt": "a" * 1000 + str(i)} for i in range(1000)]).to_parquet("p.parquet")
    with open("p.parquet", "r+b") as file:
        file.seek(100)
        file.write(bytes(200))
    refuses("p.parquet", "p.parquet: this file cannot be read (")
    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk("saved")
    os.remove("saved/data-00000-of-00001.arrow")
    refuses("saved", "saved: this file cannot be read (")


def test_a_saved_dataset_of_another_version():
    import datasets

    datasets.Dataset.from_list([{"prompt": "a"}]).save_to_disk("saved")
    with open("saved/dataset_info.json") as file:
        text = file.read()
    put("saved/dataset_info.json", text.replace('"Value"', '"NewKind"'))
    refuses("saved", "saved: datasets cannot load this directory (Feature type 'NewKind' not found")


def test_parquet_text_that_is_not_utf8():
    import pyarrow
    import pyarrow.parquet

    offsets, text = pyarrow.array([0, 2], pyarrow.int32()).buffers()[1], pyarrow.py_buffer(b"\xff\xfe")
    column = pyarrow.Array.from_buffers(pyarrow.string(), 1, [None, offsets, text])
    pyarrow.parquet.write_table(pyarrow.table({"prompt": column}), "p.parquet")
    refuses("p.parquet", "p.parquet: this file is not Parquet ('utf-8' codec can't decode byte 0xff")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "p.jsonl",
            b'{"prompt": "ok"}\n{"prompt": "cut \\uD83D"}',
            r"p.jsonl:2: the column 'prompt' holds '\ud83d'",
        ),
        ("p.jsonl", b'{"a": "a", "chosen": "\\ude00"}', r"p.jsonl:1: the column 'chosen' holds '\ude00'"),
        (
            "p.jsonl",
            b'{"prompt": [{"role": "user", "content": "\\ud83d"}]}',
            r"p.jsonl:1: the column 'prompt' holds",
        ),
        (
            "p.json",
            b'[{"prompt": "a", "m": {"x": ["\\ud83d!"]}}]',
            r"p.json, row 1: the column 'm' holds '\ud83d'",
        ),
        ("p.json", b'[{"prompt": "a", "\\ud83d": 1}]', r"p.json, row 1: the column '\ud83d' holds '\ud83d'"),
    ],
)
def test_half_a_surrogate_pair_is_refused_by_row(name, text, message):
    refuses(put(name, text), message)


def test_half_a_surrogate_pair_is_refused_in_messages_that_a_cell_spells():
    spelled = '[{""role"": ""user"", ""content"": ""cut \\ud83d""}]'
    with pytest.raises(ValueError, match=r"p.csv:3: 'prompt' holds '.ud83d', half of a surrogate pair"):
        load_prompts(put("p.csv", f'prompt\nok\n"{spelled}"\n'))


def test_a_whole_surrogate_pair_and_spelled_escapes_are_text():
    put("p.jsonl", b'{"prompt": "\\ud83d\\ude00 \\\\ud83d"}')
    assert read_rows("p.jsonl")[0].values == {"prompt": "😀 \\ud83d"}
