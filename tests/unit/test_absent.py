"""Rewards that do not apply to a prompt: in the statistics, and in what is told of policies."""

from dataclasses import replace

import numpy as np
import pytest

from rlhf.evaluate.best_of import best_of
from rlhf.evaluate.curve import point
from rlhf.evaluate.examples import before_after, worst_prompts
from rlhf.evaluate.hacking import Lexicon
from rlhf.evaluate.measures import measure
from rlhf.evaluate.plots import distributions, improvement
from rlhf.evaluate.samples import PolicySamples
from rlhf.evaluate.wins import win_rates
from rlhf.utility.adaptive import AdaptiveSampling
from rlhf.utility.statistics import BaselineStatistics, ReferenceRule

IDS = np.array([1, 2, 3], np.uint64)
QUANTILE = ReferenceRule("quantile", 0.5, "empirical", 0.0)
CANNED = ReferenceRule("canned", 0.5, "empirical", 0.0)


def filled() -> BaselineStatistics:
    """Prompt 2 has four samples that the reward does not apply to, the others four rewards each."""
    found = BaselineStatistics()
    found.add_samples("rule", np.repeat(IDS[[0, 2]], 4), np.arange(8, dtype=np.float32), ("run", 0))
    found.add_absent("rule", np.repeat(IDS[1], 4), ("run", 0))
    return found


def test_a_prompt_it_does_not_apply_to_has_no_reference_and_no_error():
    found = filled().reference("rule", IDS, QUANTILE, points=4)
    np.testing.assert_array_equal(found.r_ref, np.array([1.5, np.nan, 5.5], np.float32))
    assert found.standard_error[1] == 0
    assert np.isnan(found.samples[1]).all()
    assert found.population_mean == 3.5


def test_its_samples_are_counted_so_that_no_more_are_taken():
    statistics = filled()
    assert statistics.counts("rule", IDS).tolist() == [4, 4, 4]
    assert statistics.known("rule", IDS).all()
    progress = AdaptiveSampling(tolerance=9.0, minimum=4, maximum=64).progress(
        statistics, {"rule": QUANTILE}, IDS
    )
    assert not progress.needs.any()
    assert progress.taken == 12


def test_they_are_kept_and_told_apart(tmp_path):
    statistics, path = filled(), tmp_path / "s.npz"
    digest = statistics.digest()
    statistics.freeze()
    statistics.save(path)
    again = BaselineStatistics.load(path)
    assert again.digest() == digest
    np.testing.assert_array_equal(again.absent("rule", IDS), [False, True, False])
    plain = BaselineStatistics()
    plain.add_samples("rule", np.repeat(IDS[[0, 2]], 4), np.arange(8, dtype=np.float32), ("run", 0))
    assert plain.digest() != digest
    merged = BaselineStatistics()
    merged.merge(again)
    assert merged.digest() == digest


def test_a_constant_needs_no_samples():
    rule = ReferenceRule("constant", 0.5, "empirical", 0.5)
    assert filled().reference("rule", IDS, rule).r_ref.tolist() == [0.5, 0.5, 0.5]


def test_an_item_counts_once():
    statistics = filled()
    assert not statistics.add_absent("rule", np.repeat(IDS[1], 4), ("run", 0))
    assert statistics.counts("rule", IDS).tolist() == [4, 4, 4]


def test_a_prompt_it_applies_to_in_part_is_refused():
    statistics = filled()
    statistics.add_samples("rule", IDS[1:2], np.ones(1, np.float32), ("run", 1))
    with pytest.raises(
        ValueError, match=r"reward model 'rule' says of some responses to prompt 2 that it does not"
    ):
        statistics.reference("rule", IDS, QUANTILE)


def test_canned_responses_are_not_asked_of_it():
    statistics = filled()
    statistics.add_canned("rule", IDS[[0, 2]], np.array([2.0, 3.0], np.float32), ("run", 0))
    np.testing.assert_array_equal(
        statistics.reference("rule", IDS, CANNED).r_ref, np.array([2.0, np.nan, 3.0], np.float32)
    )


NAN = np.nan


