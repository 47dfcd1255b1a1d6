"""Compares arms, ways of transforming and combining rewards, at equal KL.

Each (arm, seed) gives for each metric a curve over KL: straight lines between its points, from the base policy
at KL 0 to the arm's largest KL, never beyond. Arms are compared seed by seed, each with the reference arm's run
of the same seed, and the differences (reference arm - other arm) are averaged over seeds with a 95 % t-interval.

The intervals tell of seeds (training and sampling), not of other evaluation prompts, which all cells share; and
they are not corrected for multiplicity: `comparisons` says how many were looked at.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.evaluate.cells import BEST_OF, Cell, CellFigures, best_of_figures, cell_figures
from rlhf.evaluate.equal_kl import Curve, common_range
from rlhf.evaluate.intervals import estimate

__all__ = ["BEST_OF", "Cell", "CellFigures", "best_of_figures", "cell_figures", "compare"]

AT = (1.0, 2.0, 4.0, 8.0)  # nats a response
GRID = 33  # KL values at which a curve of differences is told
BEST = ("win/gold/joint", "win/evaluator/joint", "versus/gold/joint", "versus/evaluator/joint")
Cells = Mapping[str, Mapping[int, Sequence[CellFigures]]]
"""Arm -> seed -> its cells, by point."""


def compare(
    figures: Sequence[CellFigures],
    reference_arm: str = "lsc",
    at: Sequence[float] = AT,
    expected: Iterable[tuple[str, int, int]] | None = None,
) -> dict[str, Any]:
    """What the arms buy at equal KL, as a JSON-able summary.

    `at`: KL values (nats) to compare at, where both arms cover them. `expected`: (arm, point, seed) of every cell
    of the study, to name what was not run; by default each arm's points times its seeds.

    Returns, with an estimate being {"mean", "low", "high", "n"} over n seeds (low and high None for one seed):
        reference_arm, arms, seeds          arms in order, the reference first; arm -> its seeds
        baselines, ablations                other arms; ablations are named after the reference ("lsc_...")
        metrics                             all metrics, in order; see `rlhf.evaluate.measures`
        cells, judge, prompts, seconds      counts, "own" or "reward_models", total of the cells
        incomplete                          [{"arm", "point", "seed", "why"}]
        base                                metric -> estimate at KL 0
        curves                              arm -> [{"point", "kl_coef", "kl", "metrics": metric -> estimate}]
        differences                         arm -> metric -> what `difference` tells
        best                                arm -> metric -> {"point", "kl", "value"}, the point of highest mean:
                                            chosen by the same figures, so a little too good
        at, comparisons, apart              KL values; intervals looked at, and how many leave out zero

    Raises:
        ValueError: no usable cell of the reference arm, or a cell is there twice.
    """
    cells = _by_arm(figures, reference_arm)
    arms = list(cells)
    metrics = list(dict.fromkeys(m for f in figures for m in f.values))
    others = [arm for arm in arms if arm != reference_arm]
    differences = {
        arm: {m: found for m in metrics if (found := difference(cells[reference_arm], cells[arm], m, at))}
        for arm in others
    }
    told = [v for rows in differences.values() for row in rows.values() for v in _told(row)]
    usable = [f for f in figures if f.diverged is None]
    return {
        "reference_arm": reference_arm,
        "arms": arms,
        "seeds": {arm: list(seeds) for arm, seeds in cells.items()},
        "baselines": [a for a in others if not _is_ablation(a, reference_arm) and a != BEST_OF],
        "ablations": [a for a in others if _is_ablation(a, reference_arm)],
        "metrics": metrics,
        "cells": sum(f.arm != BEST_OF for f in usable),
        "judge": "reward_models" if any(f.judge == "reward_models" for f in usable) else "own",
        "prompts": max(f.prompts for f in usable),
        "seconds": sum(f.seconds for f in figures),
        "incomplete": incomplete(figures, expected),
        "base": _base(cells, metrics),
        "curves": {arm: _points(seeds) for arm, seeds in cells.items()},
        "differences": differences,
        "best": {arm: best(_points(seeds)) for arm, seeds in cells.items()},
        "at": list(at),
        "comparisons": len(told),
        "apart": sum(v["verdict"] != "not told apart" for v in told),
    }


def difference(
    reference: Mapping[int, Sequence[CellFigures]],
    other: Mapping[int, Sequence[CellFigures]],
    metric: str,
    at: Sequence[float],
) -> dict[str, Any] | None:
    """Reference arm minus another arm at equal KL, paired by seed; None when no seed has the metric in both.

    Returns:
        range       (low, high), the KL range that both arms cover in every common seed, or None
        seeds       the common seeds
        average     `paired` of the means over that range, or None
        within      {"range", "average"}: the same between each arm's smallest and largest measured KL, without the
                    line from the base policy, which says too little for an arm that has no point at small KL; or None
        at          "KL" -> `paired` at that KL, of the seeds that cover it in both arms; KL nobody covers is absent
        curve       {"kl", "mean", "low", "high"}: lists over a grid of that range; low and high None for one seed
    """
    pairs = {}
    for seed in sorted(reference.keys() & other.keys()):
        mine, theirs = seed_curve(reference[seed], metric), seed_curve(other[seed], metric)
        if mine is not None and theirs is not None:
            pairs[seed] = (mine, theirs)
    if not pairs:
        return None
    span = common_range([curve for pair in pairs.values() for curve in pair])
    grid = [] if span is None else [float(kl) for kl in np.linspace(*span, GRID)]
    inside = common_range([measured(row[s], metric) for row in (reference, other) for s in pairs])
    values = {
        f"{kl:g}": [a.at(kl) - b.at(kl) for a, b in pairs.values() if a.covers(kl) and b.covers(kl)]
        for kl in at
    }
    lines = [estimate([a.at(kl) - b.at(kl) for a, b in pairs.values()]) for kl in grid]
    return {
        "range": span,
        "seeds": list(pairs),
        "average": _average(pairs, span),
        "within": None if inside is None else {"range": inside, "average": _average(pairs, inside)},
        "at": {kl: paired(found) for kl, found in values.items() if found},
        "curve": {"kl": grid} | {key: [line[key] for line in lines] for key in ("mean", "low", "high")},
    }


def _told(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The intervals that a difference tells; none where every difference is exactly 0."""
    within = row["within"] and row["within"]["average"]
    return [
        v
        for v in (row["average"], within, *row["at"].values())
        if v and v["n"] > 1 and v["above"] + v["below"] > 0
    ]


