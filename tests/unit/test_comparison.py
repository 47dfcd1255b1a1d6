"""Comparison at equal KL: arms whose true difference is known, and arithmetic against numpy, scipy and by hand."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import integrate, stats

from rlhf.evaluate.comparison import Cell, CellFigures, cell_figures, compare, difference
from rlhf.evaluate.equal_kl import Curve, common_range
from rlhf.evaluate.hacking import Lexicon
from rlhf.evaluate.intervals import estimate, t_quantile
from rlhf.evaluate.record import load_samples, save_samples
from rlhf.evaluate.samples import PolicySamples
from tests.unit.test_evaluate_samples import example, policy

MAIN = "win/gold/joint"


def figure(arm: str, point: int, seed: int, kl: float, values: dict[str, float], **more: Any) -> CellFigures:
    """Figures as given; the base policy has 0.1 in everything unless told otherwise."""
    base = more.pop("base", dict.fromkeys(values, 0.1))
    given = {"kl_coef": 0.1, "seconds": 1.0, "judge": "own", "prompts": 9, "samples": 4} | more
    return CellFigures(arm=arm, point=point, seed=seed, kl=kl, values=values, base=base, **given)


def line(arm: str, slope: float, seed: int, kls: tuple[float, ...], noise: float = 0.0) -> list[CellFigures]:
    """A joint win rate of 0.1 + slope * KL, and noise times KL that is the seed's own."""
    own = noise * float(np.random.default_rng(seed + 1000 * len(arm)).normal())
    return [figure(arm, p, seed, kl, {MAIN: 0.1 + (slope + own) * kl}) for p, kl in enumerate(kls)]


def normal_policy(shift: float, kl: float, seed: int, prompts: int = 150, samples: int = 24) -> PolicySamples:
    """Two properties with scores N(shift, 1), independent, judged at the base policy's true 85 % quantile."""
    rng = np.random.default_rng(seed)
    judged = {name: rng.normal(shift, 1, (prompts, samples)) for name in ("helpful", "harmless")}
    reference = {name: np.full(prompts, stats.norm.ppf(0.85)) for name in judged}
    log_ratio = rng.normal(kl, 0.1, (prompts, samples))
    made = policy(judged, reference, log_ratio=log_ratio)
    rewards = {name: (scores + 2 * shift).astype(np.float32) for name, scores in judged.items()}
    evaluated = {name: (scores + 0.5 * shift).astype(np.float32) for name, scores in judged.items()}
    evaluator_reference = {n: r.astype(np.float32) for n, r in reference.items()}
    return replace(made, rewards=rewards, evaluated=evaluated, evaluator_reference=evaluator_reference)


def joint(shift: float) -> float:
    return float(stats.norm.sf(stats.norm.ppf(0.85) - shift)) ** 2


def normal_study(gains: dict[str, float], kls: tuple[float, ...], seeds: int) -> list[CellFigures]:
    """Arms whose scores rise by gain * sqrt(KL): the true joint win rate at a point is `joint`."""
    found = []
    for a, (arm, gain) in enumerate(gains.items()):
        for seed in range(seeds):
            base = normal_policy(0.0, 0.0, 10_000 + seed)
            for p, kl in enumerate(kls):
                aligned = normal_policy(gain * kl**0.5, kl, 1000 * a + 10 * seed + p)
                found.append(cell_figures(Cell(arm, p, seed, 1 / (p + 1), 1.0, base, aligned)))
    return found


