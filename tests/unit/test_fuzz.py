"""A short run of `python -m tests.fuzz`: generated bad input is refused with a line that names it, or runs."""

import logging

import pytest

from rlhf.data.json_text import DEEPEST
from rlhf.data.preferences import load_preferences
from tests.fuzz.configurations import configurations
from tests.fuzz.rows import rows
from tests.fuzz.trial import count


@pytest.mark.parametrize(("make", "number"), [(configurations, 60), (rows, 300)])
def test_generated_bad_input(make, number, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(logging.getLogger("rlhf"), "disabled", True)
    monkeypatch.setattr(
        "huggingface_hub.constants.HF_HUB_OFFLINE", True
    )  # or it asks for names again and again
    outcomes, failures = count(make(number, 7, tmp_path), lambda line: None)
    assert not failures
    assert outcomes["refused"] > number / 2
    assert outcomes["fine"] > 0


@pytest.mark.parametrize("depth", [DEEPEST + 1, 900, 100_000])
def test_rows_nested_beyond_the_stack_name_the_line(tmp_path, depth):
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"chosen": ' + "[" * depth + "]" * depth + "}\n")
    with pytest.raises(ValueError, match=r"pairs.jsonl:1: .*lists and objects are nested"):
        load_preferences(str(file))
