"""Did alignment help? Win rates, comparison with random base responses, KL, and who was left behind.

A response wins in a property when its judged score is at least `judge_reference` of its prompt; it wins
jointly when it wins in every property that applies to the prompt (the scores of others are NaN). Rates are means over
prompts of the share of their responses: of a property, over those that it applies to.

Intervals (95 %) are percentile bootstraps over clusters, drawn with a fixed seed: prompts with the same
`meta["topic"]` stand or fall together, so whole topics are drawn; without that column, prompts are. The
same draws serve the base and the aligned policy, so the interval of their difference is a paired one.
Below about ten clusters such an interval is too narrow; with one nothing is known and it is the whole range.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from rlhf.evaluate.samples import PolicySamples

JOINT = "joint"
RESAMPLES = 4000
SEED = 0
TAIL = 0.025  # probability outside the interval, on each side
_CHUNK = 250  # resamples held in memory at once


def win_rates(base: PolicySamples, aligned: PolicySamples) -> dict[str, Any]:
    """Everything measured on two policies' responses to the same prompts.

    Returns a dict (`name` runs over the properties and "joint"):
        properties          the judged properties, in order
        win_rate            name -> {"base", "aligned"}: share of responses that reach the reference
        win_rate_ci         name -> {"base", "aligned", "change"}: (low, high)
        win_vs_random       name -> share of pairs in which the aligned response beats a base response
        win_vs_random_ci    name -> (low, high)
        kl, kl_standard_error   nats a response: mean over prompts of the mean log-ratio
        left_behind         property -> share of prompts whose mean score fell
        per_prompt          property -> what `per_prompt` tells of it
        prompts, samples, clusters, cluster_by      what the numbers rest on

    Raises:
        ValueError: a judged score is not finite for some responses of a prompt, or a property applies to none; it names
            the property and the prompt.
    """
    _check(base, aligned)
    clusters, cluster_by = cluster_index(aligned)
    before, after, versus = prompt_wins(base), prompt_wins(aligned), prompt_versus(base, aligned)
    names = list(before)
    columns = [d[name] for d in (before, after, versus) for name in names]
    columns += [after[name] - before[name] for name in names]
    low, high = bootstrap(np.stack(columns, axis=1), clusters)
    intervals = np.stack([low, high], axis=1).reshape(4, len(names), 2)
    if clusters.max() == 0:
        intervals[:3], intervals[3] = (0.0, 1.0), (-1.0, 1.0)
    kl, kl_standard_error = mean_and_error(np.asarray(aligned.log_ratio, np.float64).mean(axis=1), clusters)
    table = per_prompt(base, aligned)
    kinds = ("base", "aligned", "random", "change")
    ci = {n: {k: _pair(intervals[i, j]) for i, k in enumerate(kinds)} for j, n in enumerate(names)}
    return {
        "properties": names[:-1],
        "win_rate": {n: {"base": mean(before[n]), "aligned": mean(after[n])} for n in names},
        "win_rate_ci": {n: {k: ci[n][k] for k in ("base", "aligned", "change")} for n in names},
        "win_vs_random": {n: mean(versus[n]) for n in names},
        "win_vs_random_ci": {n: ci[n]["random"] for n in names},
        "kl": kl,
        "kl_standard_error": kl_standard_error,
        "left_behind": {n: left_behind(row["difference"]) for n, row in table.items()},
        "per_prompt": table,
        "prompts": len(aligned.prompts),
        "samples": int(aligned.lengths.shape[1]),
        "clusters": int(clusters.max()) + 1,
        "cluster_by": cluster_by,
    }


def prompt_wins(samples: PolicySamples) -> dict[str, np.ndarray]:
    """Property (then "joint") -> float64 [P]: share of a prompt's responses that reach the reference; NaN where the
    property does not apply."""
    return {name: won.mean(axis=1) for name, won in response_wins(samples).items()}


def response_wins(samples: PolicySamples) -> dict[str, np.ndarray]:
    """Property (then "joint") -> float64 [P, n]: 1 where a response reaches the reference, else 0; NaN where the
    property does not apply."""
    wins = {n: s >= samples.judge_reference[n][:, None] for n, s in samples.judged.items()}
    applies = {n: ~np.isnan(s) for n, s in samples.judged.items()}
    joint = np.logical_and.reduce([won | ~applies[n] for n, won in wins.items()])
    some = np.logical_or.reduce(list(applies.values()))
    return {n: np.where(applies[n], won, np.nan) for n, won in wins.items()} | {
        JOINT: np.where(some, joint, np.nan)
    }


def prompt_versus(base: PolicySamples, aligned: PolicySamples) -> dict[str, np.ndarray]:
    """Property (then "joint") -> float64 [P]: chance that an aligned response beats a random base response.

    A tie counts half; where a property does not apply it is NaN, and ties jointly. Jointly a response beats another
    when it is worse in no property and better in one;
    equal pairs, and pairs where each is better in something, count half. So 0.5 always means "no better".
    All pairs are compared: nothing is drawn.
    """
    above, below = [], []
    for name, score in aligned.judged.items():
        mine, theirs = score[:, :, None], base.judged[name][:, None, :]
        above.append(mine > theirs)
        below.append(mine < theirs)
    some_above, some_below = np.logical_or.reduce(above), np.logical_or.reduce(below)
    above.append(some_above & ~some_below)
    below.append(some_below & ~some_above)
    names = [*aligned.judged, JOINT]
    rates = [0.5 + 0.5 * (a.mean((1, 2)) - b.mean((1, 2))) for a, b in zip(above, below, strict=True)]
    found = dict(zip(names, rates, strict=True))
    absent = {n: np.isnan(s).all(axis=1) for n, s in aligned.judged.items()}
    return found | {n: np.where(absent[n], np.nan, found[n]) for n in absent}


def per_prompt(base: PolicySamples, aligned: PolicySamples) -> dict[str, dict[str, np.ndarray]]:
    """Property -> of each prompt the mean judged score before and after, and whether it fell.

    {"base", "aligned", "difference": float64 [P], "left_behind": bool [P]}
    """
    table = {}
    for name in aligned.judged:
        before = np.asarray(base.judged[name], np.float64).mean(axis=1)
        after = np.asarray(aligned.judged[name], np.float64).mean(axis=1)
        table[name] = {
            "base": before,
            "aligned": after,
            "difference": after - before,
            "left_behind": after < before,
        }
    return table


def mean(values: np.ndarray) -> float:
    """Over the prompts that a property applies to."""
    return float(values[~np.isnan(values)].mean())


def left_behind(difference: np.ndarray) -> float:
    """Share of the prompts that a property applies to whose mean score fell."""
    return mean(np.where(np.isnan(difference), np.nan, difference < 0))


def cluster_index(samples: PolicySamples) -> tuple[np.ndarray, str]:
    """int [P], the cluster of each prompt (0, 1, ...), and what clusters are: "topic" or "prompt"."""
    if all("topic" in meta for meta in samples.meta):
        keys, by = [str(meta["topic"]) for meta in samples.meta], "topic"
    else:
        keys, by = [str(i) for i in samples.prompt_ids], "prompt"
    return np.unique(keys, return_inverse=True)[1], by


def bootstrap(values: np.ndarray, clusters: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """95 % percentile interval (low [K], high [K]) of the column means of values [P, K], by whole clusters. NaN is left
    out; a draw of nothing else too.

    >>> low, high = bootstrap(np.array([[0.0], [1.0]] * 50), np.arange(100))
    >>> bool(0.38 < low[0] < 0.42 and 0.58 < high[0] < 0.62)
    True
    """
    count = int(clusters.max()) + 1
    known = ~np.isnan(values)
    sizes, sums = np.zeros((2, count, values.shape[1]))
    np.add.at(sizes, clusters, known.astype(float))
    np.add.at(sums, clusters, np.where(known, values, 0.0))
    rng, means = np.random.default_rng(SEED), []
    for _ in range(RESAMPLES // _CHUNK):
        drawn = rng.multinomial(count, np.full(count, 1 / count), size=_CHUNK)
        with np.errstate(invalid="ignore"):
            means.append(drawn @ sums / (drawn @ sizes))
    low, high = np.nanquantile(np.concatenate(means), [TAIL, 1 - TAIL], axis=0)
    return low, high


def mean_and_error(values: np.ndarray, clusters: np.ndarray) -> tuple[float, float]:
    """Mean of values [P] and its standard error, robust to correlation within clusters.

    With one prompt a cluster it is the usual std / sqrt(P); with a single cluster it is unknown, told as 0.

    >>> mean_and_error(np.array([1.0, 3.0]), np.array([0, 1]))
    (2.0, 1.0)
    """
    count = int(clusters.max()) + 1
    mean = float(values.mean())
    if count == 1:
        return mean, 0.0
    totals = np.bincount(clusters, values - mean, minlength=count)
    return mean, float(np.sqrt(count / (count - 1) * (totals**2).sum()) / len(values))


def _pair(interval: np.ndarray) -> tuple[float, float]:
    return float(interval[0]), float(interval[1])


def _check(base: PolicySamples, aligned: PolicySamples) -> None:
    assert np.array_equal(base.prompt_ids, aligned.prompt_ids), "the policies answered different prompts"
    assert list(base.judged) == list(aligned.judged), (list(base.judged), list(aligned.judged))
    assert JOINT not in aligned.judged, f"'{JOINT}' is not a property"
    check_finite("base policy", base)
    check_finite("aligned policy", aligned)


def check_finite(policy: str, samples: PolicySamples) -> None:
    """
    Raises:
        ValueError: a judged score or its reference is not finite; it names property, policy and prompt. Where a
            property does not apply, its scores are NaN.
    """
    for name, scores in samples.judged.items():
        reference = samples.judge_reference[name]
        absent = np.isnan(scores).all(axis=1)
        if absent.all():
            raise ValueError(f"{name}: it applies to none of the {len(absent)} evaluation prompts")
        bad = np.flatnonzero(~(np.isfinite(scores).all(axis=1) & np.isfinite(reference) | absent))
        if len(bad):
            raise ValueError(
                f"{name}: a judged score or its reference is not finite for the {policy} on "
                f"prompt {bad[0]}: {str(samples.prompts[bad[0]])[:80]!r}"
            )
