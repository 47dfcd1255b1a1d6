"""What is given runs no code, and what is shown tells no secret and commands no terminal."""

import io
import json
import logging
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from rlhf.data.prompts import load_prompts
from rlhf.models.load import load_policy, load_tokenizer
from rlhf.progress import View
from rlhf.shown import Formatter, redacted
from rlhf.utility.snapshots import read
from tests.tiny import save_policy

TOKEN = "hf_" + "aB3dE6gH9k" * 3
SECRETS = {
    f"policy.path={TOKEN}": TOKEN,
    "path: https://me:pass-word@host/model": "pass-word",
    "HF_TOKEN=abcdef": "abcdef",
    "AWS_SECRET_ACCESS_KEY=ab/cd+ef": "ab/cd+ef",
    "OPENAI_API_KEY=short": "short",
    '"password": "two words"': "two words",
    "  api_key: abc-def": "abc-def",
    "Authorization token: abc": "abc",
}


class Touch:
    """Pickled, it writes a file where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return Path.touch, (self.mark,)


@pytest.fixture
def mark(tmp_path):
    """A file that is there once foreign code has run."""
    found = tmp_path / "ran"
    pickle.loads(pickle.dumps(Touch(found)))
    assert found.exists()  # the attack works where pickles are loaded
    found.unlink()
    yield found
    assert not found.exists()


def test_pickled_weights_are_not_run(tmp_path, mark):
    folder = save_policy(tmp_path / "policy")
    (folder / "model.safetensors").unlink()
    torch.save({"lm_head.weight": Touch(mark)}, folder / "pytorch_model.bin")
    with pytest.raises(
        ValueError, match=r"policy.path=.*more than tensors, which is not run; save .* safetensors"
    ):
        load_policy(str(folder))


def test_code_of_a_tokenizer_is_not_run(tmp_path, mark):
    folder = save_policy(tmp_path / "policy")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": ["evil.T", None]}, "tokenizer_class": "T"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "evil.py").write_text(f"open({str(mark)!r}, 'w')\nclass T: pass\n")
    with pytest.raises(ValueError, match=r"policy.path=.*code of its own, which is not run unasked"):
        load_tokenizer(str(folder), "policy.path")


def test_pickled_statistics_are_not_run(tmp_path, mark):
    file = tmp_path / "known.npz"
    objects = np.array([Touch(mark), None], dtype=object)
    np.savez(file, format=objects)
    whole = file.read_bytes()
    array = io.BytesIO()
    np.save(array, np.zeros(3))
    for content in (whole, pickle.dumps(Touch(mark)), whole[:40], b"", array.getvalue()):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"known.npz: no baseline statistics can be read"):
            read(file)


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "a.jsonl.gz"])
def test_pickled_rows_are_not_run(tmp_path, mark, name):
    (tmp_path / name).write_bytes(pickle.dumps(Touch(mark)))
    with pytest.raises(ValueError, match=name):
        load_prompts(str(tmp_path / name))


def test_the_script_of_a_data_set_is_not_run(tmp_path, mark, monkeypatch):
    """As a hub's: found by its name, with a loader of its own beside the rows."""
    import datasets

    (tmp_path / "rows.py").write_text(f"open({str(mark)!r}, 'w')\n")
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, *a, **k: load(str(tmp_path / "rows.py"), *a, **k)
    )
    with pytest.raises(ValueError, match=r"owner/rows: .*as a hub dataset failed .*scripts are no longer"):
        load_prompts("owner/rows")


@pytest.mark.parametrize("text", SECRETS)
def test_secrets_are_hidden(text):
    assert SECRETS[text] not in redacted(text)
    assert "***" in redacted(text)


def test_what_is_no_secret_stays():
    text = (
        "max_new_tokens: 40\nmicro_batch_tokens: 4096\nhf_model: https://host/a@b\nconfiguration key 'x': a"
    )
    assert redacted(text) == text


def test_lines_command_no_terminal(monkeypatch):
    attack = f"\x1b]0;title\x07 \x1b[2J \u202e [red] {TOKEN}"
    record = logging.LogRecord("rlhf", logging.WARNING, "", 0, "%s", (attack,), None)
    view, out = View("plain"), io.StringIO()
    monkeypatch.setattr(view, "_console", Console(file=out, soft_wrap=True, force_terminal=False))
    view.line(attack)
    for line in (Formatter("%(message)s").format(record), out.getvalue().rstrip("\n")):
        assert line.isprintable()
        assert "\\x1b[2J" in line
        assert TOKEN not in line
