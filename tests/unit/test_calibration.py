"""A reward model's unit: fitted temperatures against the truth that the pairs were drawn from."""

import math

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from rlhf.learn.tokenise import held_out_pairs
from rlhf.utility.calibration import BINS, calibrate, measure


def drawn(scale: float, pairs: int, seed: int, spread: float = 2.0) -> np.ndarray:
    """Margins r(chosen) - r(rejected) of a model that gives the true log-odds times `scale`."""
    rng = np.random.default_rng(seed)
    true = np.abs(rng.normal(0, spread, pairs))
    wrong = rng.random(pairs) < 1 / (1 + np.exp(true))
    return scale * np.where(wrong, -true, true)


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_the_temperature_is_the_scale_within_five_per_cent(scale):
    found = calibrate(drawn(scale, 20_000, seed=1))
    assert found.temperature == pytest.approx(scale, rel=0.05)
    assert abs(found.temperature - scale) < 4 * found.standard_error
    assert found.after.error < 0.015


def test_it_does_not_depend_on_the_unit():
    margins = drawn(1.0, 500, seed=2)
    one = calibrate(margins)
    for factor in (1e-3, 0.25, 40.0):
        other = calibrate(factor * margins)
        assert other.temperature == pytest.approx(factor * one.temperature, rel=1e-9)
        assert other.after.log_loss == pytest.approx(one.after.log_loss, rel=1e-9)
        assert other.before.accuracy == one.before.accuracy


def test_it_has_the_least_log_loss():
    margins = drawn(3.0, 800, seed=3)
    expected = minimize_scalar(
        lambda b: np.logaddexp(0, -b * margins).mean(),
        bounds=(1e-4, 10),
        method="bounded",
        options={"xatol": 1e-12},
    )
    found = calibrate(margins)
    assert found.temperature == pytest.approx(1 / expected.x, rel=1e-5)
    assert found.after.log_loss == pytest.approx(expected.fun, abs=1e-12)
    assert found.after.log_loss < found.before.log_loss


def test_its_standard_error_is_the_spread_over_samples():
    found = [calibrate(drawn(2.0, 400, seed)) for seed in range(400)]
    spread = np.std([c.temperature for c in found])
    assert np.mean([c.standard_error for c in found]) == pytest.approx(spread, rel=0.1)


def test_the_calibration_error_of_a_model_that_exaggerates_is_that_of_theory():
    """All pairs have the true log-odds 1; a model that says 3 is wrong by sigmoid(3) - sigmoid(1)."""
    rng = np.random.default_rng(4)
    margins = np.where(rng.random(200_000) < 1 / (1 + math.exp(-1)), 3.0, -3.0)
    found = calibrate(margins)
    sigmoid = [1 / (1 + math.exp(-x)) for x in (1, 3)]
    assert found.before.error == pytest.approx(sigmoid[1] - sigmoid[0], abs=5e-3)
    assert found.before.accuracy == pytest.approx(sigmoid[0], abs=3e-3)
    assert found.temperature == pytest.approx(3.0, rel=0.02)
    theory = -sigmoid[0] * math.log(sigmoid[0]) - (1 - sigmoid[0]) * math.log(1 - sigmoid[0])
    assert found.after.log_loss == pytest.approx(theory, abs=3e-3)


def test_reliability_has_bins_of_equally_many_pairs():
    fit = measure(drawn(1.0, 105, seed=5))
    assert [b.pairs for b in fit.reliability] == [11] * 5 + [10] * 5
    assert len(fit.reliability) == BINS
    assert measure(np.array([1.0, -1.0])).reliability[0].pairs == 1
    confident = [b.confidence for b in fit.reliability]
    assert confident == sorted(confident)


def test_ties_count_half():
    assert measure(np.array([0.0, 0.0, 1.0, -1.0])).accuracy == 0.5


@pytest.mark.parametrize(
    ("margins", "fault"),
    [
        ([1.0, 2.0, 0.5], "it has every pair in the right order"),
        ([-1.0, -2.0, 0.5], "on the whole it prefers the rejected"),
        ([0.0, 0.0], "on the whole"),
    ],
)
def test_pairs_that_tell_no_temperature(margins, fault):
    found = calibrate(np.array(margins))
    assert found.temperature is None
    assert found.fault.startswith(fault)
    assert found.before == found.after


def test_whole_prompts_are_held_out():
    ids = np.repeat(np.arange(40, dtype=np.uint64), np.random.default_rng(0).integers(1, 9, 40))
    apart = held_out_pairs("key", ids, 0.1, seed=3)
    assert 0.1 * len(ids) <= apart.sum() <= 0.1 * len(ids) + 9
    assert not set(ids[apart]) & set(ids[~apart])
    assert (apart == held_out_pairs("key", ids, 0.1, seed=3)).all()
    assert (apart != held_out_pairs("key", ids, 0.1, seed=4)).any()
    assert not held_out_pairs("key", ids, 0.0, seed=3).any()
    two = held_out_pairs("key", np.array([1, 1, 1, 2], np.uint64), 0.5, seed=0)
    assert 0 < two.sum() < 4
    with pytest.raises(ValueError, match=r"reward_models.a.held_out=0.1: all pairs are of one prompt"):
        held_out_pairs("reward_models.a", np.zeros(5, np.uint64), 0.1, seed=0)