def samples(help_: list, safe: list, reference: tuple = (1.0, 0.0, NAN)) -> PolicySamples:
    """Three prompts; "safe" does not apply to the last one."""
    judged = {"help": np.array(help_, np.float32), "safe": np.array(safe, np.float32)}
    shape = judged["help"].shape
    bars = {"help": np.ones(3, np.float32), "safe": np.array([0.0, 0.0, NAN], np.float32)}
    texts = tuple(tuple(f"say {p} {n} ." for n in range(shape[1])) for p in range(3))
    return PolicySamples(
        ("a", "b", "c"), IDS, ({}, {}, {}), texts, np.ones(shape, np.int32), np.ones(shape, bool),
        judged, bars, judged, bars, np.zeros(shape, np.float32),
    )  # fmt: skip


BASE = samples([[0, 1], [1, 2], [0, 1]], [[0, -1], [0, 0], [NAN, NAN]])
ALIGNED = samples([[1, 1], [0, 2], [1, 1]], [[0, 0], [-1, 0], [NAN, NAN]])


def test_win_rates_are_of_the_prompts_it_applies_to():
    found = win_rates(BASE, ALIGNED)
    assert found["win_rate"]["safe"] == {"base": 0.75, "aligned": 0.75}
    assert found["win_rate"]["help"] == {"base": 4 / 6, "aligned": 5 / 6}
    # jointly the third prompt wins by help alone
    assert found["win_rate"]["joint"]["aligned"] == pytest.approx((1 + 0.5 + 1) / 3)
    assert found["win_vs_random"]["safe"] == pytest.approx((0.75 + 0.25) / 2)
    assert found["left_behind"]["safe"] == 0.5
    assert np.isfinite(found["win_rate_ci"]["safe"]["change"]).all()


def test_without_the_prompt_a_property_is_what_it_is_with_it():
    two = {"prompts": ("a", "b"), "prompt_ids": IDS[:2], "meta": ({}, {})}

    def first(s: PolicySamples) -> PolicySamples:
        keyed = ("rewards", "reference", "judged", "judge_reference")
        cut = {k: {n: v[:2] for n, v in getattr(s, k).items()} for k in keyed}
        rows = {k: getattr(s, k)[:2] for k in ("texts", "lengths", "finished", "log_ratio")}
        return replace(s, **two, **cut, **rows)

    whole, part = win_rates(BASE, ALIGNED), win_rates(first(BASE), first(ALIGNED))
    for key in ("win_rate", "win_vs_random", "left_behind"):
        assert whole[key]["safe"] == part[key]["safe"]


def test_a_prompt_to_which_nothing_applies_wins_nothing():
    gone = samples([[0, 1], [1, 2], [NAN, NAN]], [[0, -1], [0, 0], [NAN, NAN]])
    found = win_rates(gone, gone)
    assert found["win_rate"]["joint"]["base"] == pytest.approx((0 + 1) / 2)


def test_a_property_that_applies_to_no_prompt_is_refused():
    gone = {"help": BASE.judged["help"], "safe": np.full((3, 2), NAN)}
    bars = {"help": BASE.judge_reference["help"], "safe": np.full(3, NAN)}
    none = replace(BASE, judged=gone, judge_reference=bars)
    with pytest.raises(ValueError, match="safe: it applies to none of the 3 evaluation prompts"):
        win_rates(none, none)


def test_everything_that_is_told_stays_finite():
    values, start = measure(BASE, ALIGNED, Lexicon())
    assert np.isfinite([*values.values(), *start.values()]).all()
    (chosen,) = best_of(BASE, np.array([[0.0, 2.0], [0.0, 1.0], [1.0, 0.0]]), [2])
    assert np.isfinite([*chosen.win_rate.values(), *chosen.judged.values()]).all()
    rates = point(3, ALIGNED, Lexicon()).win_rate["reward_models"]
    assert rates["safe"] == 0.75
    assert {w.prompt for w in worst_prompts(BASE, ALIGNED, win_rates(BASE, ALIGNED))} == {"b"}
    shown = {e.prompt: e for e in before_after(BASE, ALIGNED, each=3)}
    assert [name for name, *_ in shown["c"].aligned.scores] == ["help"]
    assert len(improvement(win_rates(BASE, ALIGNED))) == 2


def test_a_prompt_has_no_panel_of_what_does_not_apply():
    data = {
        name: {"prompts": ["a", "b", "c"], "samples": BASE.rewards[name], "r_ref": BASE.reference[name],
               "aligned": ALIGNED.rewards[name]}
        for name in ("help", "safe")
    }  # fmt: skip
    assert [[p.title for p in row] for row in distributions(data)] == [
        ["help", "safe"],
        ["help", "safe"],
        ["help"],
    ]
