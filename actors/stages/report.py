"""The report stage: one page, its figures, and the policy's model card, of what the other stages left."""

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
        from rlhf.loggers.loggers import final_figures, send_figures
        from rlhf.publish.card import write_card

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
        summary = write_report(record, job.run, lexicon(self.config))
        job.view.line(f"report: {job.run / 'report.html'}")
        steps, scales = len(record.metrics), align.utility.scales
        write_card(align.policy_path, self.config, summary, scales, steps)
        send_figures(
            self.config.logging,
            self.store.root.parent,
            align.logged(job, align.path, steps),
            final_figures(summary),
            job.view.line,
        )