def test_a_better_arm_is_found_with_its_amount() -> None:
    knots = np.array([0.0, 0.5, 1.5, 4.0])
    found = compare(normal_study({"linear": 0.2, "lsc": 0.4}, (0.5, 1.5, 4.0), seeds=4), at=(1.0, 3.0))
    row = found["differences"]["linear"][MAIN]
    truth = np.array([joint(0.4 * kl**0.5) - joint(0.2 * kl**0.5) for kl in knots])
    for kl in (1.0, 3.0):
        told = row["at"][f"{kl:g}"]
        assert told["mean"] == pytest.approx(np.interp(kl, knots, truth), abs=0.01)
        assert (told["verdict"], told["above"], told["below"], told["n"]) == ("higher", 4, 0, 4)
    assert row["average"]["mean"] == pytest.approx(np.trapezoid(truth, knots) / 4, abs=0.01)
    assert row["average"]["low"] > 0
    assert found["arms"] == ["lsc", "linear"]
    gap = found["differences"]["linear"]["overoptimisation/gold"]["at"]["3"]
    rise = np.interp(3.0, knots, knots**0.5)
    assert gap["mean"] == pytest.approx(
        2 * (0.4 - 0.2) * rise, abs=0.04
    )  # rewards rise three times the judge


def test_equal_arms_are_not_told_apart() -> None:
    found = compare(normal_study({"lsc": 0.3, "linear": 0.3}, (0.5, 2.0), seeds=5), at=(1.0,))
    row = found["differences"]["linear"][MAIN]
    for told in (row["average"], row["at"]["1"]):
        assert told["low"] < 0 < told["high"]
        assert told["verdict"] == "not told apart"
        assert abs(told["mean"]) < 0.01


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    """400 studies of 4 seeds whose true slopes differ by 0.02: 95 % intervals of the average hold it in about 95 %."""
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        cells = []
        for seed in range(4):
            for arm, slope in (("lsc", 0.05), ("linear", 0.03)):
                cells += [
                    figure(arm, p, seed, kl, {MAIN: 0.1 + slope * kl + rng.normal(0, 0.01)})
                    for p, kl in enumerate(rng.uniform((0.5, 2.5), (1.5, 3.5)))
                ]
        row = compare(cells)["differences"]["linear"][MAIN]
        held += row["average"]["low"] <= 0.02 * row["range"][1] / 2 <= row["average"]["high"]
    assert 0.92 < held / 400 < 0.98


def test_figures_of_a_cell_against_closed_forms() -> None:
    shift, n = 0.8, 24
    base, aligned = normal_policy(0, 0, 1, 2000, n), normal_policy(shift, 3.0, 2, 2000, n)
    found = cell_figures(Cell("lsc", 0, 0, 0.1, 5.0, base, aligned))
    v, start = found.values, found.base
    one = stats.norm.sf(stats.norm.ppf(0.85) - shift)
    beats = stats.norm.cdf(shift / 2**0.5)
    error = (2 / n) ** 0.5  # standard error of a difference of two prompt means
    truth = {
        "win/gold/helpful": one,
        "win/gold/joint": one**2,
        "win/evaluator/joint": joint(1.5 * shift),
        "versus/gold/helpful": beats,
        "versus/gold/joint": 0.5 + 0.5 * (beats**2 - (1 - beats) ** 2),
        "score/gold/helpful": shift,
        "left_behind/helpful": stats.norm.cdf(-shift / error),
        "lower_tail/helpful": shift + stats.norm.ppf(0.1) * error,
        "lower_tail/joint": 2 * shift + stats.norm.ppf(0.1) * error * 2**0.5,
        "reward_gain/helpful/mean": 3 * shift,
        "reward_gain/helpful/q95": 3 * shift + stats.norm.ppf(0.95) * (1 + 1 / n) ** 0.5,
        "overoptimisation/gold": 2 * shift,
        "overoptimisation/evaluator": 1.5 * shift,
    }
    assert {k: v[k] for k in truth} == pytest.approx(truth, abs=0.025)
    at_zero = {
        "win/gold/joint": 0.15**2,
        "versus/evaluator/joint": 0.5,
        "left_behind/harmless": 0.5,
        "lower_tail/helpful": stats.norm.ppf(0.1) * error,
        "overoptimisation/gold": 0.0,
    }
    assert {k: start[k] for k in at_zero} == pytest.approx(at_zero, abs=0.02)
    assert found.kl == pytest.approx(3.0, abs=0.01)
    assert start.keys() == v.keys() - {"left_behind/joint_win"}


