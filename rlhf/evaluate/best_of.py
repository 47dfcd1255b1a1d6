"""Best-of-n sampling as a baseline: what choosing the best of n base responses by utility would have won.

Nothing is drawn. With N samples of a prompt, the expectation is taken over all subsets of n of them, each
equally likely; the best of a subset is its sample of highest utility, and among equals each is chosen with the
same chance. A sample with `lower` samples strictly below it and `upto` samples at most equal to it is then
chosen with probability [C(upto, n) - C(lower, n)] / C(N, n) / (upto - lower).

The KL of best-of-n to the base policy is log n - (n-1)/n nats: exact when no two responses have the same
utility and no single response has a noticeable probability (continuous utilities), an upper bound otherwise
(arXiv 2401.01879, theorem 1). Drawn at the bound, best-of-n never looks better than it is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.evaluate.samples import PolicySamples
from rlhf.evaluate.wins import JOINT, mean, response_wins


@dataclass(frozen=True)
class BestOf:
    """Expected figures of best-of-n; rates are means over prompts, as in `rlhf.evaluate.wins`.

    `versus` compares with a random base response that is not among the n; it is empty for n = N, where none is left.
    """

    n: int
    kl: float  # nats, log n - (n-1)/n
    win_rate: Mapping[str, float]  # property, then "joint": share that reach the reference
    versus: Mapping[str, float]  # property, then "joint": chance to beat a random base response, ties half
    judged: Mapping[str, float]  # property: mean judged score


def best_of(base: PolicySamples, utility: np.ndarray, ns: Sequence[int]) -> list[BestOf]:
    """Figures of best-of-n for each n of `ns`, judged by `base.judged`.

    utility: float [P, N], the combined utility of the base samples, by which the best is chosen.

    Raises:
        ValueError: the shape of utility is not that of the samples, a utility is not finite, or n is not in 1..N.
    """
    shape = base.log_ratio.shape
    if utility.shape != shape:
        raise ValueError(f"best_of: utility is {utility.shape}, the base samples are {shape}")
    if not np.isfinite(utility).all():
        raise ValueError("best_of: a utility is not finite; score the base samples again")
    wins = response_wins(base)
    found = []
    for n in ns:
        weights = chosen(utility, n)
        found.append(
            BestOf(
                n=n,
                kl=best_of_kl(n),
                win_rate={k: mean((weights * won).sum(axis=1)) for k, won in wins.items()},
                versus=_versus(base.judged, utility, n) if n < shape[1] else {},
                judged={k: mean((weights * s).sum(axis=1)) for k, s in base.judged.items()},
            )
        )
    return found


def best_of_kl(n: int) -> float:
    """log n - (n-1)/n, nats.

    >>> best_of_kl(1), round(best_of_kl(4), 4)
    (0.0, 0.6363)
    """
    return math.log(n) - (n - 1) / n


def chosen(utility: np.ndarray, n: int) -> np.ndarray:
    """float64 [P, N]: chance of each sample to be the best of a random subset of n; rows sum to 1.

    >>> chosen(np.array([[0.0, 2.0, 1.0]]), 2).round(3).tolist()
    [[0.0, 0.667, 0.333]]
    """
    table = _below(utility.shape[1], n)
    ordered = np.sort(utility, axis=1)
    lower = np.stack([np.searchsorted(o, u, "left") for o, u in zip(ordered, utility, strict=True)])
    upto = np.stack([np.searchsorted(o, u, "right") for o, u in zip(ordered, utility, strict=True)])
    return (table[upto] - table[lower]) / (upto - lower)


def _below(total: int, n: int) -> np.ndarray:
    """float64 [total + 1]: C(m, n) / C(total, n), the chance that a subset lies within m given samples."""
    if not 1 <= n <= total:
        raise ValueError(f"best_of: n = {n} of {total} base samples; n must be 1 to {total}")
    return np.array([math.comb(m, n) / math.comb(total, n) for m in range(total + 1)])


def _versus(judged: Mapping[str, np.ndarray], utility: np.ndarray, n: int) -> dict[str, float]:
    """Chance that the best of n beats another sample j, over all subsets and all j outside them."""
    rates: dict[str, list[float]] = {name: [] for name in (*judged, JOINT)}
    for p in range(len(utility)):
        weights = _chosen_without(utility[p], n)
        sign = {name: np.sign(s[p][:, None] - s[p][None, :]) for name, s in judged.items()}
        sign[JOINT] = _dominates(np.nan_to_num(np.stack(list(sign.values()))))
        for name, signs in sign.items():
            rates[name].append(float(0.5 + 0.5 * (weights * signs).sum(axis=0).mean()))
    return {name: mean(np.array(rate)) for name, rate in rates.items()}


def _dominates(signs: np.ndarray) -> np.ndarray:
    """[K, ...] signs by property -> 1 where never worse and once better, -1 the other way round, else 0."""
    above, below = (signs > 0).any(axis=0), (signs < 0).any(axis=0)
    return above.astype(float) * ~below - below.astype(float) * ~above


def _chosen_without(utility: np.ndarray, n: int) -> np.ndarray:
    """float64 [N, N]: chance that sample i is the best of n when sample j is set aside; columns sum to 1."""
    table = _below(len(utility) - 1, n)
    mine, other = utility[:, None], utility[None, :]
    lower = (other < mine).sum(axis=1, keepdims=True) - (other < mine)
    upto = (other <= mine).sum(axis=1, keepdims=True) - (other <= mine)
    share = (table[upto] - table[lower]) / np.maximum(upto - lower, 1)
    return np.where(np.eye(len(utility), dtype=bool), 0.0, share)
