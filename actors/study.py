"""The end of a study: figures of every cell, from what its evaluation left, and their comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from actors.artifacts import Artifacts
from rlhf.config import Config
from rlhf.data.prepare import prepare
from rlhf.evaluate.cells import Cell, CellFigures, best_of_figures, cell_figures
from rlhf.evaluate.comparison_report import as_table, write_comparison
from rlhf.evaluate.record import load_samples
from rlhf.evaluate.run import lexicon
from rlhf.evaluate.samples import PolicySamples
from rlhf.store import Store
from rlhf.utility.pipeline import Utility
from rlhf.utility.statistics import BaselineStatistics, ReferenceRule

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
            utility = base_utility(artifacts.utility, artifacts.rules, artifacts.statistics_path, base)
            figures += best_of_figures(base, utility, config.evaluate.best_of, config.seed)
    summary = write_comparison(figures, folder, f"{len(figures)} policies, {seconds / 60:.0f} min")
    return as_table(summary)


def base_utility(
    utility: Utility, rules: Mapping[str, ReferenceRule], statistics: Path, base: PolicySamples
) -> np.ndarray:
    """The combined utility of the base policy's evaluation samples, float32 [P, n]."""
    stored, points = BaselineStatistics.load(statistics), 256 if utility.needs_samples else 0
    references = {n: stored.reference(n, base.prompt_ids, rule, points) for n, rule in rules.items()}
    shape = base.lengths.shape
    raw = np.stack([base.rewards[n].ravel() for n in utility.weights], 1)
    group = np.repeat(np.arange(shape[0]), shape[1])
    return utility.combined(raw, references, group).reshape(shape)


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
