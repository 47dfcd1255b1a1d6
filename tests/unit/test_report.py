"""The report's files: exact numbers, safe and self-contained HTML, figures that follow the theme."""

import json
import re
from dataclasses import replace
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from rlhf.evaluate.best_of import best_of
from rlhf.evaluate.examples import before_after, worst_prompts
from rlhf.evaluate.record import RunRecord
from rlhf.evaluate.report import write_report
from rlhf.evaluate.svg import COLOUR, PALETTE, panel
from rlhf.evaluate.wins import win_rates
from rlhf.evaluate.words import verdict
from tests.unit.test_evaluate_samples import policy

ATTACK = "<script>alert(1)</script><img src=https://example.org/x.png>"


def metrics(steps: int) -> list[dict[str, float]]:
    every = ("kl", "grad_norm", "utility/combined", "response_tokens", "finished")
    by_model = ("reward/{}/mean", "reward/{}/std", "r_ref/{}", "utility/{}", "p_good/{}", "slope/{}")
    rows = []
    for step in range(steps):
        row = dict.fromkeys(every, 0.1 * step) | {"step": step, "seconds": 1.0, "seconds/generate": 0.4}
        for name in ("help", "safe"):
            row |= {key.format(name): 0.5 for key in by_model}
        rows.append(row)
    return rows


def record(text: str = "Stir it.") -> RunRecord:
    """Two prompts, two responses, two properties: small enough to be worked out by hand."""
    reference = {"help": [1.0, 1.0], "safe": [0.0, 0.0]}
    meta = [{"topic": "tea", "unsafe": False}, {"topic": text, "unsafe": True}]
    prompts = ["How?", [{"role": "user", "content": text}]]
    base = policy({"help": [[0, 2], [0, 0]], "safe": [[0, 0], [-1, 0]]}, reference, meta, prompts=prompts)
    aligned = policy(
        {"help": [[1, 2], [0, 1]], "safe": [[0, 0], [-1, -1]]},
        reference,
        meta,
        texts=[["Sip it.", "Sip it. Sip it."], ["Pour", text]],
        prompts=prompts,
        log_ratio=[[1.0, 2.0], [3.0, 4.0]],
    )
    baseline = {
        name: {
            "prompts": prompts,
            "samples": np.random.default_rng(0).normal(size=(2, 16)),
            "r_ref": np.array([0.5, 1.0]),
            "aligned": aligned.rewards[name],
        }
        for name in ("help", "safe")
    }
    return RunRecord(
        title=text,
        config=f"seed: 0\nnote: {text}\n",
        versions={"python": "3.12"},
        seconds={"align": 3.0, "evaluate": 1.0, "total": 5.0},
        skipped=["sft", "sft"],
        metrics=metrics(3),
        base=base,
        aligned=aligned,
        baseline=baseline,
        best_of=best_of(base, np.array([[0.0, 2.0], [0.0, 0.0]]), [2]),
        busy={"learner 0": {"train": 0.625, "publish weights": 0.125, "waiting": 0.25}},
    )


def page(run: RunRecord, directory: Path) -> str:
    write_report(run, directory)
    return (directory / "report.html").read_text(encoding="utf-8")


def test_slower_ways_are_told(tmp_path):
    told = "policy (MambaForCausalLM): rows are padded: its attention < ours"
    text = page(replace(record(), notes=(told,)), tmp_path)
    assert f"<li>{escape(told)}</li>" in text
    assert json.loads((tmp_path / "summary.json").read_text())["notes"] == [told]
    assert "Slower ways" not in page(record(), tmp_path)


