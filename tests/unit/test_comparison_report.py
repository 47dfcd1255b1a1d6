"""The comparison's files: numbers as computed, plain words that agree with them, one safe self-contained page."""

import json
import re
import struct
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from rlhf.evaluate.comparison import CellFigures, compare
from rlhf.evaluate.comparison_plots import ablation_arms, legend, line, main_arms, style
from rlhf.evaluate.comparison_report import as_table, html, write_comparison
from rlhf.evaluate.comparison_words import amount, describe, favours, notes, verdict
from rlhf.evaluate.pareto import pareto_figure
from rlhf.evaluate.svg import COLOUR, PALETTE
from tests.unit.test_comparison import figure
from tests.unit.test_report import Tags

KLS = (1.0, 2.0, 4.0)
# metric -> its rise a nat for each arm: wins, prompts left behind, a reward's tail, and two signs of hacking
SLOPES = {
    "win/gold/helpful": {"lsc": 0.05, "linear": 0.04, "par": 0.05, "lsc_median": 0.03},
    "win/gold/joint": {"lsc": 0.10, "linear": 0.06, "par": 0.10, "lsc_median": 0.08},
    "win/evaluator/joint": {"lsc": 0.09, "linear": 0.07, "par": 0.09, "lsc_median": 0.07},
    "versus/gold/joint": {"lsc": 0.05, "linear": 0.05, "par": 0.05, "lsc_median": 0.05},
    "left_behind/joint": {"lsc": -0.02, "linear": 0.01, "par": -0.02, "lsc_median": -0.02},
    "reward_gain/help/q95": {"lsc": 0.2, "linear": 0.6, "par": 0.2, "lsc_median": 0.2},
    "overoptimisation/gold": {"lsc": 0.1, "linear": 0.3, "par": 0.1, "lsc_median": 0.1},
    "hacking/repeated_sentence": {"lsc": 0.03, "linear": 0.08, "par": 0.03, "lsc_median": 0.03},
    "hacking/length": {"lsc": 1.0, "linear": 2.0, "par": 1.0, "lsc_median": 1.0},
}


def study(seeds: int = 3, noise: float = 0.002) -> list[CellFigures]:
    """Straight lines over KL with independent noise; two signs that never move, and best-of-n."""
    rng, cells = np.random.default_rng(0), []
    for seed in range(seeds):
        for arm in ("linear", "par", "lsc_median", "lsc"):
            for p, kl in enumerate(KLS):
                values = {m: 0.1 + (s[arm] + rng.normal(0, noise)) * kl for m, s in SLOPES.items()}
                cells.append(figure(arm, p, seed, kl, values | {"hacking/lists": 0.1}))
        best = [(0.4, {"win/gold/joint": 0.2}), (1.2, {"win/gold/joint": 0.35})]
        cells += [
            figure("best_of_n", p, seed, kl, values, seconds=0.0) for p, (kl, values) in enumerate(best)
        ]
    return cells


def page(cells: list[CellFigures], **more: Any) -> str:
    return html(compare(cells, **more), "A study")


def test_the_markdown_table_marks_what_is_told_apart(tmp_path: Path) -> None:
    found = write_comparison(study(), tmp_path, "A study")
    rows = [line.split(" | ") for line in (tmp_path / "comparison.md").read_text().splitlines()]
    assert rows[0][0] == "| lsc minus"
    (linear,) = (row for row in rows if row[0] == "| linear")
    main = found["differences"]["linear"]["win/gold/joint"]["average"]
    assert linear[2].startswith(f"+{100 * main['mean']:.1f} (+{100 * main['low']:.1f} to ")
    assert linear[2].endswith("✓")  # more wins are better
    assert linear[rows[0].index("Say a sentence twice, points")].endswith("✓")  # and fewer repeats
    assert "✓" not in linear[rows[0].index("Mean length, tokens")]  # neither good nor bad


def test_summary_holds_the_figures_and_what_they_say(tmp_path: Path) -> None:
    cells = study()
    returned = write_comparison(cells, tmp_path, "A study", at=(1.0, 3.0))
    found = json.loads((tmp_path / "summary.json").read_text())
    assert [CellFigures.from_json(f) for f in found["figures"]] == cells
    assert (
        found["comparison"]
        == json.loads(json.dumps(returned))
        == json.loads(json.dumps(compare(cells, at=(1.0, 3.0))))
    )
    row = found["comparison"]["differences"]["linear"]["win/gold/joint"]
    assert row["at"]["3"]["mean"] == pytest.approx(0.04 * 3, abs=0.02)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "comparison.html",
        "comparison.md",
        "pareto.png",
        "pareto.svg",
        "summary.json",
    ]


