"""Standard errors of a prompt's reference reward, from the same m samples that the reference comes from.

Normal theory for the mean and for the gaussian quantile. The empirical quantile has an error of its own design,
`quantile_error`: a linear combination of the order statistics around the quantile, which measures the slope of
the quantile function there, scaled so that its expectation is the quantile's true standard deviation if the samples
are normal. The true value and the expectation are integrals over normal order statistics, done once for each
(m, level). So it has no small-sample bias on normal rewards, whereas the bootstrap variance of an order statistic
(Maritz & Jarrett 1978; Hutson & Ernst 2000) is off by -29 % to +7 % for m from 4 to 128 on normal ones already.
Ratio of the mean estimate to the true standard deviation, levels 0.5, 0.85 and 0.9, m in {10, 16, 32, 64, 128}:
normal 1.00; exponential, mirrored exponential, Gumbel, lognormal, t(5), uniform 0.91 to 1.09; worst seen 1.20 (a
reward that is almost flat above its median, m = 10, level 0.9). With m = 2 to 5 skewed rewards give 0.67 to 1.61.
The estimate of a single prompt scatters, by 48 % at m = 10 and 30 % at m = 64 for level 0.9.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

STEP = 1 / 64  # of the grid on which integrals over a normal variable are taken
EDGE = 10.0


def mean_error(std: np.ndarray, count: int) -> np.ndarray:
    """Of the mean of `count` samples, std / sqrt(count); NaN for a single sample. std: float64 [G], unbiased."""
    return std / math.sqrt(count) if count > 1 else np.full(std.shape, np.nan)


def gaussian_error(std: np.ndarray, count: int, z: float) -> np.ndarray:
    """Of mean + z * std of `count` normal samples: sigma * sqrt(1/m + z^2 (1 - c4^2)), with sigma = std / c4.

    Its expectation is exact for normal samples. NaN for a single sample. std: float64 [G], with divisor m - 1.
    """
    if count < 2:
        return np.full(std.shape, np.nan)
    c4 = unbiasing(count)
    return std / c4 * math.sqrt(1 / count + z * z * (1 - c4 * c4))


def unbiasing(count: int) -> float:
    """c4: the expected sample standard deviation of `count` normal samples of unit variance."""
    if count > 10_000:  # where the logarithms of gamma lose more digits than the expansion
        return 1 - 1 / (4 * count) - 7 / (32 * count**2)
    return math.sqrt(2 / (count - 1)) * math.exp(math.lgamma(count / 2) - math.lgamma((count - 1) / 2))


def quantile_error(ascending: np.ndarray, level: float) -> np.ndarray:
    """Of the `level` quantile as numpy interpolates it, float64 [G]; NaN for a single sample.

    With two or three samples it is their spread scaled as if they were normal: nothing else is known.

    Args:
        ascending: float64 [G, m], the samples of G prompts in ascending order.
    """
    count = ascending.shape[1]
    if count < 2:
        return np.full(len(ascending), np.nan)
    return ascending @ spread_weights(count, level)


@lru_cache(maxsize=4096)
def spread_weights(count: int, level: float) -> np.ndarray:
    """Weights of the `count` >= 2 order statistics that make the standard error of the quantile, float64 [m].

    They are the difference of two smoothed quantiles, half a standard deviation of the quantile's rank above and
    below it, each the bootstrap expectation of an (interpolated) order statistic.
    """
    position = level * (count - 1) + 1
    reach = 0.5 * math.sqrt(count * level * (1 - level))
    upper, lower = min(position + reach, count), max(position - reach, 1.0)
    weights = _smoothed(count, upper) - _smoothed(count, lower)
    weights *= normal_quantile_std(count, level) / float(weights @ normal_order_means(count))
    weights.flags.writeable = False
    return weights


def _smoothed(count: int, rank: float) -> np.ndarray:
    """Bootstrap expectation of the order statistic of this rank (from 1, interpolated), as weights, float64 [m]."""
    below = min(int(rank), count - 1)
    tails = [_at_least(count, k) for k in (below, below + 1)]
    return (below + 1 - rank) * np.diff(tails[0]) + (rank - below) * np.diff(tails[1])


def _at_least(count: int, successes: int) -> np.ndarray:
    """P(Binomial(m, i/m) >= successes) for i = 0..m, float64 [m + 1]: that the order statistic is among the first i."""
    share = np.arange(1, count) / count
    tail = np.zeros(count - 1)
    for k in range(successes, count + 1):
        tail += np.exp(_log_choose(count, k) + k * np.log(share) + (count - k) * np.log1p(-share))
    return np.concatenate([[0.0], np.minimum(tail, 1.0), [1.0]])


def _log_choose(count: int, k: int) -> float:
    return math.lgamma(count + 1) - math.lgamma(k + 1) - math.lgamma(count - k + 1)


@lru_cache(maxsize=1)
def _grid() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """z, and the normal's log density, log of what lies below, log of what lies above; float64 [N] each."""
    z = np.arange(-EDGE, EDGE + STEP / 2, STEP)
    below = np.log([0.5 * math.erfc(-v / math.sqrt(2)) for v in z])
    return z, -0.5 * z * z - 0.5 * math.log(2 * math.pi), below, below[::-1]


