"""Many rewards of a prompt: the sketch against exact quantiles, and its independence of order."""

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.utility.moments import Moments
from rlhf.utility.sketch import GridSketch
from rlhf.utility.statistics import BaselineStatistics, ReferenceRule

LEVELS = np.array([0.01, 0.25, 0.5, 0.85, 0.9, 0.99])
FLOATS = st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60)
QUANTILE = ReferenceRule("quantile", 0.85, "empirical", 0.0)


@given(FLOATS, st.integers(0, 60), st.integers(2, 12))
def test_equal_rewards_make_equal_sketches(values: list[float], cut: int, bins: int) -> None:
    rewards = np.array(values, np.float32) + np.float32(0)
    whole, merged, single = (GridSketch(bins) for _ in range(3))
    whole.add(rewards)
    for reward in rewards[::-1]:
        single.add(np.array([reward]))
    for part in (rewards[cut:], rewards[:cut]):
        if len(part):
            other = GridSketch(bins)
            other.add(part)
            merged.merge(other)
    assert whole.contents() == merged.contents() == single.contents()
    assert len(whole.edges) <= bins
    ranked = whole.quantiles(np.linspace(0, 1, 30))
    assert (np.diff(ranked) >= 0).all()
    errors = np.abs(ranked - np.quantile(rewards.astype(np.float64), np.linspace(0, 1, 30)))
    assert (errors <= whole.width * (1 + 1e-9) + 1e-7 * np.abs(ranked)).all()


@pytest.mark.parametrize("draw", ["normal", "lognormal", "laplace", "uniform"])
def test_quantiles_are_close_to_the_exact_ones(draw: str) -> None:
    rng = np.random.default_rng(1)
    rewards = (100 + getattr(rng, draw)(size=20_000)).astype(np.float32)
    sketch = GridSketch()
    for part in np.split(rewards, 40):
        sketch.add(part)
    exact = np.quantile(rewards.astype(np.float64), LEVELS)
    found = sketch.quantiles(LEVELS)
    assert np.abs(found - exact).max() < sketch.width
    assert np.abs(found - exact)[1:5].max() < 0.005 * rewards.std(), "far less than a standard error of 0.01"
    assert (sketch.low, sketch.high) == (rewards.min(), rewards.max())


def test_few_distinct_rewards_are_exact_and_an_outlier_widens_nothing() -> None:
    rng = np.random.default_rng(0)
    rewards = rng.choice(np.array([-1.5, 0.25, 3.0, 1e30], np.float32), 5000)
    sketch = GridSketch()
    sketch.add(rewards)
    np.testing.assert_array_equal(sketch.quantiles(LEVELS), np.quantile(rewards.astype(np.float64), LEVELS))
    plain, spoiled = GridSketch(), GridSketch()
    normal = rng.normal(size=5000).astype(np.float32)
    plain.add(normal)
    spoiled.add(np.append(normal, np.float32(1e9)))
    assert spoiled.width <= 2 * plain.width


@given(FLOATS)
def test_moments_have_no_rounding(values: list[float]) -> None:
    rewards, moments = np.array(values, np.float32), Moments()
    moments.add(rewards[::2])
    other = Moments()
    other.add(rewards[1::2])
    moments.merge(other)
    exact = [Fraction(float(value)) for value in rewards]
    mean = sum(exact) / len(exact)
    assert moments.mean == float(mean)
    if len(exact) > 1:
        variance = sum((value - mean) ** 2 for value in exact) / (len(exact) - 1)
        assert moments.std == pytest.approx(float(variance) ** 0.5, rel=1e-15)


def overfull(order: list[int], exact: int = 40, read: bool = False) -> tuple[BaselineStatistics, np.ndarray]:
    """Three prompts with 25, 300 and 41 rewards in ten items, in the order given."""
    rng = np.random.default_rng(3)
    prompts = rng.permutation(np.repeat(np.array([3, 7, 9], np.uint64), [25, 300, 41]))
    rewards = rng.normal(prompts, 1).astype(np.float32)
    statistics = BaselineStatistics(exact)
    for item in order:
        part = slice(item, None, 10)
        statistics.add_samples("m", prompts[part], rewards[part], item)
        if read:
            statistics.counts("m", np.array([3], np.uint64))
            statistics.digest()
    return statistics, np.stack([prompts.astype(np.float64), rewards.astype(np.float64)])


@given(st.permutations(range(10)), st.booleans())
def test_a_prompt_beyond_the_limit_does_not_depend_on_order_or_reads(order: list[int], read: bool) -> None:
    ids = np.array([9, 3, 7], np.uint64)
    one, (prompts, rewards) = overfull(list(range(10)))
    other, _ = overfull(order, read=read)
    assert one.digest() == other.digest()
    left, right = (s.reference("m", ids, QUANTILE, points=12) for s in (one, other))
    for name, value in vars(left).items():
        np.testing.assert_array_equal(value, vars(right)[name])
    for i, prompt in enumerate(ids):
        own = rewards[prompts == prompt]
        assert one.counts("m", ids)[i] == len(own)
        assert left.mean[i] == pytest.approx(own.mean(), rel=1e-6)
        assert left.std[i] == pytest.approx(own.std(ddof=1), rel=1e-6)
        assert (left.low[i], left.high[i]) == (own.min().astype(np.float32), own.max().astype(np.float32))
        assert left.r_ref[i] == pytest.approx(np.quantile(own, 0.85), abs=0.02)
        levels = (np.arange(12) + 0.5) / 12
        np.testing.assert_allclose(left.samples[i], np.quantile(own, levels), atol=0.05)
    assert left.population_mean == pytest.approx(rewards.mean(), rel=1e-12)


def test_sketches_are_saved_and_merged(tmp_path: Path) -> None:
    whole, _ = overfull(list(range(10)))
    one, _ = overfull([0, 2, 4, 6, 8])
    other, _ = overfull([1, 3, 5, 7, 9])
    one.save(tmp_path / "one.npz")
    loaded = BaselineStatistics.load(tmp_path / "one.npz")
    assert loaded.digest() == one.digest()
    loaded.merge(other)
    assert loaded.digest() == whole.digest()
    loaded.freeze()
    loaded.compact({"m": QUANTILE})
    ids = np.array([9, 3, 7], np.uint64)
    found, expected = (s.reference("m", ids, QUANTILE) for s in (loaded, whole))
    np.testing.assert_array_equal(found.r_ref, expected.r_ref)
    coarse = BaselineStatistics(exact=20)
    with pytest.raises(ValueError, match="40 rewards of a prompt are exact there and 20 here"):
        coarse.merge(whole)


def test_standard_errors_of_sketched_prompts_are_those_of_a_simulation() -> None:
    rng, ids = np.random.default_rng(5), np.arange(400, dtype=np.uint64)
    statistics = BaselineStatistics(exact=128)
    statistics.add_samples("m", np.repeat(ids, 400), rng.normal(size=400 * 400), 0)
    found = statistics.reference("m", ids, QUANTILE)
    true = np.std(np.quantile(rng.normal(size=(20_000, 400)), 0.85, axis=1))
    assert found.standard_error.mean() == pytest.approx(true, rel=0.05)
    assert found.r_ref.std() == pytest.approx(true, rel=0.12), "400 prompts: 3.5 % of noise"
