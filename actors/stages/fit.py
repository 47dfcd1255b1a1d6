"""Supervised and Bradley-Terry training of one model by the learner, with its way back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from actors.saver import Saver
from actors.signals import orderly
from rlhf.checkpoints import Checkpoints
from rlhf.config import Config, TrainingConfig
from rlhf.logs import MetricsWriter
from rlhf.store import CHECKPOINTS

if TYPE_CHECKING:
    from actors.stages.held_out import HeldOut
    from actors.stages.job import Job
    from rlhf.learn.tasks import Task

CHUNK = 20  # steps between two reports, at most


def trained_by(config: Config) -> Any:
    """What a trained model depends on of how learners compute: not on their number, nor on ZeRO."""
    return config.deepspeed.dtype


def fit(
    job: Job,
    name: str,
    task: Task,
    data: Any,
    tokenizer: str,
    training: TrainingConfig,
    folder: Path,
    held_out: Callable[[int], HeldOut] | None = None,
) -> None:
    """Trains, from the newest checkpoint in `folder`, and saves the model there with its tokenizer and metrics.

    Args:
        held_out: given the step that is begun at, what measures the model meanwhile and saves its best step's.
    """
    from rlhf.learn.tasks import save_tokenizer

    config = job.config
    checkpoints = Checkpoints(folder / CHECKPOINTS, config.align.checkpoint.keep)
    with job.view.stage(name, training.steps) as progress, orderly(config.recovery.grace) as asked:
        learner = job.roles.learner
        learner.load(task, training.weight_decay)
        begun = checkpoints.newest(job.view.line)
        step = 0 if begun is None else begun.step
        if begun is not None:
            learner.restore(begun.folder)
            job.view.line(f"{name}: goes on from step {step}")
        writer = MetricsWriter(folder, step)
        saver = Saver(
            replace(config.align.checkpoint, every=None),
            checkpoints,
            learner,
            step,
            before=lambda _: writer.sync(),
        )
        reference = ray.put(data)
        measured = None if held_out is None else held_out(step)
        while step < training.steps:
            stop = min(step + CHUNK, training.steps if measured is None else measured.next_stop(step))
            steps = learner.fit(reference, training, config.seed, step, stop)
            for i, metrics in enumerate(steps, step + 1):
                writer.write({"step": i, **metrics})
            step = stop
            job.progressed()
            progress.update(step, "  ".join(f"{k} {np.mean([m[k] for m in steps]):.3f}" for k in steps[0]))
            if measured is not None:
                measured.take(learner, step, lambda text: job.view.line(f"{name}: {text}"))
            if asked() or (step < training.steps and saver.due(step)):
                saver.save(step, {})
            if asked():
                return
        writer.close()
        if measured is None or not training.steps:
            learner.save(folder)
        save_tokenizer(tokenizer, folder)
