"""The report stage: one page, and its figures, of what the other stages left."""

from __future__ import annotations

from typing import TYPE_CHECKING

from actors.stages.align import Align
from actors.stages.baseline import Baseline
from actors.stages.evaluate import Evaluate
from actors.stages.reward_models import RewardModels
from actors.stages.stage import Stage

if TYPE_CHECKING:
    from actors.stages.job import Job


class Report(Stage):
    name = "report"

    def execute(self, job: Job) -> None:
        from rlhf.evaluate.report import write_report
        from rlhf.evaluate.run import lexicon, run_record

        align, baseline = self.stages.of(Align), self.stages.of(Baseline)
        record = run_record(
            self.config,
            job.run,
            {**job.seconds, "total": job.total},
            job.skipped,
            align.path,
            self.stages.of(Evaluate).path,
            baseline.statistics_path,
            baseline.rules,
            align.utility,
            self.stages.of(RewardModels).calibrations(),
        )
        write_report(record, job.run, lexicon(self.config))
        job.view.line(f"report: {job.run / 'report.html'}")
