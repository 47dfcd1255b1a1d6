"""Win rates against loops, intervals against closed forms."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from rlhf.evaluate.samples import PolicySamples
from rlhf.evaluate.wins import bootstrap, cluster_index, mean_and_error, win_rates
from tests.unit.test_evaluate_samples import policy


def random_pair(seed: int) -> tuple[PolicySamples, PolicySamples]:
    """Small integer scores, so that ties with the reference and with each other are common."""
    rng = np.random.default_rng(seed)
    p, m, n = rng.integers(2, 6), rng.integers(1, 5), rng.integers(1, 5)
    names = ["a", "b", "c"][: rng.integers(1, 4)]
    reference = {name: rng.integers(-1, 2, p) for name in names}
    base = policy({name: rng.integers(-2, 3, (p, m)) for name in names}, reference)
    return base, policy({name: rng.integers(-2, 3, (p, n)) for name in names}, reference)


def looped_rate(samples: PolicySamples, names: list[str]) -> float:
    won, total = 0, 0
    for p in range(len(samples.prompts)):
        for i in range(samples.lengths.shape[1]):
            won += all(samples.judged[n][p][i] >= samples.judge_reference[n][p] for n in names)
            total += 1
    return won / total


def looped_versus(base: PolicySamples, aligned: PolicySamples, names: list[str]) -> float:
    points: list[float] = []
    for p in range(len(aligned.prompts)):
        pairs = itertools.product(range(aligned.lengths.shape[1]), range(base.lengths.shape[1]))
        for i, j in pairs:
            differences = [float(aligned.judged[n][p][i] - base.judged[n][p][j]) for n in names]
            better, worse = any(d > 0 for d in differences), any(d < 0 for d in differences)
            points.append(0.5 if better == worse else float(better))
    return sum(points) / len(points)


@given(st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_rates_are_those_of_plain_loops(seed: int) -> None:
    base, aligned = random_pair(seed)
    found = win_rates(base, aligned)
    names = list(aligned.judged)
    for name, of in {**{n: [n] for n in names}, "joint": names}.items():
        assert found["win_rate"][name]["base"] == pytest.approx(looped_rate(base, of))
        assert found["win_rate"][name]["aligned"] == pytest.approx(looped_rate(aligned, of))
        assert found["win_vs_random"][name] == pytest.approx(looped_versus(base, aligned, of))
        for policy_name, rate in found["win_rate"][name].items():
            low, high = found["win_rate_ci"][name][policy_name]
            assert low - 1e-12 <= rate <= high + 1e-12


@given(st.integers(0, 2**32))
@settings(max_examples=20, deadline=None)
def test_a_policy_against_itself_is_even(seed: int) -> None:
    base, _ = random_pair(seed)
    found = win_rates(base, base)
    assert all(v == pytest.approx(0.5) for v in found["win_vs_random"].values())
    assert all(ci["change"] == (0, 0) for ci in found["win_rate_ci"].values())
    assert set(found["left_behind"].values()) == {0.0}


def test_reaching_the_reference_wins_and_ties_count_half() -> None:
    base = policy({"a": [[1.0, 3.0]], "b": [[0.0, 0.0]]}, {"a": [2], "b": [0]})
    aligned = policy({"a": [[2.0, 3.0]], "b": [[0.0, -1.0]]}, {"a": [2], "b": [0]})
    found = win_rates(base, aligned)
    assert found["win_rate"]["a"] == {"base": 0.5, "aligned": 1.0}
    assert found["win_rate"]["b"] == {"base": 1.0, "aligned": 0.5}
    assert found["win_rate"]["joint"] == {"base": 0.5, "aligned": 0.5}
    assert found["win_vs_random"] == {
        "a": (1 + 0 + 1 + 0.5) / 4,
        "b": (0.5 + 0.5 + 0 + 0) / 4,
        "joint": 0.375,
    }
    # jointly: (2, 0) beats (1, 0) and loses to (3, 0); (3, -1) is undecided against (1, 0), loses to (3, 0)


@pytest.mark.parametrize("wins", [40, 120, 200])
def test_interval_of_one_prompt_a_cluster_is_binomial(wins: int) -> None:
    """Resampling n clusters of which k won gives exactly Binomial(n, k / n) / n."""
    n = 400
    won = (np.arange(n) < wins).astype(float)[:, None]
    low, high = bootstrap(won, np.arange(n))
    assert low[0] == pytest.approx(stats.binom.ppf(0.025, n, wins / n) / n, abs=1.5 / n)
    assert high[0] == pytest.approx(stats.binom.ppf(0.975, n, wins / n) / n, abs=1.5 / n)


def test_topics_stand_or_fall_together() -> None:
    """Forty prompts of each of 25 topics, all won or all lost, know no more than 25 prompts do."""
    topics, of = 25, 40
    won = np.repeat(np.arange(topics) < 10, of).astype(float)[:, None]
    low, high = bootstrap(won, np.repeat(np.arange(topics), of))
    assert low[0] == pytest.approx(stats.binom.ppf(0.025, topics, 0.4) / topics, abs=0.02)
    assert high[0] == pytest.approx(stats.binom.ppf(0.975, topics, 0.4) / topics, abs=0.02)
    alone = bootstrap(won, np.arange(topics * of))
    assert (high - low)[0] > 4 * (alone[1] - alone[0])[0]


def test_clusters_of_unequal_size_weigh_by_their_prompts() -> None:
    """One won prompt and three lost ones: the four equally likely draws have means 1, 1/4, 1/4, 0."""
    low, high = bootstrap(np.array([[1.0], [0.0], [0.0], [0.0]]), np.array([0, 1, 1, 1]))
    assert (low[0], high[0]) == (0.0, 1.0)


def test_clusters_are_topics_only_when_every_prompt_has_one() -> None:
    def of(meta: list[dict[str, Any]]) -> tuple[list[int], str]:
        samples = policy({"a": np.zeros((3, 1))}, {"a": np.zeros(3)}, meta=meta)
        index, by = cluster_index(samples)
        return index.tolist(), by

    assert of([{"topic": "y"}, {"topic": "x"}, {"topic": "y"}]) == ([1, 0, 1], "topic")
    index, by = of([{"topic": "y"}, {}, {"topic": "y"}])
    assert (sorted(index), by) == ([0, 1, 2], "prompt")


def test_one_cluster_tells_nothing_of_the_spread() -> None:
    samples = policy({"a": [[1.0]]}, {"a": [0]}, log_ratio=[[2.0]])
    found = win_rates(samples, samples)
    assert found["win_rate_ci"]["a"] == {"base": (0, 1), "aligned": (0, 1), "change": (-1, 1)}
    assert (found["kl"], found["kl_standard_error"]) == (2.0, 0.0)


def test_kl_of_known_log_ratios() -> None:
    ratios = np.array([[1.0, 3.0], [2.0, 6.0], [0.0, 0.0]])
    samples = policy({"a": np.zeros((3, 2))}, {"a": np.zeros(3)}, log_ratio=ratios)
    found = win_rates(samples, samples)
    assert found["kl"] == pytest.approx(2.0)
    assert found["kl_standard_error"] == pytest.approx(stats.sem([2.0, 4.0, 0.0]))


def test_standard_error_of_equal_clusters_is_that_of_their_means() -> None:
    values = np.random.default_rng(0).normal(size=(7, 5))
    mean, error = mean_and_error(values.ravel(), np.repeat(np.arange(7), 5))
    assert mean == pytest.approx(values.mean())
    assert error == pytest.approx(stats.sem(values.mean(axis=1)))


def test_left_behind_by_hand() -> None:
    base = policy({"a": [[1, 3], [0, 0], [5, 5], [1, 1]]}, {"a": [0] * 4})
    aligned = policy({"a": [[2, 1], [0, 0], [6, 4.5], [0, 3]]}, {"a": [0] * 4})
    found = win_rates(base, aligned)
    rows = found["per_prompt"]["a"]
    assert rows["difference"].tolist() == [-0.5, 0.0, 0.25, 0.5]
    assert rows["left_behind"].tolist() == [True, False, False, False]
    assert found["left_behind"] == {"a": 0.25}


def test_a_score_that_is_not_finite_is_refused_with_its_name() -> None:
    good = policy({"kind": [[0.0], [1.0]]}, {"kind": [0, 0]})
    bad = policy({"kind": [[0.0, 0.0], [np.nan, 0.0]]}, {"kind": [0, 0]})
    with pytest.raises(ValueError, match=r"kind.*aligned policy on prompt 1: 'prompt 1'"):
        win_rates(good, bad)
