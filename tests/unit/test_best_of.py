"""Best-of-n against brute force over all subsets, and against closed forms."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from scipy import integrate, stats

from rlhf.evaluate.best_of import best_of, best_of_kl, chosen
from rlhf.evaluate.cells import best_of_figures
from rlhf.evaluate.samples import PolicySamples
from tests.unit.test_evaluate_samples import policy


def winners(utility: np.ndarray, subset: tuple[int, ...]) -> list[int]:
    top = max(utility[i] for i in subset)
    return [i for i in subset if utility[i] == top]


def small(seed: int) -> tuple[PolicySamples, np.ndarray]:
    """Three prompts, six samples, scores and utilities with many ties."""
    rng = np.random.default_rng(seed)
    judged = {name: rng.integers(0, 4, (3, 6)) for name in ("a", "b")}
    return policy(judged, {"a": [1, 2, 2], "b": [1, 1, 3]}), rng.integers(0, 4, (3, 6)).astype(float)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("n", [1, 2, 3, 5, 6])
def test_all_subsets_by_brute_force(seed: int, n: int) -> None:
    base, utility = small(seed)
    weights = np.zeros((3, 6))
    subsets = list(combinations(range(6), n))
    versus: dict[str, list[float]] = {"a": [], "b": [], "joint": []}
    for p in range(3):
        for subset in subsets:
            best = winners(utility[p], subset)
            weights[p, best] += 1 / len(best) / len(subsets)
            for j in set(range(6)) - set(subset):
                signs = {k: np.sign(s[p, best] - s[p, j]) for k, s in base.judged.items()}
                both = np.stack(list(signs.values()))
                won = (both >= 0).all(axis=0) & (both > 0).any(axis=0)
                lost = (both <= 0).all(axis=0) & (both < 0).any(axis=0)
                signs["joint"] = won.astype(float) - lost
                for name, sign in signs.items():
                    versus[name].append(0.5 + 0.5 * float(sign.mean()))
    assert chosen(utility, n) == pytest.approx(weights, abs=1e-12)
    (found,) = best_of(base, utility, [n])
    wins = {k: s >= base.judge_reference[k][:, None] for k, s in base.judged.items()}
    wins["joint"] = wins["a"] & wins["b"]
    assert found.win_rate == pytest.approx({k: (weights * w).sum(1).mean() for k, w in wins.items()})
    assert found.judged == pytest.approx({k: (weights * s).sum(1).mean() for k, s in base.judged.items()})
    truth = {name: np.mean(rates) for name, rates in versus.items()} if n < 6 else {}
    assert found.versus == pytest.approx(truth)


def test_one_of_one_is_the_base_policy_and_equal_utilities_choose_evenly() -> None:
    base, utility = small(0)
    (found,) = best_of(base, utility, [1])
    assert found.kl == 0
    assert found.judged == pytest.approx({k: s.mean() for k, s in base.judged.items()})
    assert found.versus == pytest.approx(dict.fromkeys(("a", "b", "joint"), 0.5))
    assert chosen(np.zeros((2, 5)), 3) == pytest.approx(np.full((2, 5), 0.2))


def test_best_by_the_judged_score_itself_has_the_closed_form() -> None:
    """Best of n beats a 1 - q quantile with 1 - (1 - q)^n, and another sample with n / (n + 1)."""
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(400, 64))
    base = policy({"a": scores}, {"a": np.full(400, stats.norm.ppf(0.85))})
    for found in best_of(base, base.judged["a"], [1, 4, 16]):
        assert found.win_rate["a"] == pytest.approx(1 - 0.85**found.n, abs=0.02)
        assert found.versus["a"] == pytest.approx(found.n / (found.n + 1), abs=1e-9)


@pytest.mark.parametrize("n", [2, 8, 64])
def test_kl_is_that_of_the_largest_of_n_uniform_variables(n: int) -> None:
    """Its density is n u^(n-1) on (0, 1)."""
    truth, _ = integrate.quad(lambda u: n * u ** (n - 1) * (np.log(n) + (n - 1) * np.log(u)), 0, 1)
    assert best_of_kl(n) == pytest.approx(truth, rel=1e-6)


def test_kl_is_a_bound_when_responses_are_few() -> None:
    """A policy of three responses: the exact KL of best-of-n, by its distribution, is below the formula."""
    probability = np.array([0.5, 0.3, 0.2])  # in increasing utility
    for n in (2, 4, 16):
        below = np.concatenate([[0], np.cumsum(probability)]) ** n
        best = np.diff(below)
        assert (best * np.log(best / probability)).sum() < best_of_kl(n)


def test_cells_of_best_of_n_carry_both_judges_and_start_at_the_base_policy() -> None:
    base, utility = small(1)
    base = replace(
        base, evaluated={"a": -base.judged["a"]}, evaluator_reference={"a": np.zeros(3, np.float32)}
    )
    one, three = best_of_figures(base, utility, [1, 3], seed=4)
    assert (one.arm, one.point, three.point, three.seed) == ("best_of_n", 0, 1, 4)
    assert three.kl == pytest.approx(np.log(3) - 2 / 3)
    assert {k: one.values[k] for k in one.values} == pytest.approx({k: one.base[k] for k in one.values})
    (gold,) = best_of(base, utility, [3])
    assert three.values["win/gold/joint"] == gold.win_rate["joint"]
    assert three.values["score/evaluator/a"] == pytest.approx(-three.values["score/gold/a"])


def test_what_cannot_be_chosen_from_is_refused() -> None:
    base, utility = small(0)
    with pytest.raises(ValueError, match="n = 7 of 6 base samples"):
        best_of(base, utility, [7])
    with pytest.raises(ValueError, match=r"utility is \(3, 5\), the base samples are \(3, 6\)"):
        best_of(base, utility[:, :5], [2])
    with pytest.raises(ValueError, match="not finite"):
        best_of(base, np.full((3, 6), np.nan), [2])
