"""Rows of the table that `python -m benchmarks.families` makes, and that it tells what is wrong."""

import numpy as np
import pytest
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.families import ours, plain
from benchmarks.families.configurations import make, names
from benchmarks.families.measure import Row, over, row
from benchmarks.families.ours import Distance
from benchmarks.families.pages import counts, page
from benchmarks.families.worker import measured

BOTH = [
    "llama",  # grouped keys, heads of 32: the compiled decoder in bfloat16
    "mistral",  # a window shorter than the prompts
    "mamba",
]
FLOAT32 = [
    "gemma2: caps",
    "llama4_text",  # chunks, layers without rotary positions
    "gpt2",
    "bart",  # positions by the cache's length
    "gemma3n_text",  # layers that use others' keys
    "falcon_h1",  # a state and keys in one layer
]


@pytest.mark.parametrize("name", BOTH)
def test_a_family_is_what_plain_transformers_gives(name):
    assert row(name).outcome == "equal"


@pytest.mark.parametrize("name", FLOAT32)
def test_a_family_is_what_plain_transformers_gives_in_float32(name):
    assert row(name, ["float32"]).outcome == "equal"


def test_a_prompt_on_whose_way_the_frequencies_change_is_refused():
    outcome = row("phi3: longrope", ["float32"]).outcome
    assert outcome.startswith("refused: a prompt of 9 tokens")
    assert "(plain transformers: its generate and its forward pass differ" in outcome


def test_every_causal_language_model_has_a_row():
    assert {name.partition(": ")[0] for name in names()} == set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    assert row("musicgen").outcome.startswith("not a causal text model: makes audio codes")


def test_a_model_that_sees_later_tokens_is_refused():
    outcome = row("bert: as an encoder", ["float32"]).outcome
    assert outcome.startswith("refused: ")
    assert outcome.endswith("(plain transformers: its logits depend on later tokens)")


def test_logits_are_spread():
    """Else every path would agree."""
    model = plain.build(make("llama"))
    assert type(model) is AutoModelForCausalLM._model_mapping[type(model.config)]
    logits = plain.logits(model, ours.prompts()[-1])
    assert 1 < float(logits.std()) < 3
    assert float((logits[1:] - logits[:-1]).std(0).mean()) > 0.1


def test_a_distance_is_over_its_limit_by_the_mean_square_or_the_largest():
    zero, own = Distance(np.zeros(4)), Distance(np.array([1.0, 1.0, 1.0, 1.0]))
    assert over(Distance(np.array([0.0, 2e-4])), zero) == pytest.approx(2)
    assert over(Distance(np.array([1.4, 1.4, 1.4, 1.4])), own) < 1
    assert over(Distance(np.array([1.6, 0.0, 0.0, 0.0])), own) > 1
    assert over(Distance.of(np.array([np.nan]), np.zeros(1)), own) > 1


def test_a_crash_and_a_hang_are_rows():
    found = list(measured(["llama", "gpt2"], ["float32"], patience=0.0))
    assert [one.outcome for one in found] == ["FAILS: took more than 0 seconds"] * 2
    assert counts(found) == "2 rows: 2 FAILS"


def test_the_page_has_every_row_in_order():
    rows = [
        Row("qwen3", policy={"float32": 2e-6, "bfloat16": 1.02}),
        Row("bert", "refused: it | looks ahead"),
    ]
    lines = page(rows).splitlines()
    assert lines[-2:] == [
        "| bert |  |  |  |  |  |  | refused: it / looks ahead |",
        "| qwen3 | Qwen 3 |  |  | 2.0e-06 | 1.02 |  | equal |",
    ]
