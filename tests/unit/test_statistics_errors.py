"""Standard errors of r_ref against simulation, and the integrals behind them against scipy and closed forms."""

import math
from statistics import NormalDist

import numpy as np
import pytest
from scipy import integrate, special
from scipy import stats as scipy_stats

from rlhf.utility.errors import (
    gaussian_error,
    normal_order_means,
    normal_quantile_std,
    quantile_error,
    spread_weights,
    unbiasing,
)
from rlhf.utility.statistics import BaselineStatistics, ReferenceRule

PROMPTS = 20_000
COUNTS = (10, 16, 32, 64, 128)
LEVELS = (0.5, 0.85, 0.9)


def simulated(draw: str, count: int, kind: str, level: float, estimator: str) -> float:
    """Mean standard error that the statistics report over the true standard deviation of r_ref."""
    rng = np.random.default_rng(count)
    draws = {
        "normal": rng.normal,
        "exponential": rng.exponential,
        "mirrored": lambda size: -rng.exponential(size=size),
        "gumbel": rng.gumbel,
        "uniform": rng.uniform,
    }
    ids = np.arange(PROMPTS, dtype=np.uint64)
    statistics = BaselineStatistics()
    scores = draws[draw](size=(PROMPTS, count))
    statistics.add_samples("m", np.repeat(ids, count), (3 * scores + 100).ravel(), 0)
    found = statistics.reference("m", ids, ReferenceRule(kind, level, estimator, 0.0))
    return float(found.standard_error.mean(dtype=np.float64) / found.r_ref.std(dtype=np.float64))


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("estimator", ["empirical", "gaussian"])
def test_quantile_errors_are_those_of_a_simulation(count: int, level: float, estimator: str) -> None:
    """The simulation itself is good to 0.5 %: the true deviation from 20 000 prompts."""
    assert simulated("normal", count, "quantile", level, estimator) == pytest.approx(1, abs=0.025)


@pytest.mark.parametrize("count", COUNTS)
def test_errors_of_the_mean_are_those_of_a_simulation(count: int) -> None:
    assert simulated("normal", count, "mean", 0.5, "empirical") == pytest.approx(1, abs=0.045)


@pytest.mark.parametrize("draw", ["exponential", "mirrored", "gumbel", "uniform"])
@pytest.mark.parametrize("count", [10, 64])
@pytest.mark.parametrize("level", LEVELS)
def test_empirical_errors_hold_for_other_rewards_too(draw: str, count: int, level: float) -> None:
    bound = 0.1 if count == 10 else 0.05
    assert simulated(draw, count, "quantile", level, "empirical") == pytest.approx(1, abs=bound)


@pytest.mark.parametrize("count", [2, 5, 17, 64])
def test_order_statistics_of_a_normal(count: int) -> None:
    """Means against numerical integration in u = Phi(z); Var of the greatest of two is 1 - 1 / pi."""
    for rank in {1, 2, count // 2 + 1, count}:
        beta = scipy_stats.beta(rank, count - rank + 1)
        expected, _ = integrate.quad(lambda u, b=beta: special.ndtri(u) * b.pdf(u), 0, 1, limit=500)
        assert normal_order_means(count)[rank - 1] == pytest.approx(expected, abs=1e-5)
    assert normal_order_means(count).sum() == pytest.approx(0, abs=1e-9)
    assert normal_quantile_std(2, 0.999999999) == pytest.approx(math.sqrt(1 - 1 / math.pi), abs=1e-5)
    assert normal_quantile_std(2, 0.5) == pytest.approx(math.sqrt(0.5), abs=1e-5), "the mean of two"


@pytest.mark.parametrize(("count", "level"), [(3, 0.6), (10, 0.85), (64, 0.9), (512, 0.85)])
def test_the_quantiles_spread_against_a_double_integral(count: int, level: float) -> None:
    """Over the joint density of two order statistics, with the lower one given the upper in closed form."""
    position = level * (count - 1)
    rank, share = int(position) + 1, position - int(position)
    nodes, weights = np.polynomial.legendre.leggauss(400)
    upper = special.ndtri(np.clip((nodes + 1) / 2, 1e-300, 1))  # u of the upper, uniform nodes
    density = scipy_stats.beta(rank + 1, count - rank).pdf((nodes + 1) / 2) * weights / 2
    inner = ((nodes + 1) / 2) ** (1 / rank)  # the greatest of `rank` uniforms is v^(1 / rank)
    lower = special.ndtri((nodes[:, None] + 1) / 2 * inner[None])
    values = (1 - share) * lower + share * upper[:, None]
    joint = density[:, None] * weights[None] / 2
    mean = (joint * values).sum()
    expected = math.sqrt((joint * (values - mean) ** 2).sum())
    assert normal_quantile_std(count, level) == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize("count", [2, 10, 10_000, 10_001, 100_000])
def test_unbiasing_is_the_ratio_of_gammas(count: int) -> None:
    import mpmath

    with mpmath.workdps(30):
        half = mpmath.mpf(count) / 2
        c4 = mpmath.sqrt(mpmath.mpf(2) / (count - 1)) * mpmath.gamma(half) / mpmath.gamma(half - 0.5)
        assert unbiasing(count) == pytest.approx(float(c4), abs=1e-10)
    z = NormalDist().inv_cdf(0.85)
    expected = 2 / float(c4) * math.sqrt(1 / count + z * z * float(1 - c4**2))
    assert gaussian_error(np.array([2.0]), count, z)[0] == pytest.approx(expected, rel=1e-6)


def test_errors_scale_and_do_not_shift() -> None:
    samples = np.sort(np.random.default_rng(0).normal(size=(4, 23)), axis=1)
    moved = quantile_error(5 * samples + 1000, 0.85)
    np.testing.assert_allclose(moved, 5 * quantile_error(samples, 0.85), rtol=1e-9)
    assert spread_weights(23, 0.85).sum() == pytest.approx(0, abs=1e-12)
    assert np.isnan(quantile_error(samples[:, :1], 0.85)).all()
