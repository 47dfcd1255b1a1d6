"""Loading users' own data: exact prompts, demonstrations and preferences, and errors that name the line."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys

import pytest

from rlhf.data.demonstrations import Demonstration, load_demonstrations
from rlhf.data.messages import parse_transcript
from rlhf.data.preferences import Preference, load_preferences
from rlhf.data.prompts import load_prompts
from rlhf.data.rows import Row, read_rows
from rlhf.types import Prompt


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be kind."}
TALK = [SYSTEM, user("Hi"), assistant("Hello."), user("How are you?")]
ROWS = [{"prompt": "a", "topic": "x"}, {"prompt": "b", "topic": None}]


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(*rows, name="data.jsonl"):
    with open(name, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return name


def refuses(load, source, message):
    """`load(source)` raises a ValueError whose text begins with `message`."""
    with pytest.raises(ValueError, match="^" + re.escape(message)) as error:
        load(source)
    return str(error.value)


# Sources


def test_jsonl_lines_are_counted_from_one_with_the_blank_ones(tmp_path):
    (tmp_path / "p.jsonl").write_bytes('{"prompt": "a\u2028é"}\n\n{"prompt": "b"}'.encode())
    expected = [("p.jsonl:1", {"prompt": "a\u2028é"}), ("p.jsonl:3", {"prompt": "b"})]
    assert [(r.source, r.values) for r in read_rows("p.jsonl")] == expected
    (tmp_path / "p.jsonl.gz").write_bytes(gzip.compress((tmp_path / "p.jsonl").read_bytes()))
    assert read_rows("p.jsonl.gz")[1] == Row({"prompt": "b"}, "p.jsonl.gz:3")
    assert read_rows(str(tmp_path / "p.jsonl"))[0].source == f"{tmp_path}/p.jsonl:1"


def numbered(name):
    return [Row(values, f"{name}, row {i}") for i, values in enumerate(ROWS, 1)]


def test_json_list(tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(ROWS))
    assert read_rows("p.json") == numbered("p.json")


def test_parquet_and_saved_directories_round_trip():
    import datasets

    rows = [{**row, "messages": TALK} for row in ROWS]
    dataset = datasets.Dataset.from_list(rows)
    dataset.to_parquet("p.parquet")
    dataset.save_to_disk("saved")
    datasets.DatasetDict(train=dataset, test=dataset.select([1])).save_to_disk("splits")
    for name in ("p.parquet", "saved", "splits", "splits:train"):
        assert read_rows(name) == [Row(values, f"{name}, row {i}") for i, values in enumerate(rows, 1)]
    assert read_rows("splits:test") == [Row(rows[1], "splits:test, row 1")]
    refuses(
        read_rows,
        "splits:dev",
        "splits:dev: no split 'dev' in this directory; give one of splits:train, splits:test",
    )
    refuses(read_rows, "saved:test", "saved:test: this directory holds a single dataset; leave out ':test'")


@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("owner/some.name-1", ("owner/some.name-1", None, "train")),
        ("owner/name:test", ("owner/name", None, "test")),
        ("owner/name:train[:100]", ("owner/name", None, "train[:100]")),
        ("owner/name@main-config", ("owner/name", "main-config", "train")),
        ("owner/name@main-config:test", ("owner/name", "main-config", "test")),
    ],
)
def test_hub_names(monkeypatch, source, arguments):
    import datasets

    calls = []

    def load_dataset(name, config, split):
        calls.append((name, config, split))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_rows(source) == numbered(source)
    assert calls == [arguments]


def test_a_hub_name_that_cannot_be_loaded(monkeypatch):
    import datasets

    cause = ConnectionError("no route")

    def load_dataset(*_, **__):
        raise cause

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refuses(
        read_rows, "owner/name:test", "owner/name:test: no such file or directory, and loading it as a hub"
    )
    assert "(ConnectionError: no route); check owner/name@config:split" in message
    with pytest.raises(ValueError, match="owner/name") as error:
        read_rows("owner/name")
    assert error.value.__cause__ is cause


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.jsonl", '{"prompt": "a"}\n{"prompt": \n', "p.jsonl:2: this line is not JSON (Expecting value"),
        ("p.jsonl", '\n["a"]\n', 'p.jsonl:2: expected an object such as {"prompt": "..."}, found a list'),
        ("p.jsonl", '"a"', 'p.jsonl:1: expected an object such as {"prompt": "..."}, found a string'),
        ("p.jsonl", "null", 'p.jsonl:1: expected an object such as {"prompt": "..."}, found null'),
        ("p.jsonl", "\n", "p.jsonl: the dataset is empty"),
        ("p.json", "[]", "p.json: the dataset is empty"),
        ("p.json", '{"prompt": "a"}', "p.json: expected a list of objects, found an object"),
        ("p.json", '{"a": 1}\n{"a": 2}', "p.json: this file is not JSON (Extra data: line 2"),
        (
            "p.json",
            '[{"prompt": "a"}, 3]',
            'p.json, row 2: expected an object such as {"prompt": "..."}, found a number',
        ),
        ("p.parquet", "text", "p.parquet: this file is not Parquet ("),
        ("p.arrow", "a,b", "p.arrow: unknown extension '.arrow'; accepted: .jsonl,"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    refuses(read_rows, name, message)


def test_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "\xff"}\n')
    refuses(read_rows, "p.jsonl", "p.jsonl:2: this line is not JSON ('utf-8' codec")


@pytest.mark.parametrize("name", ["p.jsonl", "p.jsonl.gz", "p.json", "p.parquet", "some/where/p.jsonl"])
def test_missing_files(tmp_path, name):
    refuses(read_rows, name, f"{name}: no such file; check the path (relative ones start at {tmp_path})")


@pytest.mark.parametrize("name", ["nothing", "/no/where", "a/b/c", "./x"])
def test_missing_paths_are_not_looked_for_on_the_hub(name):
    refuses(read_rows, name, f"{name}: no such file or directory; accepted: .jsonl,")


def test_a_directory_of_something_else(tmp_path):
    (tmp_path / "folder").mkdir()
    refuses(
        read_rows,
        "folder",
        "folder: this directory was not written by datasets.save_to_disk; give one of the",
    )


# Prompts


@pytest.mark.parametrize(
    ("row", "content"),
    [
        ({"prompt": " Say: "}, " Say: "),
        ({"prompt": TALK}, TALK),
        ({"prompt": [{**user("Hi"), "name": None}]}, [user("Hi")]),
        ({"messages": TALK}, TALK),
        ({"messages": [*TALK, assistant("Well.")]}, TALK),
        ({"prompt": None, "messages": TALK}, TALK),
        ({"prompt": "Hi", "completion": [assistant("Hello.")]}, [user("Hi")]),
        # implicit, conversational
        ({"chosen": [*TALK, assistant("Well.")], "rejected": [*TALK, assistant("Bad.")]}, TALK),
        ({"chosen": [*TALK, assistant("Well.")], "rejected": [*TALK, assistant("Well.")]}, TALK),
        (
            {"chosen": [*TALK, assistant("Well.")], "rejected": [user("Hi"), assistant("Bad.")]}
            | {"rejected": [SYSTEM, user("Hi"), assistant("Hm."), user("How are you?"), assistant("Bad.")]},
            [SYSTEM, user("Hi")],
        ),
        # implicit, text: whole words, and the space goes with the response
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is"),
        ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "The sky is"),
        ({"chosen": "It costs 10", "rejected": "It costs 12"}, "It costs"),
        ({"chosen": "The sky is", "rejected": "The sky is blue"}, "The sky"),
        ({"chosen": "Q: yes?\nA:\nyes", "rejected": "Q: yes?\nA:\nyet"}, "Q: yes?\nA:\n"),
        ({"chosen": "天空是蓝色", "rejected": "天空是黑色"}, "天空是"),
        # hh-rlhf
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.", "rejected": "\n\nHuman: Hi\n\nAssistant: No."},
            [user("Hi")],
        ),
        ({"prompt": "\n\nHuman: Hi\nyou\n\nAssistant:"}, [user("Hi\nyou")]),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant: Hello."}, [user("Hi")]),
        (
            {"prompt": "\n\nHuman: Hi\n\nAssistant: A\n\nHuman: B\n\nAssistant:"},
            [user("Hi"), assistant("A"), user("B")],
        ),
    ],
)
def test_prompt_formats(row, content):
    (prompt,) = load_prompts(write(row))
    assert (prompt.content, prompt.source) == (content, "data.jsonl:1")


def test_meta_is_the_other_columns():
    write({"prompt": "a", "topic": "x", "completion": "c"}, {"messages": [user("b")], "n": 2})
    assert load_prompts("data.jsonl") == [
        Prompt("a", {"topic": "x", "completion": "c"}, "data.jsonl:1"),
        Prompt([user("b")], {"n": 2}, "data.jsonl:2"),
    ]


def test_duplicates_are_dropped_and_counted(caplog):
    write(
        {"prompt": "a", "n": 1},
        {"prompt": "b"},
        {"prompt": "a", "n": 2},
        {"prompt": [user("a")]},
        {"prompt": "a"},
    )
    kept = load_prompts("data.jsonl")
    assert [(p.content, p.source) for p in kept] == [
        ("a", "data.jsonl:1"),
        ("b", "data.jsonl:2"),
        ([user("a")], "data.jsonl:4"),
    ]
    assert kept[0].meta == {"n": 1}
    assert [(r.name, r.levelname, r.getMessage()) for r in caplog.records] == [
        (
            "rlhf.data.prompts",
            "WARNING",
            "data.jsonl: dropped 2 of 5 rows: duplicate prompts (the first of each is kept); "
            "3 prompts remain",
        )
    ]
    caplog.clear()
    load_prompts(write({"prompt": "a"}, {"prompt": "b"}))
    assert not caplog.records


NO_PROMPT = "no prompt: expected 'prompt', 'messages', or both 'chosen' and 'rejected'; found the keys "


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"text": "a", "n": 1},
            NO_PROMPT + "'text', 'n'",
        ),
        (
            {"prompt": None, "chosen": "a"},
            NO_PROMPT + "'chosen'",
        ),
        (
            {},
            NO_PROMPT + "none",
        ),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": " \n"}, "the prompt is empty"),
        ({"prompt": [user(" ")]}, "the prompt is empty"),
        ({"messages": [assistant("a")]}, "the prompt is empty"),
        ({"prompt": "\n\nHuman:\n\nAssistant:"}, "the prompt is empty"),
        ({"prompt": 3}, "'prompt' must be text or a list of messages, not 3"),
        ({"prompt": []}, "'prompt' must be messages such as"),
        ({"messages": "a"}, "'messages' must be messages such as"),
        (
            {"messages": [user("a"), assistant("b"), assistant("c")]},
            "the last message of a prompt must be the user's, not the assistant's",
        ),
        (
            {"messages": [user("a"), SYSTEM]},
            "the last message of a prompt must be the user's, not the system's",
        ),
        ({"prompt": ["a"]}, "'prompt', message 1 must have 'role' and 'content'; found 'a'"),
        (
            {"prompt": [user("a"), {"role": "user", "text": "b"}]},
            "'prompt', message 2 must have 'role' and 'content'; found the keys 'role',",
        ),
        (
            {"prompt": [{"role": "human", "content": "b"}]},
            "'prompt', message 1: the role must be 'system', 'developer', 'user', 'assistant' or 'tool', not 'human'",
        ),
        (
            {"prompt": [{"role": "user", "content": None}]},
            "'prompt', message 1: the content must be text, not None",
        ),
        ({"chosen": "Yes", "rejected": "Yesterday"}, "the beginning that both share is empty"),
        ({"chosen": "", "rejected": "No"}, "the beginning that both share is empty"),
        (
            {"chosen": [user("a")], "rejected": "a"},
            "'chosen' and 'rejected' must both be text or both be messages",
        ),
        (
            {"chosen": [user("a")], "rejected": [user("b")]},
            "no prompt: 'chosen' and 'rejected' share no turn of the user",
        ),
    ],
)
def test_rows_without_a_usable_prompt(row, message):
    refuses(load_prompts, write({"prompt": "fine"}, row), f"data.jsonl:2: {message}")


def test_errors_name_rows_of_parquet():
    import datasets

    datasets.Dataset.from_list([{"prompt": "a"}, {"prompt": ""}]).to_parquet("p.parquet")
    refuses(load_prompts, "p.parquet", "p.parquet, row 2: the prompt is empty")


def test_transcripts_keep_everything_but_the_space_around_a_turn():
    text = "\n\nHuman: One\n\ntwo: Human: \n\nAssistant:  Yes.\n\nHuman: x\n\nHuman: y"
    assert parse_transcript(text) == [user("One\n\ntwo: Human:"), assistant("Yes."), user("x"), user("y")]


# Demonstrations


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"prompt": "a ", "completion": " b "}, "a ", " b "),
        ({"prompt": TALK, "completion": [assistant("Well. ")]}, TALK, "Well. "),
        ({"prompt": TALK, "completion": [*TALK, assistant("Well.")]}, TALK, "Well."),
        ({"prompt": TALK, "completion": "Well."}, TALK, "Well."),
        ({"prompt": "Hi", "completion": [assistant("Well.")]}, [user("Hi")], "Well."),
        ({"messages": [*TALK, assistant("Well.")]}, TALK, "Well."),
        ({"prompt": "Hi", "messages": [user("Hi"), assistant("Well.")]}, [user("Hi")], "Well."),
        ({"prompt": "\n\nHuman: Hi\n\nAssistant:", "completion": " Well."}, [user("Hi")], "Well."),
    ],
)
def test_demonstration_formats(row, prompt, response):
    assert load_demonstrations(write(row)) == [Demonstration(prompt, response, "data.jsonl:1")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"prompt": "a"},
            "no demonstration: expected both 'prompt' and 'completion', or 'messages'; found the keys",
        ),
        ({"messages": TALK}, "a demonstration must end with the assistant's message, not the user's"),
        (
            {"messages": [SYSTEM, assistant("a")]},
            "the last message of a prompt must be the user's, not the system's",
        ),
        ({"messages": [assistant("a")]}, "the prompt is empty"),
        ({"prompt": "a", "completion": " "}, "the response is empty"),
        ({"messages": [user("a"), assistant("")]}, "the response is empty"),
        (
            {"prompt": TALK, "completion": [user("b")]},
            "'completion' must end with the assistant's message, not the user's",
        ),
        (
            {"prompt": TALK, "completion": [user("b"), assistant("c")]},
            "'completion' must be what the assistant says after the prompt's last message",
        ),
        ({"prompt": "a", "completion": 3}, "'completion' must be messages such as"),
        (
            {"prompt": "\n\nHuman: Hi\n\nAssistant: a", "completion": "b"},
            "the last message of a prompt must be the user's",
        ),
    ],
)
def test_rows_without_a_demonstration(row, message):
    good = {"prompt": "fine", "completion": "too"}
    refuses(load_demonstrations, write(good, row), f"data.jsonl:2: {message}")


# Preferences

HH_PROMPT = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: How are you?\n\nAssistant:"
HH_TALK = TALK[1:]


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "The sky", "chosen": " is blue", "rejected": " is"}, "The sky", " is blue", " is"),
        ({"prompt": TALK, "chosen": [assistant("A")], "rejected": [assistant("")]}, TALK, "A", ""),
        (
            {
                "prompt": "Hi",
                "chosen": [user("Hi"), assistant("A")],
                "rejected": [user("Hi"), assistant("B")],
            },
            [user("Hi")],
            "A",
            "B",
        ),
        ({"chosen": "The sky is blue.", "rejected": "The sky is black."}, "The sky is", " blue.", " black."),
        ({"chosen": "The sky is", "rejected": "The sky is blue"}, "The sky", " is", " is blue"),
        ({"chosen": [*TALK, assistant("A")], "rejected": [*TALK, assistant("B")]}, TALK, "A", "B"),
        ({"chosen": HH_PROMPT + " A\n\nB", "rejected": HH_PROMPT + " C \n"}, HH_TALK, "A\n\nB", "C"),
        ({"chosen": HH_PROMPT + " A", "rejected": HH_PROMPT + " "}, HH_TALK, "A", ""),
        ({"prompt": HH_PROMPT, "chosen": " A", "rejected": " B"}, HH_TALK, "A", "B"),
        ({"prompt": HH_PROMPT, "chosen": HH_PROMPT + " A", "rejected": HH_PROMPT + " B"}, HH_TALK, "A", "B"),
        # conversations that part before the last turn
        (
            {"chosen": HH_PROMPT + " A", "rejected": "\n\nHuman: Hi\n\nAssistant: B"},
            [user("Hi")],
            [assistant("Hello."), user("How are you?"), assistant("A")],
            "B",
        ),
        (
            {
                "chosen": [*TALK, assistant("A")],
                "rejected": [*TALK[:2], assistant("Hm."), user("?"), assistant("B")],
            },
            TALK[:2],
            [assistant("Hello."), user("How are you?"), assistant("A")],
            [assistant("Hm."), user("?"), assistant("B")],
        ),
        (  # the assistant is not asked between the shared turn of the user and the next
            {
                "chosen": [user("a"), assistant("b"), user("c"), user("d"), assistant("A")],
                "rejected": [user("a"), assistant("b"), user("c"), user("e"), assistant("B")],
            },
            [user("a")],
            [assistant("b"), user("c"), user("d"), assistant("A")],
            [assistant("b"), user("c"), user("e"), assistant("B")],
        ),
        (
            {"prompt": "Hi", "chosen": [assistant("A"), user("b"), assistant("C")], "rejected": "B"},
            [user("Hi")],
            [assistant("A"), user("b"), assistant("C")],
            "B",
        ),
    ],
)
def test_preference_formats(row, prompt, chosen, rejected):
    assert load_preferences(write(row)) == [Preference(prompt, chosen, rejected, "data.jsonl:1")]


SAME = "'chosen' and 'rejected' are the same response; leave the row out"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, SAME),
        ({"chosen": "a b", "rejected": "a b"}, SAME),
        ({"chosen": [*TALK, assistant("A")], "rejected": [*TALK, assistant("A")]}, SAME),
        ({"chosen": HH_PROMPT + " A", "rejected": HH_PROMPT + " A "}, SAME),
        (
            {"prompt": "a", "chosen": "b"},
            "no preference: expected 'chosen' and 'rejected' (and 'prompt', unless both begin with it); "
            "found the keys 'prompt', 'chosen'",
        ),
        (
            {"chosen": TALK, "rejected": [*TALK, assistant("B")]},
            "'chosen' must end with the assistant's message, not the user's",
        ),
        (
            {"prompt": "Hi", "chosen": [user("Ho"), assistant("A")], "rejected": "B"},
            "'chosen' must be what the assistant says after the prompt's last message",
        ),
        (
            {"prompt": TALK, "chosen": [{"role": "assistant"}], "rejected": "B"},
            "'chosen', message 1 must have 'role' and 'content'; found the keys 'role'",
        ),
        ({"prompt": "", "chosen": "a", "rejected": "b"}, "the prompt is empty"),
        ({"chosen": "red", "rejected": "blue"}, "the beginning that both share is empty"),
    ],
)
def test_rows_without_a_preference(row, message):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    refuses(load_preferences, write(good, row), f"data.jsonl:2: {message}")


def test_a_tolerated_share_of_bad_rows_is_counted(caplog):
    good, same = ({"prompt": "p", "chosen": "a", "rejected": r} for r in "ba")
    write(good, same, good, {"prompt": "p"}, good)
    kept = load_preferences("data.jsonl", tolerated_share=0.4)
    assert [p.source for p in kept] == ["data.jsonl:1", "data.jsonl:3", "data.jsonl:5"]
    assert [r.getMessage() for r in caplog.records] == [
        f"data.jsonl: left out 2 of 5 rows, the first: data.jsonl:2: {SAME}"
    ]
    with pytest.raises(ValueError, match=r"^data\.jsonl:4: no preference"):
        load_preferences("data.jsonl", tolerated_share=0.39)


@pytest.mark.parametrize("load", [load_prompts, load_demonstrations, load_preferences])
def test_conversations_round_trip_through_every_store(tmp_path, load):
    import datasets

    write(
        {
            "prompt": TALK,
            "chosen": [assistant("A")],
            "rejected": [assistant("B")],
            "completion": [assistant("A")],
        },
        {
            "prompt": [user("x")],
            "chosen": [assistant("C")],
            "rejected": [assistant("D")],
            "completion": [assistant("C")],
        },
    )
    dataset = datasets.Dataset.from_list([row.values for row in read_rows("data.jsonl")])
    dataset.to_parquet("data.parquet")
    dataset.save_to_disk("saved")
    (tmp_path / "data.json").write_text(json.dumps([row.values for row in read_rows("data.jsonl")]))

    def plain(source):
        return [{**vars(item), "source": None} for item in load(source)]

    expected = plain("data.jsonl")
    assert len(expected) == 2
    for source in ("data.json", "data.parquet", "saved"):
        assert plain(source) == expected
        assert load(source)[1].source == f"{source}, row 2"


def test_modules_import_without_the_heavy_libraries():
    modules = ("chat", "demonstrations", "messages", "preferences", "prompts", "responses", "rows")
    code = "import sys\n" + "\n".join(f"import rlhf.data.{m}" for m in modules)
    heavy = {"torch", "transformers", "datasets", "pyarrow", "jinja2"}
    code += f"\nsys.exit(' '.join({heavy} & set(sys.modules)) or None)"
    root = __file__.rsplit("/tests/", 1)[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
