"""The end of a study: figures of every cell, from what its evaluation left, and their comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from actors.stages.align import Align
from actors.stages.baseline import Baseline
from actors.stages.evaluate import Evaluate
from actors.stages.stage import Stages
from rlhf.config import Config
from rlhf.data.prepare import prepare
from rlhf.evaluate.cells import BEST_OF, Cell, CellFigures, best_of_figures, cell_figures
from rlhf.evaluate.comparison_report import as_table, write_comparison
from rlhf.evaluate.record import load_samples
from rlhf.evaluate.run import base_utility, lexicon
from rlhf.evaluate.samples import PolicySamples
from rlhf.store import Store
from rlhf.utility.statistics import BaselineStatistics

REFERENCE_ARM = "lsc"  # what the other arms are compared with; in a study without it, the first arm
Ran = tuple[Config, float, str | None]
"""A cell that ran: its configuration, the seconds it took, and why it failed, if it did."""


def compare_cells(cells: Sequence[Ran], folder: Path, seconds: float) -> str:
    """Writes comparison.html, summary.json and the figures of a study into a folder; returns a table as text."""
    figures = [_figures(*cell) for cell in cells]
    trained = [f for f in figures if f.diverged is None]
    if not trained:
        raise ValueError(f"no cell of the study was trained: {figures[0].diverged}")
    arms = [f.arm for f in trained]
    reference = REFERENCE_ARM if REFERENCE_ARM in arms else arms[0]
    done = [cell[0] for cell, f in zip(cells, figures, strict=True) if f.diverged is None]
    figures += _best_of(done, reference)
    title = f"{len(trained)} trained policies, {len(set(arms))} arms; this call took {seconds / 60:.0f} min"
    return as_table(write_comparison(figures, folder, title, reference))


def _figures(config: Config, took: float, failed: str | None) -> CellFigures:
    study = config.study
    assert study is not None
    if failed is not None:
        return _failed(config, took, failed)
    base, aligned = _samples(_stages(config))
    cell = Cell(study.arm, _point(config), config.seed, study.kl_coefs[study.point], took, base, aligned)
    try:
        return cell_figures(cell, lexicon(config))
    except ValueError as error:  # a figure is not finite
        return _failed(config, took, str(error))


def _best_of(done: Sequence[Config], reference: str) -> list[CellFigures]:
    """Best-of-n of each seed's base samples, chosen by the reference arm's utility."""
    by_seed = {c.seed: c for c in done if c.study is not None and c.study.arm == reference}
    figures: list[CellFigures] = []
    for seed, config in sorted(by_seed.items()):
        stages, ns = _stages(config), config.evaluate.best_of
        base, _ = _samples(stages)
        baseline = stages.of(Baseline)
        stored = BaselineStatistics.load(baseline.statistics_path)
        try:
            utility = base_utility(stages.of(Align).utility, baseline.rules, stored, base)
        except ValueError as error:  # a prompt of the evaluation that the transform cannot take
            why = str(error)
            figures += [
                CellFigures(BEST_OF, p, seed, 0.0, 0.0, None, "own", 0, 0, {}, {}, diverged=why)
                for p in range(len(ns))
            ]
            continue
        figures += best_of_figures(base, utility, ns, seed)
    return figures


def _point(config: Config) -> int:
    assert config.study is not None
    return list(config.study.kl_coefs).index(config.study.point)


def _stages(config: Config) -> Stages:
    store = Store(Path(config.output_dir).expanduser().absolute() / "store")
    return Stages(config, prepare(config, store), store)


def _samples(stages: Stages) -> tuple[PolicySamples, PolicySamples]:
    folder = stages.of(Evaluate).path
    return load_samples(folder / "base.npz"), load_samples(folder / "aligned.npz")


def _failed(config: Config, seconds: float, failed: str) -> CellFigures:
    study = config.study
    assert study is not None
    kl_coef = study.kl_coefs[study.point]
    return CellFigures(
        study.arm, _point(config), config.seed, kl_coef, seconds, None, "own", 0, 0, {}, {}, diverged=failed
    )
