"""Counters on literal texts."""

import numpy as np
import pytest

from rlhf.evaluate.hacking import COUNTERS, Lexicon, distinct_pairs, hacking, has_repeat, is_refusal
from rlhf.evaluate.samples import PolicySamples
from tests.unit.test_evaluate_samples import policy


def said(texts: list[list[str]], meta: list[dict[str, object]] | None = None) -> PolicySamples:
    shape = (len(texts), len(texts[0]))
    return policy({"a": np.zeros(shape)}, {"a": np.zeros(shape[0])}, meta=meta, texts=texts)


def counted(name: str, samples: PolicySamples, lexicon: Lexicon | None = None) -> float | None:
    return COUNTERS[name].measure(samples, lexicon or Lexicon())


@pytest.mark.parametrize(
    "text",
    [
        "Stir it. Stir it.",
        "Stir it! Pour it. stir it?",
        "1) Stir it. 2) Stir it.",
        "- Stir it\n- Pour it\n- Stir it",
        "1. Stir it.\n2. Stir it.",
    ],
)
def test_repeats_are_seen(text: str) -> None:
    assert has_repeat(text)


@pytest.mark.parametrize(
    "text", ["", "Stir it.", "Stir it. Pour it.", "Add 3.5 cups, then 3.5 more.", "1. Stir it.\n2. Pour it."]
)
def test_what_is_said_once_is_no_repeat(text: str) -> None:
    assert not has_repeat(text)


@pytest.mark.parametrize(
    "text",
    [
        "I can't help with that.",
        "I can\u2019t help with that.",
        "Sorry, I cannot assist you.",
        "I'm sorry, but no.",
        "As an AI language model, I have no opinion.",
        "I won't explain that.",
    ],
)
def test_refusals_are_seen(text: str) -> None:
    assert is_refusal(text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "You can't miss it.",
        "I can't wait to show you.",
        "I can help.",
        "Stir it. " * 40 + "I cannot say.",
    ],
)
def test_answers_are_no_refusals(text: str) -> None:
    assert not is_refusal(text)


def test_distinct_pairs_by_hand() -> None:
    # go, go | go, go | go, home
    assert distinct_pairs("Go go, go home") == pytest.approx(2 / 3)
    samples = said([["a b a b a", "x"], ["a b c", ""]])
    assert counted("distinct_2", samples) == pytest.approx((0.5 + 1.0) / 2)
    assert counted("distinct_2", said([["x", ""]])) is None


def test_shares_over_all_responses() -> None:
    samples = said([["Go. Go.", "Go. Stop."], ["- one\n- two", "Then 1) one 2) two"]])
    assert counted("repeated_sentence", samples) == 0.25
    assert counted("lists", samples) == 0.5
    assert counted("length", samples) == pytest.approx((2 + 2 + 4 + 5) / 4)
    assert counted("unfinished", samples) == 0.0


def test_stock_phrases_are_counted_each_time() -> None:
    samples = said([["Great question! GREAT QUESTION again.", "I hope this helps."], ["No.", "No."]])
    assert counted("stock_phrases", samples) == pytest.approx(3 / 4)
    own = Lexicon(stock_phrases=("No",))
    assert counted("stock_phrases", samples, own) == pytest.approx(2 / 4)


def test_refusals_are_counted_on_benign_prompts_only() -> None:
    texts = [["I cannot say.", "Stir it."], ["I cannot say.", "I cannot say."], ["Stir it.", "Stir it."]]
    marked: list[dict[str, object]] = [{"unsafe": False}, {"unsafe": True}, {"unsafe": False}]
    assert counted("refusals", said(texts, marked)) == pytest.approx(1 / 4)
    assert counted("refusals", said(texts)) == pytest.approx(3 / 6)
    assert counted("refusals", said(texts, [{"unsafe": True}] * 3)) is None
    assert counted("refusals", said(texts, [{}, {"unsafe": False}, {"unsafe": None}])) == 1.0
    never = Lexicon(is_refusal=lambda text: False)
    assert counted("refusals", said(texts), never) == 0.0


def test_what_cannot_be_measured_is_left_out() -> None:
    base, aligned = said([["a", "b"]]), said([["a b", "b c"]])
    found = hacking(base, aligned, Lexicon())
    assert "distinct_2" not in found
    assert found["length"] == {"base": 1.0, "aligned": 2.0}
