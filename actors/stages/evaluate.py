"""The evaluate stage: the aligned policy beside the base policy on held-out prompts, scored and judged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from actors.stages.align import Align
from actors.stages.base_samples import BaseSamples
from actors.stages.baseline import Baseline
from actors.stages.sft import Sft
from actors.stages.stage import Output, Stage
from rlhf.store import fingerprint
from rlhf.utility.statistics import BaselineStatistics

if TYPE_CHECKING:
    from actors.stages.job import Job


class Evaluate(Stage):
    name = "evaluate"

    @cached_property
    def output_name(self) -> str:
        return fingerprint(
            "evaluate", self.stages.of(Align).output_name, self.stages.of(BaseSamples).output_name
        )

    @property
    def _output(self) -> Output:
        return Output("evaluate", "evaluate", self.output_name)

    @property
    def outputs(self) -> list[Output]:
        return [self._output]

    @property
    def path(self) -> Path:
        """Of base.npz and aligned.npz."""
        return self.made(self._output)

    def make(self, job: Job, output: Output, folder: Path) -> None:
        from actors.evaluation import Evaluation, log_ratio
        from rlhf.evaluate.record import load_samples, save_samples
        from rlhf.evaluate.samples import applying

        align, baseline = self.stages.of(Align), self.stages.of(Baseline)
        aligned = align.policy_path
        evaluation = Evaluation(self.config, self.data.eval_prompts, job.roles)
        stored = BaselineStatistics.load(baseline.statistics_path)
        reference = {n: stored.reference(n, evaluation.ids, rule).r_ref for n, rule in baseline.rules.items()}
        before = replace(load_samples(self.stages.of(BaseSamples).path(job)), reference=reference)
        if self.config.data.judge is None:
            before = replace(before, judged=applying(before.rewards), judge_reference=reference)
        generators = job.roles.generators
        generators.load(str(aligned))
        with job.view.stage("evaluate", evaluation.items) as progress:
            sampled = evaluation.sample("evaluate aligned", self.config.evaluate.samples, progress.update)
            generators.load(self.stages.of(Sft).policy_path)
            logprobs = generators.logprobs(sampled)
            after = evaluation.measure(sampled)
        after = replace(
            after,
            reference=reference,
            judged=applying(after.rewards) if self.config.data.judge is None else after.judged,
            judge_reference=before.judge_reference,
            evaluator_reference=before.evaluator_reference,
            log_ratio=log_ratio(sampled, logprobs).reshape(after.lengths.shape),
        )
        save_samples(folder / "base.npz", before)
        save_samples(folder / "aligned.npz", after)

    def links(self) -> Mapping[str, Path]:
        return {"evaluate": self.path} if self.done else {}
