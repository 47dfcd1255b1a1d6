"""The policy evaluated while it is trained: the points of the curve, and what follows from them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from actors.stages.base_samples import BaseSamples
from actors.stages.baseline import Baseline

if TYPE_CHECKING:
    from actors.stages.job import Job
    from actors.stages.stage import Stage


class EvaluationCurve:
    """Adds a point after each step at which one is due, by generators that hold the policy of that step and do nothing
    else; one that is there already is not made again. The samples have the same seeds at every step."""

    def __init__(self, stage: Stage, job: Job, folder: Path, step: int) -> None:
        """step: that is begun at; later points are of a history that was set back."""
        from rlhf.evaluate import curve

        self._stage, self._job, self._curve, self._path = stage, job, curve, folder / curve.FILE
        self._config, self._settings = stage.config, stage.config.evaluate
        self._points = [p for p in curve.read_points(self._path) if p.step <= step]

    def is_due(self, step: int) -> bool:
        return self._curve.due(step, self._config.align.steps, self._settings.every)

    def next_stop(self, step: int) -> int:
        """The next step after which a point is due, or the last."""
        steps, every = self._config.align.steps, self._settings.every
        return steps if every is None else min(steps, (step // every + 1) * every)

    def best(self) -> list[int]:
        """The step whose checkpoint has to be kept, if there is any."""
        trained = [p for p in self._points if p.step > 0]
        return [self._curve.best(trained, self._settings.max_kl)] if trained else []

    def chosen(self, last: int) -> int:
        """The step whose policy is kept."""
        if not self._points:
            return last
        choice = self._curve.choose(self._points, self._settings.policy, self._settings.max_kl)
        self._job.view.line(f"align: the policy is of {choice.why}")
        return choice.step

    def go_on(self, step: int) -> str | None:
        """Evaluates, if it is due after this step. Why training ends here; None: it goes on."""
        if self._settings.every is None:
            return None
        due = step == 0 or self.is_due(step)
        if due and step not in [p.step for p in self._points]:
            self._add(step)
        early = self._curve.should_stop(self._points, self._settings.patience)
        if early is not None:
            self._job.view.line(f"align: {early}")
        return early

    def _add(self, step: int) -> None:
        from actors.evaluation import Evaluation
        from rlhf.evaluate.record import load_samples
        from rlhf.evaluate.run import lexicon
        from rlhf.utility.statistics import BaselineStatistics

        stages = self._stage.stages
        evaluation = Evaluation(self._config, stages.data.eval_prompts, self._job.roles)
        sampled = evaluation.sample("evaluate during", self._settings.during_samples, lambda _: None)
        found = evaluation.measure(sampled)
        ratios = self._job.roles.learner.log_ratios([s.rollouts for s in sampled])
        baseline = stages.of(Baseline)
        stored = BaselineStatistics.load(baseline.statistics_path)
        rules = baseline.rules.items()
        reference = {name: stored.reference(name, evaluation.ids, rule).r_ref for name, rule in rules}
        base = load_samples(stages.of(BaseSamples).path(self._job))
        own = self._config.data.judge is not None
        samples = replace(
            found,
            reference=reference,
            judged=found.judged if own else found.rewards,
            judge_reference=base.judge_reference if own else reference,
            evaluator_reference=base.evaluator_reference,
            log_ratio=ratios.astype(np.float32).reshape(found.lengths.shape),
        )
        point = self._curve.point(step, samples, lexicon(self._config))
        self._points.append(point)
        self._curve.write_points(self._path, self._points)
        rate = point.joint(self._curve.OPTIMISED)
        self._job.view.line(
            f"align: step {step}: joint win rate {rate:.3f} by rewards, KL {point.kl:.2f} nats"
        )
