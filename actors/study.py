"""The end of a study: figures of every cell, from what its evaluation left, and their comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from actors.artifacts import Artifacts
from rlhf.config import Config
from rlhf.data.prepare import prepare
from rlhf.evaluate.cells import Cell, CellFigures, best_of_figures, cell_figures
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
    figures: list[CellFigures] = []
    seeds: set[int] = set()
    for config, took, failed in cells:
        assert config.study is not None
        artifacts = _artifacts(config)
        if failed is not None:
            figures.append(_failed(config, took, failed))
            continue
        base, aligned = _samples(artifacts)
        study = config.study
        cell = Cell(study.arm, _point(config), config.seed, study.kl_coefs[study.point], took, base, aligned)
        figures.append(cell_figures(cell, lexicon(config)))
        if study.arm == cells[0][0].study.arm and config.seed not in seeds:  # type: ignore[union-attr]
            seeds.add(config.seed)
            stored = BaselineStatistics.load(artifacts.statistics_path)
            utility = base_utility(artifacts.utility, artifacts.rules, stored, base)
            figures += best_of_figures(base, utility, config.evaluate.best_of, config.seed)
    arms = [f.arm for f in figures]
    reference = REFERENCE_ARM if REFERENCE_ARM in arms else arms[0]
    summary = write_comparison(figures, folder, f"{len(figures)} policies, {seconds / 60:.0f} min", reference)
    return as_table(summary)


def _point(config: Config) -> int:
    assert config.study is not None
    return list(config.study.kl_coefs).index(config.study.point)


def _artifacts(config: Config) -> Artifacts:
    store = Store(Path(config.output_dir).expanduser().absolute() / "store")
    return Artifacts(config, prepare(config, store), store)


def _samples(artifacts: Artifacts) -> tuple[PolicySamples, PolicySamples]:
    folder = artifacts.made("evaluate", artifacts.evaluate_name)
    return load_samples(folder / "base.npz"), load_samples(folder / "aligned.npz")


def _failed(config: Config, seconds: float, failed: str) -> CellFigures:
    study = config.study
    assert study is not None
    kl_coef = study.kl_coefs[study.point]
    return CellFigures(
        study.arm, _point(config), config.seed, kl_coef, seconds, None, "own", 0, 0, {}, {}, diverged=failed
    )