def test_headline_says_where_the_reference_arm_wins_and_where_not() -> None:
    found = compare(study())
    told = verdict(found)
    assert told.outcome == "better"
    assert (
        told.headline
        == "At equal KL, lsc’s joint win rate is higher than linear’s; not told apart from par’s."
    )
    assert [line.split(" (")[0] for line in told.details] == ["Against linear", "Against par"]
    row = found["differences"]["linear"]
    for metric in ("win/gold/joint", "win/evaluator/joint", "left_behind/joint", "hacking/repeated_sentence"):
        average = row[metric]["average"]
        assert f"{average['verdict']}, {amount(metric, average)}" in told.details[0]
    assert row["left_behind/joint"]["average"]["verdict"] == "lower"
    assert "use a list" not in told.details[0]  # it never moved
    worse = [
        replace(c, arm={"lsc": "linear", "linear": "lsc"}.get(c.arm, c.arm))
        for c in study()
        if c.arm != "par"
    ]
    assert verdict(compare(worse)).outcome == "worse"
    assert verdict(compare(worse)).headline == "At equal KL, lsc’s joint win rate is lower than linear’s."
    alone = verdict(compare([c for c in study() if c.arm == "lsc"]))
    assert (alone.outcome, alone.headline) == ("unclear", "No baseline was measured beside lsc.")


def test_an_early_gap_that_measured_points_do_not_show_is_said() -> None:
    """Both arms jump at once, but one has no point before KL 2."""
    cells = [
        figure("lsc", p, s, kl, {"win/gold/joint": 0.5}) for s in (0, 1) for p, kl in enumerate((0.1, 2, 4))
    ]
    cells += [
        figure("linear", p, s, kl, {"win/gold/joint": 0.5}) for s in (0, 1) for p, kl in enumerate((2, 4))
    ]
    (told,) = verdict(compare(cells)).details
    assert "between measured points only (2.0 to 4.0 nats): not told apart, 0.0 points" in told


@pytest.mark.parametrize(
    ("metric", "mean", "low", "high", "text", "side"),
    [
        ("win/gold/joint", 0.031, 0.010, 0.052, "+3.1 points (+1.0 to +5.2)", "better"),
        ("left_behind/joint", 0.031, 0.010, 0.052, "+3.1 points (+1.0 to +5.2)", "worse"),
        ("hacking/length", -6.5, -8.0, -5.0, "−6.50 (−8.00 to −5.00)", ""),
        ("hacking/distinct_2", -0.2, -0.3, -0.1, "−20.0 points (−30.0 to −10.0)", "worse"),
        ("win/gold/joint", -0.2, None, None, "−20.0 points", ""),
    ],
)
def test_amounts_and_whom_they_favour(
    metric: str, mean: float, low: float | None, high: float | None, text: str, side: str
) -> None:
    told = "not told apart" if low is None else "higher" if mean > 0 else "lower"
    found = {"mean": mean, "low": low, "high": high, "n": 1 if low is None else 3, "verdict": told}
    assert amount(metric, found) == text
    assert favours(metric, found) == side


def test_every_number_of_the_tables_is_on_the_page() -> None:
    cells = study()
    found = compare(cells)
    text = page(cells).replace("\u00a0", " ")
    for arm in ("linear", "par", "lsc_median"):
        for metric in SLOPES:
            row = found["differences"][arm][metric]
            for told in (row["average"], row["within"]["average"], *row["at"].values()):
                mean, interval = amount(metric, told, unit=False).rstrip(")").split(" (")
                assert f">{mean}</span><small>{interval}</small><small>{told['verdict']}" in text, (
                    arm,
                    metric,
                )
    for arm, best in found["best"].items():
        value = best["win/gold/joint"]["value"]
        assert f"<td>{arm}</td>" in text
        assert f"{100 * value['mean']:.1f} ± {50 * (value['high'] - value['low']):.1f} %" in text
    assert f"{found['apart']} of {found['comparisons']}" in text
    assert "The same in every policy: Use a list." in text
    assert "log n − (n−1)/n" in text
    assert text.count("<svg") > 15


def test_what_was_not_run_is_told() -> None:
    cells = [
        replace(c, diverged="<b>KL</b> above 40") if (c.arm, c.point, c.seed) == ("par", 2, 1) else c
        for c in study()
    ]
    text = page(cells, expected=[("min", 0, 0)])
    assert (
        '<td>par</td><td>2</td><td>1</td><td class="wrap">diverged: &lt;b&gt;KL&lt;/b&gt; above 40</td>'
        in text
    )
    assert '<td>min</td><td>0</td><td>0</td><td class="wrap">no figures</td>' in text
    assert "Every cell was run, and none diverged." in page(study())


