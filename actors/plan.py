"""`rlhf plan`: what a run needs, before it is started; and its time, from steps that are run for real."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from actors.address import given_address
from actors.preflight import preflight
from actors.resources import free_memory
from actors.session import Session
from actors.stages.align import Align
from actors.stages.reward_models import RewardModels
from actors.stages.sft import Sft
from actors.stages.stage import Stages
from rlhf import timeline
from rlhf.config import Config
from rlhf.logs import read_metrics
from rlhf.plan.times import Steps, estimate
from rlhf.store import Store

WARM_UP, STEPS = 1, 2
"""Steps of align that are run: the first calls of everything are slower."""


def tell_plan(config: Config, store: Store, session: Session, say: Callable[[str], None]) -> None:
    """Says what the run needs; with `plan.measure`, after it has run steps of it.

    Raises:
        ValueError: the configuration cannot work, or a model that is to be measured is not there.
    """
    from rlhf.plan.report import lines, node, timed
    from rlhf.plan.roles import plan

    stages = Stages(config, preflight(config, store, here=False), store)
    found = plan(config, stages.data, store)
    alone = given_address(config.resources) is None
    for text in [*lines(found), *node(found, free_memory() if alone else None)]:
        say(text)
    if config.plan.measure:
        steps = measured(short(config, stages), store.root.parent, session)
        say(f"measured: {steps.seconds:.1f} s a step, {steps.tokens:.0f} tokens a response")
        say(timed(estimate(config, steps, len(stages.data.prompts), len(stages.data.eval_prompts))))


def short(config: Config, stages: Stages) -> Config:
    """The configuration of a run of a few steps, with all models given.

    Raises:
        ValueError: one is neither given nor made.
    """
    policy = replace(config.policy, path=_there(lambda: stages.of(Sft).policy_path), init_from=None)
    paths = _there(lambda: stages.of(RewardModels).paths("reward_models"))
    models = {
        name: replace(source, path=paths[name]) if name in paths else source
        for name, source in config.reward_models.items()
    }
    steps = WARM_UP + STEPS
    needed = min(config.align.prompts_per_step * steps, len(stages.data.prompts))
    align, off = config.align, replace(config.align.checkpoint, every=None, minutes=None, resume="never")
    return replace(
        config,
        stages=["baseline", "align"],
        policy=policy,
        reward_models=models,
        evaluators={},
        data=replace(config.data, train_size=needed),
        baseline=replace(
            config.baseline, samples=2, max_samples=2, tolerance=None, known=None, unseen="sample"
        ),
        evaluate=replace(config.evaluate, every=None, max_kl=None, patience=None),
        align=replace(align, steps=steps, checkpoint=off),
        logging=replace(config.logging, live="off", loggers=[]),
        hub=replace(config.hub, repo=None),
    )


def _there(path: Callable[[], Any]) -> Any:
    try:
        return path()
    except ValueError as error:
        raise ValueError(
            f"plan.measure=true needs the models: give them by path, or make them first ({error})"
        ) from None


def measured(config: Config, root: Path, session: Session) -> Steps:
    """Runs them, in a folder that is removed."""
    from actors.job import run

    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=root, prefix="plan-") as folder:
        config = replace(config, output_dir=folder)
        run(config, Path(folder) / "run", "", session)
        store = Store(Path(folder) / "store")
        path = Stages(config, preflight(config, store), store).of(Align).path
        return _means(path)


def _means(path: Path) -> Steps:
    """Of a finished stage's steps after the first."""
    rows, spans = read_metrics(path)[WARM_UP:], timeline.read(path / "timeline.json")
    seconds = fmean(row["seconds"] for row in rows)
    end = max(span.end for span in spans)
    sampling = [span for span in spans if span.name in ("sample", "score")]
    share = timeline.covered(sampling, end - seconds * len(rows), end)
    return Steps(seconds, seconds * share, fmean(row["response_tokens"] for row in rows))
