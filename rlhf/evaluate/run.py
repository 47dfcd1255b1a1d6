"""Gathers what a run left on disk into the record that the report is made of."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf import timeline
from rlhf.config import Config
from rlhf.data.microcosm import STOCK_PHRASES, is_refusal
from rlhf.evaluate import curve
from rlhf.evaluate.best_of import best_of
from rlhf.evaluate.hacking import Lexicon
from rlhf.evaluate.record import RunRecord, load_samples
from rlhf.evaluate.samples import PolicySamples
from rlhf.evaluate.sources import reward_facts
from rlhf.logs import read_metrics
from rlhf.sources.source import rewards_of
from rlhf.utility.pipeline import Utility
from rlhf.utility.statistics import BaselineStatistics, ReferenceRule
from rlhf.versions import versions

EXAMPLES = 6  # prompts whose base reward distribution is drawn


def run_record(
    config: Config,
    run: Path,
    seconds: Mapping[str, float],
    skipped: Sequence[str],
    align: Path,
    evaluated: Path,
    statistics: Path,
    rules: Mapping[str, ReferenceRule],
    utility: Utility,
    calibrations: Mapping[str, Mapping[str, Any]],
) -> RunRecord:
    """The record of a finished run from the folders of its stages, and what is known of its rewards' units."""
    base, aligned = load_samples(evaluated / "base.npz"), load_samples(evaluated / "aligned.npz")
    stored = BaselineStatistics.load(statistics)
    chosen, why_not = [], ""
    if config.evaluate.best_of:
        try:
            chosen = best_of(base, base_utility(utility, rules, stored, base), config.evaluate.best_of)
        except ValueError as error:  # a prompt of the evaluation that the transform cannot take
            why_not = str(error)
    points = curve.read_points(align / curve.FILE)
    settings = config.evaluate
    rewards = {n: (own, utility.scale(n)) for n, own in rewards_of(config.reward_models).items()}
    return RunRecord(
        title=" · ".join(
            (
                config.utility.transform,
                config.utility.combine,
                config.algorithm.advantage,
                ", ".join(rewards_of(config.reward_models)),
            )
        ),
        config=(run / "config.yaml").read_text(),
        versions=versions(),
        seconds=dict(seconds),
        skipped=list(skipped),
        metrics=read_metrics(align),
        base=base,
        aligned=aligned,
        baseline=_examples(stored, rules, aligned),
        best_of=chosen,
        no_best_of=why_not,
        busy=_busy(align / "timeline.json"),
        points=points,
        choice=curve.choose(points, settings.policy, settings.max_kl) if points else None,
        stopped=curve.should_stop(points, settings.patience) or "",
        rewards=reward_facts(rewards, calibrations, base),
        notes=json.loads((align / "notes.json").read_text()),
    )


def base_utility(
    utility: Utility, rules: Mapping[str, ReferenceRule], statistics: BaselineStatistics, base: PolicySamples
) -> np.ndarray:
    """The combined utility of the base policy's evaluation samples, float32 [P, n]."""
    points = 256 if utility.needs_samples else 0
    references = {n: statistics.reference(n, base.prompt_ids, rule, points) for n, rule in rules.items()}
    shape = base.lengths.shape
    raw = np.stack([base.rewards[n].ravel() for n in utility.weights], 1)
    group = np.repeat(np.arange(shape[0]), shape[1])
    return utility.combined(raw, references, group, base.prompts).reshape(shape)


def lexicon(config: Config) -> Lexicon:
    """What counts as a stock phrase and a refusal: the microcosm's own, or common English ones."""
    if config.data.judge == "microcosm":
        return Lexicon(STOCK_PHRASES, is_refusal)
    return Lexicon()


def _busy(path: Path) -> dict[str, dict[str, float]]:
    spans = timeline.read(path)
    return timeline.shares(spans, 0.0, max(s.end for s in spans))


def _examples(
    statistics: BaselineStatistics, rules: Mapping[str, ReferenceRule], aligned: PolicySamples
) -> dict[str, dict[str, Any]]:
    """Base rewards, r_ref and aligned rewards of a few prompts, spread over the evaluation set."""
    chosen = np.unique(np.linspace(0, len(aligned.prompts) - 1, EXAMPLES).astype(int))
    ids = aligned.prompt_ids[chosen]
    return {
        name: {
            "prompts": [aligned.prompts[i] for i in chosen],
            "samples": (references := statistics.reference(name, ids, rule, points=256)).samples,
            "r_ref": references.r_ref,
            "aligned": aligned.rewards[name][chosen],
        }
        for name, rule in rules.items()
    }