def test_noise_at_kl_zero_is_what_two_equal_policies_show() -> None:
    base, again = normal_policy(0, 0, 1, 4000, 8), normal_policy(0, 0, 2, 4000, 20)
    found = cell_figures(Cell("lsc", 0, 0, 0.1, 5.0, base, again))
    for metric in ("left_behind/helpful", "left_behind/joint", "lower_tail/helpful", "lower_tail/joint"):
        assert found.values[metric] == pytest.approx(found.base[metric], abs=0.03), metric


def test_who_fell_by_hand() -> None:
    base = policy({"a": [[1, 3], [0, 0], [5, 5], [1, 1]]}, {"a": [3, 0, 5, 1]})
    aligned = policy({"a": [[2, 1], [0, 0], [6, 4.5], [0, 3]]}, {"a": [3, 0, 5, 1]})
    found = cell_figures(Cell("lsc", 0, 0, 0.1, 1.0, base, aligned)).values
    assert found["left_behind/a"] == found["left_behind/joint"] == 0.25
    assert found["left_behind/joint_win"] == 0.75  # rates 1/2 1 1 1 -> 0 1 1/2 1/2
    assert found["lower_tail/a"] == pytest.approx(np.quantile([-0.5, 0, 0.25, 0.5], 0.1))


def test_hacking_counts_use_the_given_lexicon() -> None:
    base = policy({"a": [[1, 1]]}, {"a": [0]}, [{"unsafe": False}], [["Pour it.", "Stir it."]])
    aligned = policy({"a": [[1, 1]]}, {"a": [0]}, [{"unsafe": False}], [["Nice one! Nope.", "Nope. Nope."]])
    lexicon = Lexicon(("nice one",), lambda text: "Nope" in text)
    found = cell_figures(Cell("lsc", 0, 0, 0.1, 1.0, base, aligned), lexicon)
    names = ("length", "repeated_sentence", "stock_phrases", "refusals")
    assert [found.values[f"hacking/{n}"] for n in names] == [2.5, 0.5, 0.5, 1.0]
    assert [found.base[f"hacking/{n}"] for n in names] == [2.0, 0.0, 0.0, 0.0]


def test_a_cell_that_is_not_finite_must_say_that_it_diverged() -> None:
    good = policy({"a": [[1.0, 2.0]]}, {"a": [0]})
    bad = policy({"a": [[1.0, np.nan]]}, {"a": [0]}, log_ratio=[[np.inf, 1.0]])
    with pytest.raises(ValueError, match=r"arm lsc, point 2, seed 1: kl is inf"):
        cell_figures(Cell("lsc", 2, 1, 0.1, 1.0, good, bad))
    told = cell_figures(Cell("lsc", 2, 1, 0.1, 1.0, good, bad, diverged="KL above 100"))
    assert (told.values, told.kl, told.diverged) == ({}, None, "KL above 100")


def test_figures_survive_json() -> None:
    before = normal_study({"lsc": 0.3}, (1.0,), 1)[0]
    assert CellFigures.from_json(json.loads(json.dumps(before.to_json(), allow_nan=False))) == before


def test_a_summary_is_json() -> None:
    found = compare([c for s in range(2) for a in ("lsc", "linear") for c in line(a, 0.1, s, (1, 3), 0.01)])
    assert json.loads(json.dumps(found, allow_nan=False))["arms"] == ["lsc", "linear"]