class Tags(HTMLParser):
    """Every tag with its attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def values(self, *names: str) -> list[str]:
        return [value or "" for _, attrs in self.tags for name, value in attrs.items() if name in names]


def test_summary_has_the_exact_numbers(tmp_path: Path) -> None:
    write_report(record(), tmp_path)
    found = json.loads((tmp_path / "summary.json").read_text())
    assert found["win_rate"] == {
        "help": {"base": 0.25, "aligned": 0.75},
        "safe": {"base": 0.75, "aligned": 0.5},
        "joint": {"base": 0.25, "aligned": 0.5},
    }
    assert found["win_vs_random"] == {
        "help": ((0.5 * 0 + 1 + 0 + 1 + 0.5) / 4 + (0.5 + 0.5 + 1 + 1) / 4) / 2,
        "safe": (0.5 + (0.5 + 0 + 0.5 + 0) / 4) / 2,
        "joint": ((1 + 0 + 1 + 0.5) / 4 + (0.5 + 0 + 1 + 0.5) / 4) / 2,
    }
    assert found["best_of"]["2"]["win_rate"] == {"help": 0.5, "safe": (1 + 0.5) / 2, "joint": 0.5}
    assert found["best_of"]["2"]["kl"] == pytest.approx(np.log(2) - 0.5)
    assert found["left_behind"] == {"help": 0.0, "safe": 0.5}
    assert (found["kl"], found["kl_standard_error"]) == (2.5, 1.0)
    assert found["hacking"]["repeated_sentence"] == {"base": 0.0, "aligned": 0.25}
    assert found["hacking"]["length"] == {"base": 3.0, "aligned": (2 + 4 + 1 + 2) / 4}
    assert found["seconds"] == {"align": 3.0, "evaluate": 1.0, "total": 5.0}
    assert found["versions"] == {"python": "3.12"}
    assert found["skipped"] == ["sft"]
    assert [found[k] for k in ("prompts", "samples", "clusters", "cluster_by")] == [2, 2, 2, "topic"]
    assert found["judge"] == "reward_models"
    assert set(found["win_rate_ci"]["joint"]) == {"base", "aligned", "change"}
    assert len(found["win_rate_ci"]["help"]["base"]) == 2
    assert list(found) == sorted(found)


def test_page_shows_slopes_and_best_of_n(tmp_path: Path) -> None:
    text = page(record(), tmp_path)
    assert "What one more unit of reward is worth" in text
    assert re.search(r"<td>best of 2</td><td>0\.19</td><td>50", text)


def test_summary_refuses_nan_by_its_key(tmp_path: Path) -> None:
    run = replace(record(), seconds={"align": float("nan"), "total": 1.0})
    with pytest.raises(ValueError, match=r"seconds\.align is nan"):
        write_report(run, tmp_path)
    assert not list(tmp_path.iterdir())


def test_texts_are_escaped_wherever_they_come_from(tmp_path: Path) -> None:
    text = page(record(ATTACK), tmp_path)
    assert text.count("<script") == 1
    assert "alert(1)</script>" not in text
    assert text.count("&lt;script&gt;alert(1)") >= 6  # title, prompts, topic, response, configuration
    assert not [tag for tag, _ in Tags(text).tags if tag in ("img", "iframe", "link", "object", "embed")]


def test_names_are_escaped_in_drawings(tmp_path: Path) -> None:
    """Headings, labels that are read out, and the text that Matplotlib writes."""
    name = 'safe"><script>alert(1)</script>'
    drawn = panel(name, lambda axes: axes.set_xlabel(name))
    root = ElementTree.fromstring(drawn.svg.replace("xlink:", ""))
    assert root.get("aria-label") == name
    assert name in [node.text for node in root.iter() if node.text]
    assert not [node for node in root.iter() if node.tag.endswith("script")]


def test_no_text_turns_what_follows_it(tmp_path: Path) -> None:
    text = page(record("a\u202eb\x00c\x1b[2Jd"), tmp_path)
    assert "a\\u202eb\\x00c\\x1b[2Jd" in text
    assert not set("\u202e\x00\x1b") & set(text)


def test_steps_that_were_left_out_are_told(tmp_path: Path) -> None:
    assert "steps were left out" not in page(record(), tmp_path)
    rows = [row | {"skipped": float(row["step"] in (2, 3))} for row in metrics(5)]
    run = replace(record(), metrics=rows)
    assert "2 of 5 steps were left out: a loss or a gradient was not finite" in page(run, tmp_path)
    assert json.loads((tmp_path / "summary.json").read_text())["steps_left_out"] == 2


def test_page_needs_nothing_from_elsewhere(tmp_path: Path) -> None:
    text = page(record(), tmp_path)
    assert not re.findall(r"https?:|//[a-z]", text)
    assert "@import" not in text
    assert not re.findall(r"url\((?!#)", text)
    tags = Tags(text)
    assert all(link.startswith("#") for link in tags.values("src", "href", "xlink:href"))
    ids = tags.values("id")
    assert len(ids) == len(set(ids))
    assert {link[1:] for link in tags.values("href", "xlink:href")} <= set(ids)
    assert set(re.findall(r"url\(#([^)]+)\)", text)) <= set(ids)


def test_figures_take_their_colours_from_the_page(tmp_path: Path) -> None:
    text = page(record(), tmp_path)
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(figures) >= 12
    for figure in figures:
        assert not [code for code in COLOUR.values() if code in figure]
        assert not re.findall(r"#[0-9a-fA-F]{6}\b", figure)
        assert "var(--" in figure
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= set(PALETTE)
    assert "prefers-color-scheme: dark" in text


def test_same_record_same_bytes(tmp_path: Path) -> None:
    assert page(record(), tmp_path / "a") == page(record(), tmp_path / "b")


def test_page_of_a_bare_run(tmp_path: Path) -> None:
    """One property, one prompt, one response; no curves, no distributions."""
    samples = policy({"help": [[0.0]]}, {"help": [1.0]}, texts=[[""]])
    run = RunRecord("bare", "", {}, {}, [], [], samples, samples, {})
    text = page(run, tmp_path)
    assert "Win rate (help) did not change measurably" in text
    assert "joint" not in text
    assert "No alignment metrics were recorded." in text
    assert "No prompt’s mean score fell." in text


def rates(before: float, after: float, prompts: int = 200) -> dict[str, Any]:
    """Wins of two policies on prompts of which these shares are won."""
    share = np.arange(prompts)[:, None] / prompts
    reference = {"a": np.full(prompts, 0.5), "b": np.zeros(prompts)}
    base, aligned = (
        policy({"a": share < s, "b": np.ones((prompts, 1))}, reference, log_ratio=np.full((prompts, 1), 3.14))
        for s in (before, after)
    )
    return win_rates(base, aligned)


@pytest.mark.parametrize(
    ("before", "after", "outcome", "words"),
    [
        (0.12, 0.41, "better", "Joint win rate rose from 12 % to 41 % (95 % CI of the change +2"),
        (0.41, 0.12, "worse", "Joint win rate fell from 41 % to 12 % (95 % CI of the change −3"),
        (0.40, 0.405, "unclear", "Joint win rate did not change measurably: 40 % before, 40 % after ("),
    ],
)
def test_verdict_says_what_happened(before: float, after: float, outcome: str, words: str) -> None:
    found = verdict(rates(before, after), own_judge=False)
    assert found.outcome == outcome
    assert found.headline.replace("\u00a0", " ").startswith(words)
    assert found.headline.endswith("at KL 3.1 nats.")
    assert any("reward models that were trained on" in line for line in found.details)


def test_worst_prompts_are_ranked_across_scales() -> None:
    """A fall of 1 where scores spread by 1 is worse than one of 5 where they spread by 100."""
    reference = {"fine": [0, 0, 0], "coarse": [0, 0, 0]}
    base = policy({"fine": [[1], [-1], [0]], "coarse": [[100], [-100], [0]]}, reference)
    aligned = policy({"fine": [[0], [-1], [1]], "coarse": [[95], [0], [0]]}, reference)
    worst = worst_prompts(base, aligned, win_rates(base, aligned))
    assert [(w.prompt, w.name, w.difference) for w in worst] == [
        ("prompt 0", "fine", -1.0),
        ("prompt 0", "coarse", -5.0),
    ]


def test_examples_are_best_median_worst_with_typical_responses() -> None:
    reference = {"a": np.zeros(9)}
    base = policy({"a": np.tile([[-1.0, 0.0, 1.0]], (9, 1))}, reference)
    aligned = policy({"a": np.arange(9)[:, None] + np.array([[5.0, -5.0, 0.0]])}, reference)
    examples = before_after(base, aligned, each=1)
    assert [(e.group, e.prompt) for e in examples] == [
        ("best", "prompt 8"),
        ("median", "prompt 4"),
        ("worst", "prompt 0"),
    ]
    assert [e.aligned.text for e in examples] == ["answer 8 2", "answer 4 2", "answer 0 2"]
    assert all(e.base.scores == (("a", 0.0, True),) for e in examples)


def test_few_prompts_are_shown_once() -> None:
    samples = policy({"a": [[1.0], [2.0]]}, {"a": [0, 0]})
    assert len(before_after(samples, samples, each=4)) == 2


def test_busy_and_waiting_of_each_process(tmp_path):
    text = page(record(), tmp_path)
    row = next(line for line in text.splitlines() if "<td>learner 0</td>" in line)
    assert "train 62" in row or "train 63" in row
    assert "publish weights 1" in row
    assert "25\u00a0%" in row or "25 %" in row
    assert "experiences" in row
