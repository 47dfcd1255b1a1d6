"""Reference rewards, their standard errors and what else a column says of prompts, for many of them at once."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rlhf.utility.columns import Column
from rlhf.utility.errors import gaussian_error, mean_error, quantile_error
from rlhf.utility.rules import ReferenceRule
from rlhf.utility.sketch import GridSketch
from rlhf.utility.tables import CompactTable, chunks, find


@dataclass(frozen=True)
class Summary:
    """Of B prompts. NaN where a prompt has no rewards; the mean and its error for a rule that is not sampled."""

    counts: np.ndarray  # int64 [B]
    estimate: np.ndarray  # float64 [2, B]: r_ref and its standard error
    moments: np.ndarray  # float64 [4, B]: mean, unbiased std (0 of a single reward), least, greatest
    samples: np.ndarray  # float32 [B, K]

    @classmethod
    def unknown(cls, prompts: int, points: int) -> Summary:
        nan = np.full((6, prompts), np.nan)
        samples = np.full((prompts, points), np.nan, np.float32)
        return cls(np.zeros(prompts, np.int64), nan[:2], nan[2:], samples)


def summarise(column: Column, ids: np.ndarray, rule: ReferenceRule, points: int) -> Summary:
    """What the column says of these prompts, uint64 [B].

    A prompt with up to `points` rewards gives them all as its samples, one with more gives its quantiles at levels
    (i + 0.5) / points. Prompts of one count are done together: the work is O(B m), and the memory beside the
    result O(1) in B.
    """
    summary = Summary.unknown(len(ids), points)
    exact = column.exact_counts(ids)
    summary.counts[:] = exact
    for part in chunks(np.concatenate([[0], np.cumsum(exact)])):
        for count in np.unique(exact[part]).tolist():
            if count:
                places = part.start + np.flatnonzero(exact[part] == count)
                _exact(summary, column, ids, places, count, rule)
    for place in np.flatnonzero((exact == 0) & column.sketched(ids)).tolist():
        _sketched(summary, place, column.sketches[int(ids[place])], rule, column.exact)
    return summary


def _exact(
    summary: Summary, column: Column, ids: np.ndarray, places: np.ndarray, count: int, rule: ReferenceRule
) -> None:
    ascending = column.rewards(ids[places], count)
    if column.compact is None:
        mean = ascending.mean(1)
        std = np.sqrt(((ascending - mean[:, None]) ** 2).sum(1) / max(count - 1, 1))
        moments = np.stack([mean, std, ascending[:, 0], ascending[:, -1]])
    else:
        moments = column.compact.moments[:, find(column.compact, ids[places])[0]].astype(np.float64)
    summary.moments[:, places] = moments
    summary.estimate[:, places] = _estimate(ascending, moments, count, rule)
    if column.compact is not None and rule.level in column.compact.pinned and _empirical(rule):
        rows, _ = find(column.compact, ids[places])
        summary.estimate[0, places] = column.compact.pinned[rule.level][rows]
    points = summary.samples.shape[1]
    if count <= points:
        summary.samples[places, :count] = ascending
    elif points:
        levels = (np.arange(points) + 0.5) / points
        summary.samples[places] = np.stack([_interpolated(ascending, level) for level in levels], axis=1)


def _sketched(summary: Summary, place: int, sketch: GridSketch, rule: ReferenceRule, stand_ins: int) -> None:
    """A sketch is judged by quantiles that stand for its rewards; errors fall with the root of their number."""
    count = sketch.moments.count
    moments = np.array([sketch.moments.mean, sketch.moments.std, sketch.low, sketch.high])
    summary.counts[place], summary.moments[:, place] = count, moments
    if _empirical(rule):
        stand_ins = max(stand_ins, 64)
        ascending = sketch.quantiles((np.arange(stand_ins) + 0.5) / stand_ins)
        error = quantile_error(ascending[None], rule.level)[0] * (stand_ins / count) ** 0.5
        summary.estimate[:, place] = sketch.quantiles(np.array([rule.level]))[0], error
    else:
        summary.estimate[:, place] = _estimate(np.empty((1, 0)), moments[:, None], count, rule)[:, 0]
    points = summary.samples.shape[1]
    if points:
        levels = np.arange(count) / (count - 1) if count <= points else (np.arange(points) + 0.5) / points
        summary.samples[place, : len(levels)] = sketch.quantiles(levels)


def _estimate(ascending: np.ndarray, moments: np.ndarray, count: int, rule: ReferenceRule) -> np.ndarray:
    """r_ref and standard error, float64 [2, G], of G prompts of `count` rewards each."""
    mean, std = moments[:2]
    if _empirical(rule):
        return np.stack([_interpolated(ascending, rule.level), quantile_error(ascending, rule.level)])
    if rule.kind == "quantile":
        z = NormalDist().inv_cdf(rule.level)
        return np.stack([mean + z * std, gaussian_error(std, count, z)])
    return np.stack([mean, mean_error(std, count)])


def _empirical(rule: ReferenceRule) -> bool:
    return rule.kind == "quantile" and rule.estimator == "empirical"


def _interpolated(ascending: np.ndarray, level: float) -> np.ndarray:
    """The quantile as numpy interpolates it, float64 [G]."""
    position = level * (ascending.shape[1] - 1)
    below = int(position)
    low, high = ascending[:, below], ascending[:, min(below + 1, ascending.shape[1] - 1)]
    return low + (high - low) * (position - below)


def compacted(column: Column, rule: ReferenceRule) -> CompactTable:
    """The exact rewards of a column in a byte each; a rule of an empirical quantile is pinned."""
    table = column.table()
    summary = summarise(column, table.ids, rule, points=0)
    pinned = {rule.level: summary.estimate[0].astype(np.float32)} if _empirical(rule) else {}
    return CompactTable.of(table, summary.moments.astype(np.float32), pinned)
