"""The base policy's evaluation samples, which the runs of a sweep share: made when a stage first needs them."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from actors.stages.baseline import Baseline
from actors.stages.reward_models import RewardModels
from actors.stages.sft import Sft
from actors.stages.stage import Output, Stage
from rlhf.code import code_version
from rlhf.sources.source import Source, rewards_of
from rlhf.store import fingerprint
from rlhf.utility.statistics import ReferenceRule

if TYPE_CHECKING:
    from actors.stages.job import Job


class BaseSamples(Stage):
    """Not a stage of its own to the user: of those that evaluate."""

    name = "evaluate"

    @cached_property
    def evaluator_rules(self) -> dict[str, ReferenceRule]:
        """Of what wins by an evaluator: the same in every run, whatever its own references are."""
        level = self.config.evaluate.level
        return {name: own.rule(level, "empirical") for name, own in self._evaluators.items()}

    @property
    def _evaluators(self) -> dict[str, Source]:
        return rewards_of(self.config.evaluators)

    @cached_property
    def output_name(self) -> str:
        c, prompts = self.config, self.data.eval_prompts
        evaluators = self._evaluators
        columns = {n: own.column for n, own in evaluators.items() if own.reference == "column"}
        return fingerprint(
            "base samples",
            code_version("rlhf.evaluate.judges", "rlhf.utility.statistics"),
            self.stages.of(Baseline).keys,
            self.stages.of(RewardModels).evaluator_names,
            {n: (own.reference, own.canned, own.constant) for n, own in evaluators.items()},
            {name: self.data.column(column, prompts) for name, column in columns.items()},
            c.evaluate.level if c.evaluators else None,
            [p.id for p in prompts],
            c.rollout.prompts_per_item,
            (c.evaluate.samples, c.evaluate.judge_samples),
            c.data.judge,
            c.seed,
        )

    @property
    def _output(self) -> Output:
        return Output("evaluate base", "base_samples", self.output_name)

    def path(self, job: Job) -> Path:
        """Of base.npz: the samples, and what the judge and the evaluators compare with."""
        if not self.store.has(self._output.kind, self._output.name):
            job.make(self, self._output)
        return self.made(self._output) / "base.npz"

    def make(self, job: Job, output: Output, folder: Path) -> None:
        from actors.evaluation import Evaluation
        from rlhf.evaluate.record import save_samples

        c = self.config
        evaluation = Evaluation(c, self.data.eval_prompts, job.roles)
        job.roles.generators.load(self.stages.of(Sft).policy_path)
        with job.view.stage(output.label, 2 * evaluation.items) as progress:
            judged = evaluation.sample("judge", c.evaluate.judge_samples, progress.update)
            judge_reference = evaluation.judge_reference(judged)
            references = evaluation.evaluator_references(judged, self.evaluator_rules)
            sampled = evaluation.sample(
                output.label, c.evaluate.samples, lambda done: progress.update(evaluation.items + done)
            )
            found = replace(
                evaluation.measure(sampled), judge_reference=judge_reference, evaluator_reference=references
            )
        save_samples(folder / "base.npz", found)
