"""One cell of a study, an alignment run of one arm at one KL coefficient and seed, and the figures it leaves.

Figures are floats by metric (`rlhf.evaluate.measures`), so that hundreds of cells fit in memory and each can be
kept as JSON.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from rlhf.evaluate.best_of import best_of
from rlhf.evaluate.hacking import Lexicon
from rlhf.evaluate.measures import anchored, judges_of, measure
from rlhf.evaluate.samples import PolicySamples
from rlhf.evaluate.words import judged_by_rewards

BEST_OF = "best_of_n"


@dataclass(frozen=True)
class Cell:
    """A trained policy: `point` is the index of its KL coefficient; `diverged` says how it failed, if it did."""

    arm: str
    point: int
    seed: int
    kl_coef: float
    seconds: float
    base: PolicySamples
    aligned: PolicySamples
    diverged: str | None = None


@dataclass(frozen=True)
class CellFigures:
    """What is kept of a cell. `base` holds what the same metrics are at KL 0; a diverged cell has no figures.

    For the metrics that sampling noise alone moves (left_behind, lower_tail) the value at KL 0 is not 0: it is
    measured between two halves of the base samples. It is absent without two base samples a prompt, and for
    left_behind/joint_win.
    """

    arm: str
    point: int
    seed: int
    kl_coef: float
    seconds: float
    kl: float | None  # nats a response; None where it is not finite
    judge: str  # "own", or "reward_models" when the trained reward models decide the wins
    prompts: int
    samples: int  # a prompt
    values: Mapping[str, float]
    base: Mapping[str, float]
    diverged: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> CellFigures:
        return cls(**found)


def cell_figures(cell: Cell, lexicon: Lexicon | None = None) -> CellFigures:
    """Measures a cell; `lexicon`: what is a refusal or a stock phrase.

    Raises:
        ValueError: a figure of a cell that did not diverge is not finite; it names the cell and the metric.
    """
    base, aligned = cell.base, cell.aligned
    assert np.array_equal(base.prompt_ids, aligned.prompt_ids), "the policies answered different prompts"
    kl = float(np.mean(aligned.log_ratio, dtype=np.float64))
    figures = CellFigures(
        arm=cell.arm,
        point=cell.point,
        seed=cell.seed,
        kl_coef=cell.kl_coef,
        seconds=cell.seconds,
        kl=kl if math.isfinite(kl) else None,
        judge="reward_models" if judged_by_rewards(base) else "own",
        prompts=len(aligned.prompts),
        samples=int(aligned.lengths.shape[1]),
        values={},
        base={},
        diverged=cell.diverged,
    )
    if cell.diverged is not None:
        return figures
    values, start = measure(base, aligned, lexicon or Lexicon())
    references = {f"{n}'s judge reference": float(np.mean(r)) for n, r in aligned.judge_reference.items()}
    references |= {
        f"{n}'s evaluator reference": float(np.mean(r)) for n, r in aligned.evaluator_reference.items()
    }
    _check(cell, {"kl": kl} | values | {f"{n} of the base policy": v for n, v in start.items()} | references)
    return replace(figures, values=values, base=start)


def best_of_figures(
    base: PolicySamples, utility: np.ndarray, ns: Sequence[int], seed: int
) -> list[CellFigures]:
    """Best-of-n of the base samples as the cells of an arm of its own, "best_of_n": its points are `ns`.

    utility: float [P, N], by which the best is chosen. The KL is exact or an upper bound: see `best_of`.
    """
    judges = judges_of(base, base)
    rows = {judge: best_of(view, utility, ns) for judge, (view, _) in judges.items()}
    start = anchored(judges)
    cells = []
    for point, n in enumerate(ns):
        values: dict[str, float] = {}
        for judge, row in rows.items():
            values |= {f"win/{judge}/{name}": v for name, v in row[point].win_rate.items()}
            values |= {f"versus/{judge}/{name}": v for name, v in row[point].versus.items()}
            values |= {f"score/{judge}/{name}": v for name, v in row[point].judged.items()}
        cells.append(
            CellFigures(
                arm=BEST_OF,
                point=point,
                seed=seed,
                kl_coef=0.0,
                seconds=0.0,
                kl=rows["gold"][point].kl,
                judge="reward_models" if judged_by_rewards(base) else "own",
                prompts=len(base.prompts),
                samples=n,
                values=values,
                base=start,
            )
        )
    return cells


def _check(cell: Cell, figures: Mapping[str, float]) -> None:
    for name, value in figures.items():
        if not math.isfinite(value):
            where = f"arm {cell.arm}, point {cell.point}, seed {cell.seed}"
            raise ValueError(f"{where}: {name} is {value}; a cell that failed must say so in `diverged`")