def _order_density(count: int, rank: int) -> np.ndarray:
    """Density on the grid of the order statistic of this rank (from 1) among normal samples, float64 [N]."""
    _, density, below, above = _grid()
    log_factor = math.log(rank) + _log_choose(count, rank)
    return np.exp(log_factor + (rank - 1) * below + (count - rank) * above + density)


@lru_cache(maxsize=4096)
def normal_order_means(count: int) -> np.ndarray:
    """Expectations of the order statistics of `count` standard normal samples, float64 [m], ascending."""
    z = _grid()[0]
    return np.array([STEP * float(z @ _order_density(count, rank)) for rank in range(1, count + 1)])


def normal_quantile_std(count: int, level: float) -> float:
    """Standard deviation of the interpolated `level` quantile of `count` >= 2 standard normal samples.

    The quantile is Y - (1 - f) D, with Y the order statistic above it, D the gap to the one below and f where it
    lies in the gap. Given Y = y, the k lower samples are independent normals below y, whose greatest is y - D.
    """
    position = level * (count - 1) + 1
    rank = min(int(position), count - 1)
    share = rank + 1 - position
    upper = STEP * _order_density(count, rank + 1)
    gap, square_gap = _gaps(rank)
    y = _grid()[0] - float(_grid()[0] @ upper)
    centred = gap - float(gap @ upper)
    variance_of_gap = float(square_gap @ upper) - float(gap @ upper) ** 2
    variance = (y * y) @ upper - 2 * share * (y * centred) @ upper + share**2 * variance_of_gap
    return math.sqrt(float(variance))


def _gaps(rank: int) -> tuple[np.ndarray, np.ndarray]:
    """E[D] and E[D^2] on the grid, of D = y - the greatest of `rank` normals below y; float64 [N] each.

    E[D] is the integral over x < y of w(x) / w(y) with w = Phi^rank, and E[D^2] that of 2 (y - x) w(x) / w(y):
    both carried from one grid point to the next, with w exponential between them.
    """
    steps = rank * np.diff(_grid()[2])  # of the exponent, all above 0 up to z = 8
    kept = np.exp(-steps)
    small = steps < 1e-3  # there the integrals over a cell are those of their series
    divisor = np.where(small, 1.0, steps)
    cells = STEP * np.where(small, 1 - steps / 2, (1 - kept) / divisor)
    square_cells = STEP**2 * np.where(small, 0.5 - steps / 3, (1 - kept * (1 + steps)) / divisor**2)
    first, second = [STEP / float(steps[0])], [(STEP / float(steps[0])) ** 2]
    for keep, cell, square_cell in zip(kept.tolist(), cells.tolist(), square_cells.tolist(), strict=True):
        second.append(keep * (second[-1] + STEP * first[-1]) + square_cell)
        first.append(keep * first[-1] + cell)
    return np.array(first), 2 * np.array(second)
