"""Points of the curve against numbers worked out by hand; which is chosen, and when training ends early."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.evaluate.curve import (
    APART,
    OPTIMISED,
    OWN,
    Choice,
    Point,
    best,
    choose,
    due,
    point,
    read_points,
    should_stop,
    write_points,
)
from rlhf.evaluate.curve_plots import evaluation_curves
from rlhf.evaluate.hacking import Lexicon
from rlhf.evaluate.report import write_report
from rlhf.evaluate.samples import PolicySamples
from tests.unit.test_config import config
from tests.unit.test_evaluate_samples import policy
from tests.unit.test_report import page, record


def samples() -> PolicySamples:
    """Two prompts, two responses: the reward models see 3/4 and 1/2 win, jointly 1/4; the judge and the evaluators
    otherwise."""
    found = policy(
        {"help": [[1, 2], [0, 3]], "safe": [[0, -1], [0, -1]]},
        {"help": [1, 1], "safe": [0, 0]},
        texts=[["Sip it.", "Sip it. Sip it."], ["Pour", "I can't."]],
        log_ratio=[[1.0, 2.0], [3.0, 4.0]],
    )
    return replace(
        found,
        judged={"gold": np.array([[1.0, 0.0], [1.0, 1.0]])},
        judge_reference={"gold": np.array([1.0, 1.0])},
        evaluated={"help": np.array([[5.0, 5.0], [0.0, 0.0]])},
        evaluator_reference={"help": np.array([4.0, 4.0])},
    )


def made(step: int, optimised: float, apart: float = 0.5, kl: float = 1.0) -> Point:
    rates = {OPTIMISED: {"a": 0.9, "joint": optimised}, APART: {"a": 0.5, "joint": apart}}
    ends = {judge: dict.fromkeys(of, (0.0, 1.0)) for judge, of in rates.items()}
    return Point(step, rates, ends, kl, 0.1, {"length": 10.0 + step, "lists": 0.25}, 4, 2)


def test_a_point_has_the_rates_of_every_judge_kl_and_counters():
    found = point(7, samples(), Lexicon())
    assert (found.step, found.prompts, found.samples) == (7, 2, 2)
    assert found.win_rate == {
        OPTIMISED: {"help": 0.75, "safe": 0.5, "joint": 0.25},
        OWN: {"gold": 0.75, "joint": 0.75},
        APART: {"help": 0.5, "joint": 0.5},
    }
    assert (found.kl, found.kl_standard_error) == (2.5, 1.0)
    assert found.hacking["repeated_sentence"] == 0.25
    assert found.hacking["refusals"] == 0.25
    assert found.hacking["length"] == (2 + 4 + 1 + 2) / 4
    assert found.hacking["unfinished"] == 0


def test_intervals_are_by_clusters():
    """Prompts that all win or all lose: the share among n prompts is binomial, and its ends those of its quantiles.
    Of one topic nothing is known."""
    rewards = np.repeat([[0.0], [1.0]], 50, axis=0)
    low, high = point(1, policy({"a": rewards}, {"a": np.ones(100)}), Lexicon()).win_rate_ci[OPTIMISED][
        "joint"
    ]
    assert low == pytest.approx(0.40, abs=0.015)
    assert high == pytest.approx(0.60, abs=0.015)
    alone = policy({"a": rewards}, {"a": np.ones(100)}, meta=[{"topic": "tea"}] * 100)
    assert point(1, alone, Lexicon()).win_rate_ci[OPTIMISED]["a"] == (0.0, 1.0)


def test_judges_that_are_the_reward_models_are_told_once():
    assert list(point(1, policy({"a": [[1.0]]}, {"a": [0.0]}), Lexicon()).win_rate) == [OPTIMISED]
    bare = replace(policy({"a": [[1.0]]}, {"a": [0.0]}), judged={}, judge_reference={})
    assert list(point(1, bare, Lexicon()).win_rate) == [OPTIMISED]


@pytest.mark.parametrize(
    "group", ["rewards", "reference", "judged", "judge_reference", "evaluated", "evaluator_reference"]
)
def test_what_is_not_finite_is_refused_whoever_said_it(group):
    whole = samples()
    name, values = next(iter(getattr(whole, group).items()))
    bad = np.array(values, np.float64)
    bad[1] = np.inf
    with pytest.raises(
        ValueError, match=rf"{name}: .* not finite for the policy of step 3 on prompt 1: 'prompt 1'"
    ):
        point(3, replace(whole, **{group: {**getattr(whole, group), name: bad}}), Lexicon())


def test_a_log_ratio_that_is_not_finite_is_refused():
    with pytest.raises(ValueError, match="not finite on prompt 1, at step 3"):
        point(3, replace(samples(), log_ratio=np.array([[0.0, 0.0], [0.0, np.inf]])), Lexicon())


def test_due_after_each_interval_and_at_the_end():
    assert [s for s in range(1, 8) if due(s, 7, 3)] == [3, 6, 7]
    assert not any(due(s, 7, None) for s in range(1, 8))


@pytest.mark.parametrize(
    ("max_kl", "step"),
    [(None, 30), (5.0, 30), (4.0, 30), (3.9, 10), (1.0, 10), (0.5, 10)],
)
def test_the_best_is_the_highest_within_the_bound_and_the_earlier_of_equals(max_kl, step):
    points = [made(10, 0.4, kl=1.0), made(20, 0.4, kl=2.0), made(30, 0.5, kl=4.0), made(40, 0.5, kl=4.0)]
    assert best(points, max_kl) == step


@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=8),
    st.none() | st.integers(-1, 5),
)
def test_no_point_beats_the_best(rows, max_kl):
    points = [made(i + 1, rate / 4, kl=kl) for i, (rate, kl) in enumerate(rows)]
    chosen = next(p for p in points if p.step == best(points, max_kl))
    within = [p for p in points if max_kl is None or p.kl <= max_kl]
    for other in within:
        assert chosen in within
        assert (other.joint(OPTIMISED), -other.step) <= (chosen.joint(OPTIMISED), -chosen.step)
    if not within:
        assert chosen.kl == min(p.kl for p in points)


def test_the_choice_says_why_and_never_is_the_base_policy():
    points = [made(0, 0.9, kl=0.0), made(10, 0.4, kl=1.0), made(20, 0.5, kl=4.0)]
    found = {
        ("best", None): (
            20,
            "step 20, the best of 2 evaluated: joint win rate by the reward models 50 % at KL 4.00",
        ),
        ("best", 1.0): (
            10,
            "step 10, the best of 1 evaluated with a KL of at most evaluate.max_kl=1: joint win rate by the reward "
            "models 40 % at KL 1.00",
        ),
        ("best", 0.5): (
            10,
            "step 10: none of 2 evaluated has a KL of at most evaluate.max_kl=0.5, and this one has the least: joint "
            "win rate by the reward models 40 % at KL 1.00",
        ),
        ("last", None): (20, "step 20, the last: evaluate.policy=last"),
    }
    for (kept, max_kl), (step, why) in found.items():
        choice = choose(points, kept, max_kl)
        assert (choice.step, choice.why.replace("\u00a0", " ")) == (step, why)


@pytest.mark.parametrize(
    ("optimised", "apart", "patience", "stops"),
    [
        ([1, 2, 3], [3, 2, 1], 2, True),
        ([1, 2, 3], [3, 2, 1], 3, False),  # too few
        ([1, 2, 3], [3, 2, 1], None, False),
        ([1, 2, 3], [3, 2, 2], 2, False),  # the evaluators' did not fall at the last
        ([1, 2, 3], [3, 1, 2], 1, False),
        ([3, 2, 1], [3, 2, 1], 2, False),  # both fell: no over-optimisation
        ([1, 1, 1], [3, 2, 1], 2, False),
        ([1, 3, 2], [3, 2, 1], 2, True),  # rose over them
        ([1, 3, 2], [3, 2, 1], 1, False),
        ([9, 1, 2], [1, 2, 1], 1, True),  # only the last ones count
    ],
)
def test_training_ends_when_evaluators_fall_while_reward_models_rise(optimised, apart, patience, stops):
    pairs = enumerate(zip(optimised, apart, strict=True), 1)
    reason = should_stop([made(10 * i, o / 10, a / 10) for i, (o, a) in pairs], patience)
    assert (reason is not None) == stops
    if reason is not None:
        assert f"after step 30: over {patience} evaluations" in reason
        assert f"evaluate.patience={patience}" in reason


def test_points_survive_a_round_trip(tmp_path):
    points = [point(s, samples(), Lexicon()) for s in (5, 10)]
    write_points(tmp_path / "e.jsonl", points)
    assert read_points(tmp_path / "e.jsonl") == points
    assert len((tmp_path / "e.jsonl").read_text().splitlines()) == 2
    assert read_points(tmp_path / "none.jsonl") == []


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["evaluate.every=0"], "evaluate.every=0 must be above 0"),
        (["evaluate.during_samples=0"], "evaluate.during_samples=0 must be above 0"),
        (["evaluate.every=5", "evaluate.policy=first"], "evaluate.policy=first is not one of best, last"),
        (["evaluate.max_kl=5"], "evaluate.max_kl=5.0 needs evaluate.every"),
        (["evaluate.patience=2"], "evaluate.patience=2 needs evaluate.every"),
        (["evaluate.every=5", "evaluate.patience=2"], "evaluate.patience=2 needs evaluators"),
        (
            ["evaluate.every=5", "evaluate.max_kl=5", "evaluate.policy=last"],
            "evaluate.max_kl=5.0 has no effect with evaluate.policy=last",
        ),
    ],
)
def test_keys_that_cannot_work_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        config(*overrides)


def test_keys_that_work_are_taken():
    found = config(
        "evaluators=microcosm", "evaluate.every=5", "evaluate.patience=2", "evaluate.max_kl=5"
    ).evaluate
    assert (found.every, found.patience, found.max_kl, found.policy) == (5, 2, 5.0, "best")


def test_the_report_draws_the_curve_and_marks_the_choice(tmp_path):
    points = (made(0, 0.1, kl=0.0), made(10, 0.4), made(20, 0.3))
    run = replace(
        record(), points=points, choice=Choice(10, "step 10 <is best>"), stopped="stopped early & so on"
    )
    text = page(run, tmp_path / "with")
    assert "The policy while it was trained" in text
    assert "step 10 &lt;is best&gt;" in text
    assert "Training stopped early &amp; so on." in text
    assert "4 × 2 responses at each of these steps" in text
    titles = [p.title for p in evaluation_curves(points, 10)]
    assert titles == ["Joint win rate", "KL from the base policy", "Signs of hacking", "Mean length"]
    assert all(f"<figcaption>{title}</figcaption>" in text for title in titles)
    assert "stroke-dasharray" in evaluation_curves(points, 10)[0].svg
    assert "stroke-dasharray" not in evaluation_curves(points, None)[0].svg
    found = json.loads((tmp_path / "with" / "summary.json").read_text())
    assert [p["win_rate"][OPTIMISED]["joint"] for p in found["evaluations"]] == [0.1, 0.4, 0.3]
    assert (found["chosen_step"], found["stopped_early"]) == (10, "stopped early & so on")


def test_without_points_the_report_is_as_ever(tmp_path):
    write_report(record(), tmp_path)
    assert "while it was trained" not in (tmp_path / "report.html").read_text()
    found = json.loads((tmp_path / "summary.json").read_text())
    assert (found["evaluations"], found["chosen_step"], found["stopped_early"]) == ([], None, "")