def test_page_needs_nothing_from_elsewhere_and_follows_the_theme() -> None:
    text = page(study())
    assert not re.findall(r"https?:|//[a-z]", text)
    assert "@import" not in text
    assert "<script" not in text
    assert not re.findall(r"url\((?!#)", text)
    tags = Tags(text)
    assert all(link.startswith("#") for link in tags.values("src", "href", "xlink:href"))
    ids = tags.values("id")
    assert {link[1:] for link in tags.values("href", "xlink:href")} <= set(ids)
    figures = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert not [code for f in figures for code in COLOUR.values() if code in f]
    assert not [f for f in figures if re.findall(r"#[0-9a-fA-F]{6}\b", f)]
    assert set(re.findall(r"var\(--([\w-]+)\)", text)) <= set(PALETTE)
    assert "prefers-color-scheme: dark" in text


def test_names_are_escaped() -> None:
    attack = "<script>alert(1)</script>"
    cells = [replace(c, arm=attack) if c.arm == "par" else c for c in study()]
    text = html(compare(cells), attack)
    assert "<script" not in text
    assert text.count("&lt;script&gt;alert(1)") > 5


def test_pareto_figure_is_800_wide_and_the_same_each_time(tmp_path: Path) -> None:
    write_comparison(study(), tmp_path / "a", "A study")
    write_comparison(study(), tmp_path / "b", "A study")
    for name in ("pareto.svg", "pareto.png", "comparison.html"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    png = (tmp_path / "a" / "pareto.png").read_bytes()
    assert struct.unpack(">II", png[16:24]) == (1600, 800)


def test_pareto_figure_names_each_line_once_and_no_two_names_touch() -> None:
    """Even where lines end at the same place, as lsc and par do."""
    found = compare(study())
    figure = pareto_figure(found)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for axes in figure.axes:
        boxes = {text.get_text(): text.get_window_extent(renderer) for text in axes.texts}
        metric = "win/gold/joint" if axes is figure.axes[0] else "left_behind/joint"
        assert set(boxes) == {arm for arm in main_arms(found) if line(found, arm, metric)}
        for a, b in combinations(boxes.values(), 2):
            assert not a.overlaps(b)
        assert all(box.x0 >= 0 and box.x1 <= figure.bbox.width for box in boxes.values())


def test_arms_of_one_figure_look_different() -> None:
    cells = [figure(f"arm{i}", 0, 0, 1.0, {"win/gold/joint": 0.2}) for i in range(8)]
    cells += [figure(a, 0, 0, 1.0, {"win/gold/joint": 0.2}) for a in ("lsc", "lsc_a", "lsc_b", "best_of_n")]
    found = compare(cells)
    for arms in (main_arms(found), ablation_arms(found)):
        looks = [style(found, arm) for arm in arms]
        assert len({(colour, line) for colour, _, line in looks}) == len(set(looks)) == len(arms)
        assert len(set(legend(found, arms))) == len(arms)
    assert main_arms(found)[-1] == "best_of_n"
    assert ablation_arms(found) == ["lsc", "lsc_a", "lsc_b"]


def test_console_table_has_the_numbers_in_columns() -> None:
    found = compare(study(), at=(2.0,))
    table = as_table(found)
    average = found["differences"]["linear"]["win/gold/joint"]["average"]
    (line,) = [
        x for x in table.split("\n\n")[0].splitlines() if x.startswith("Win rate, joint (gold judge), points")
    ]
    assert amount("win/gold/joint", average, unit=False) + "*" in line
    assert line.endswith("0.0–4.0  3/0")
    heads = table.split("\n\n")[0].splitlines()[0]
    assert heads.startswith("lsc − linear")
    assert heads.index("average") == line.index("+")
    assert "Use a list" not in table


def test_one_seed_and_one_judge_are_said() -> None:
    cells = [replace(c, judge="reward_models") for c in study(seeds=1)]
    said = " ".join(notes(compare(cells)))
    assert "one seed there is no interval" in said
    assert "judged by the reward models that were trained on" in said
    text = page(cells)
    assert "not told apart, one seed" in text
    assert "Judged by the trained reward models themselves" in text


def test_every_metric_has_a_label_of_its_own() -> None:
    metrics = [
        *SLOPES,
        "win/gold/harmless",
        "versus/evaluator/joint",
        "score/gold/helpful",
        "left_behind/joint_win",
    ]
    metrics += [
        "lower_tail/helpful",
        "reward_gain/help/mean",
        "overoptimisation/evaluator",
        "hacking/refusals",
    ]
    labels = [describe(m).label for m in metrics]
    assert len(set(labels)) == len(labels)