def test_curves_interpolate_as_numpy_and_average_as_quadrature() -> None:
    rng = np.random.default_rng(3)
    kl, value = rng.uniform(0.2, 6, 7), rng.normal(size=7)
    curve = Curve.through(zip(kl, value, strict=True), anchor=0.25)
    order = np.argsort(kl)
    x, y = np.concatenate([[0], kl[order]]), np.concatenate([[0.25], value[order]])
    for at in (0.0, 0.1, 1.7, x[-1]):
        assert curve.at(at) == pytest.approx(np.interp(at, x, y))
    low, high = 0.3, float(x[-1]) - 0.1
    area, _ = integrate.quad(lambda k: np.interp(k, x, y), low, high, points=x[1:-1], limit=200)
    assert curve.average(low, high) == pytest.approx(area / (high - low), rel=1e-6)
    assert not curve.covers(float(x[-1]) + 1e-9)
    with pytest.raises(AssertionError):
        curve.at(float(x[-1]) + 0.1)


def test_a_negative_kl_counts_as_zero_and_equal_ones_are_averaged() -> None:
    curve = Curve.through([(-0.01, 0.3), (2.0, 0.5), (2.0, 0.7)], anchor=0.1)
    assert curve.kl.tolist() == [0, 2]
    assert curve.value == pytest.approx([0.2, 0.6])
    assert common_range([curve, Curve.through([(3.0, 1.0), (4.0, 1.0)], None)]) is None


def test_t_intervals_are_those_of_scipy() -> None:
    for freedom in (1, 2, 3, 4, 7, 30, 101):
        assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-10)
    values = [0.3, 0.1, 0.45, 0.2]
    low, high = stats.t.interval(0.95, 3, np.mean(values), stats.sem(values))
    assert estimate(values) == pytest.approx({"mean": np.mean(values), "low": low, "high": high, "n": 4})


def test_differences_are_paired_by_seed_and_never_extrapolated() -> None:
    """By hand: lsc has slope 0.1 + seed * 0.05 to KL 4; linear 0.08 + seed * 0.05 to KL 2 (seed 1: to KL 1)."""
    cells = [c for s in (0, 1, 2) for c in line("lsc", 0.1 + 0.05 * s, s, (1, 4))]
    cells += [
        c for s, top in ((0, 2), (1, 1), (7, 9)) for c in line("linear", 0.08 + 0.05 * s, s, (0.5, top))
    ]
    row = compare(cells, at=(1, 2, 3))["differences"]["linear"][MAIN]
    assert row["seeds"] == [0, 1]
    assert row["range"] == (0.0, 1.0)
    assert row["average"]["mean"] == pytest.approx(0.02 * 0.5)
    assert row["average"]["high"] - row["average"]["low"] < 1e-9  # paired: the seeds' own slopes cancel
    assert row["at"].keys() == {"1", "2"}
    assert (row["at"]["1"]["n"], row["at"]["2"]["n"]) == (2, 1)
    assert row["at"]["2"]["mean"] == pytest.approx(0.04)
    assert row["curve"]["mean"] == pytest.approx(0.02 * np.array(row["curve"]["kl"]))


def test_measured_points_alone_are_told_apart_from_the_line_from_the_base() -> None:
    """An arm that jumps at once and stays: the line from KL 0 makes an arm without early points look worse."""
    early = [figure("lsc", p, s, kl, {MAIN: 0.5}) for s in (0, 1) for p, kl in enumerate((0.1, 2, 4))]
    late = [figure("linear", p, s, kl, {MAIN: 0.5}) for s in (0, 1) for p, kl in enumerate((2, 4))]
    row = compare([*early, *late])["differences"]["linear"][MAIN]
    assert row["average"]["mean"] == pytest.approx((0.5 * 0.4 * 2 - 0.5 * 0.4 * 0.1) / 4)
    assert row["within"]["range"] == (2.0, 4.0)
    assert row["within"]["average"]["mean"] == pytest.approx(0, abs=1e-12)
    assert row["within"]["average"]["verdict"] == "not told apart"