def _average(
    pairs: Mapping[int, tuple[Curve, Curve]], span: tuple[float, float] | None
) -> dict[str, Any] | None:
    if span is None:
        return None
    return paired([a.average(*span) - b.average(*span) for a, b in pairs.values()])


def paired(differences: Sequence[float]) -> dict[str, Any]:
    """The estimate, the signs and the verdict of differences, one a seed.

    >>> paired([0.1, 0.2, 0.15])["verdict"], paired([0.1])["verdict"]
    ('higher', 'not told apart')
    """
    found = estimate(differences)
    verdict = "not told apart"
    if found["n"] > 1:
        verdict = "higher" if found["low"] > 0 else "lower" if found["high"] < 0 else verdict
    above, below = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return found | {"above": above, "below": below, "verdict": verdict}


def seed_curve(cells: Sequence[CellFigures], metric: str) -> Curve | None:
    """The metric over KL of one arm and seed, from the base policy on; None where no cell has it."""
    points = _measured(cells, metric)
    anchors = [f.base[metric] for f in cells if metric in f.base]
    return Curve.through(points, float(np.mean(anchors)) if anchors else None) if points else None


def measured(cells: Sequence[CellFigures], metric: str) -> Curve:
    """The same without the base policy."""
    return Curve.through(_measured(cells, metric), None)


def _measured(cells: Sequence[CellFigures], metric: str) -> list[tuple[float, float]]:
    return [(f.kl, f.values[metric]) for f in cells if f.kl is not None and metric in f.values]


def incomplete(
    figures: Sequence[CellFigures], expected: Iterable[tuple[str, int, int]] | None
) -> list[dict[str, Any]]:
    """The cells that diverged or are not there, by arm, point and seed, and why."""
    there = {(f.arm, f.point, f.seed): f.diverged for f in figures}
    if expected is None:
        points = {(arm, point) for arm, point, _ in there}
        seeds = {(arm, seed) for arm, _, seed in there}
        expected = [(arm, point, seed) for arm, point in points for other, seed in seeds if other == arm]
    reasons = {key: "no figures" for key in expected if key not in there}
    reasons |= {key: f"diverged: {why}" for key, why in there.items() if why is not None}
    return [{"arm": a, "point": p, "seed": s, "why": reasons[a, p, s]} for a, p, s in sorted(reasons)]


def best(points: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Metric -> the point with the highest mean over seeds, with its KL."""
    found = {}
    for metric in BEST:
        having = [row for row in points if metric in row["metrics"]]
        if having:
            top = max(having, key=lambda row: row["metrics"][metric]["mean"])
            found[metric] = {"point": top["point"], "kl": top["kl"], "value": top["metrics"][metric]}
    return found


def _by_arm(figures: Sequence[CellFigures], reference_arm: str) -> Cells:
    """The usable cells, the reference arm first, then in order of appearance."""
    keys = [(f.arm, f.point, f.seed) for f in figures]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"compare: arm {key[0]}, point {key[1]}, seed {key[2]} is there twice")
    usable = [f for f in figures if f.diverged is None]
    arms = list(dict.fromkeys(f.arm for f in usable))
    if reference_arm not in arms:
        raise ValueError(f"compare: no usable cell of the reference arm '{reference_arm}'; there are {arms}")
    arms = [reference_arm, *(a for a in arms if a != reference_arm)]
    return {
        arm: {
            seed: sorted((f for f in usable if (f.arm, f.seed) == (arm, seed)), key=lambda f: f.point)
            for seed in sorted({f.seed for f in usable if f.arm == arm})
        }
        for arm in arms
    }


def _points(seeds: Mapping[int, Sequence[CellFigures]]) -> list[dict[str, Any]]:
    """An arm's points, each averaged over its seeds."""
    cells = [f for row in seeds.values() for f in row]
    rows = []
    for point in sorted({f.point for f in cells}):
        here = [f for f in cells if f.point == point]
        names = dict.fromkeys(m for f in here for m in f.values)
        rows.append(
            {
                "point": point,
                "kl_coef": here[0].kl_coef,
                "kl": estimate([f.kl for f in here if f.kl is not None]),
                "metrics": {m: estimate([f.values[m] for f in here if m in f.values]) for m in names},
            }
        )
    return rows


def _base(cells: Cells, metrics: Sequence[str]) -> dict[str, Any]:
    """Metric -> estimate over seeds of the base policy's value."""
    by_seed: dict[int, list[CellFigures]] = {}
    for seeds in cells.values():
        for seed, row in seeds.items():
            by_seed.setdefault(seed, []).extend(row)
    found = {}
    for metric in metrics:
        values = [[f.base[metric] for f in row if metric in f.base] for row in by_seed.values()]
        means = [float(np.mean(v)) for v in values if v]
        if means:
            found[metric] = estimate(means)
    return found


def _is_ablation(arm: str, reference_arm: str) -> bool:
    return arm.startswith(f"{reference_arm}_")