def test_missing_and_diverged_cells_are_listed_and_left_out() -> None:
    cells = [c for s in (0, 1) for c in line("lsc", 0.1, s, (1, 2, 4))]
    cells += [c for s in (0, 1) for c in line("linear", 0.05, s, (1, 2, 4)) if (s, c.point) != (1, 2)]
    cells[4] = replace(cells[4], diverged="loss is nan", values={}, base={}, kl=None)
    found = compare(cells)
    assert found["incomplete"] == [
        {"arm": "linear", "point": 2, "seed": 1, "why": "no figures"},
        {"arm": "lsc", "point": 1, "seed": 1, "why": "diverged: loss is nan"},
    ]
    assert found["cells"] == 10
    row = found["differences"]["linear"][MAIN]
    assert row["range"] == (0.0, 2.0)
    assert row["average"]["mean"] == pytest.approx(0.05)
    assert [p["metrics"][MAIN]["n"] for p in found["curves"]["lsc"]] == [2, 1, 2]
    planned = [(arm, p, s) for arm in ("lsc", "linear", "par") for p in (0, 1, 2) for s in (0, 1)]
    listed = compare(cells, expected=planned)["incomplete"]
    assert [i for i in listed if i["arm"] == "par"] == [
        {"arm": "par", "point": p, "seed": s, "why": "no figures"} for p in (0, 1, 2) for s in (0, 1)
    ]


def test_one_seed_has_no_interval() -> None:
    found = compare([*line("lsc", 0.2, 0, (1, 2)), *line("linear", 0.1, 0, (1, 2))])
    told = found["differences"]["linear"][MAIN]["average"]
    assert (told["low"], told["high"], told["n"], told["verdict"]) == (None, None, 1, "not told apart")
    assert told["mean"] == pytest.approx(0.1)
    assert found["comparisons"] == 0


def test_every_interval_is_counted() -> None:
    cells = [
        c for s in (0, 1, 2) for a, g in (("lsc", 0.2), ("linear", 0.1)) for c in line(a, g, s, (1, 2), 1e-3)
    ]
    found = compare(cells, at=(1.0, 2.0, 8.0))  # average, between measured points, at 1, at 2
    assert (found["comparisons"], found["apart"]) == (4, 4)


def test_best_is_the_point_with_the_highest_mean() -> None:
    rows = {0: (0.2, 0.4, 0.3), 1: (0.3, 0.4, 0.6)}
    cells = [figure("lsc", p, s, p + 1 + s / 2, {MAIN: v}) for s, r in rows.items() for p, v in enumerate(r)]
    best = compare(cells)["best"]["lsc"][MAIN]
    assert best["point"] == 2
    assert best["value"]["mean"] == pytest.approx(0.45)
    assert best["kl"]["mean"] == pytest.approx(3.25)


def test_what_cannot_be_compared_is_refused() -> None:
    cells = line("linear", 0.1, 0, (1, 2))
    with pytest.raises(ValueError, match=r"reference arm 'lsc'; there are \['linear'\]"):
        compare(cells)
    with pytest.raises(ValueError, match="arm linear, point 0, seed 0 is there twice"):
        compare([*cells, cells[0]], reference_arm="linear")
    assert difference({0: line("lsc", 0.1, 0, (1,))}, {1: cells}, MAIN, (1.0,)) is None


def test_evaluator_scores_survive_a_round_trip_and_old_files_have_none(tmp_path: Path) -> None:
    save_samples(tmp_path / "old.npz", example())
    with np.load(tmp_path / "old.npz") as archive:
        assert not [name for name in archive.files if name.startswith("evaluat")]
    old = load_samples(tmp_path / "old.npz")
    assert (old.evaluated, old.evaluator_reference) == ({}, {})
    scores = {"a": np.array([[1.5, -2.0], [0.25, 8.0]], np.float32)}
    reference = {"a": np.array([0.5, 1.0], np.float32)}
    save_samples(tmp_path / "new.npz", replace(example(), evaluated=scores, evaluator_reference=reference))
    new = load_samples(tmp_path / "new.npz")
    assert np.array_equal(new.evaluated["a"], scores["a"])
    assert np.array_equal(new.evaluator_reference["a"], reference["a"])
    assert new.evaluated["a"].dtype == new.evaluator_reference["a"].dtype == np.float32
