"""The align stage: the policy trained to be good by all reward models, with its checkpoints and its way back."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.signals import orderly
from actors.stages.align_run import AlignRun
from actors.stages.base_samples import BaseSamples
from actors.stages.baseline import Baseline
from actors.stages.reward_models import RewardModels
from actors.stages.stage import Output, Stage, Stages
from rlhf.changes import check_same, differences
from rlhf.changes import told as changes_told
from rlhf.checkpoints import Checkpoint, Checkpoints, read
from rlhf.code import code_version
from rlhf.flow.history import FILE as HISTORY
from rlhf.flow.history import copy_until
from rlhf.generate.engines import engine_identity
from rlhf.loggers.logger import KEPT, Run
from rlhf.logs import METRICS
from rlhf.shown import redacted_values
from rlhf.sources.source import rewards_of
from rlhf.store import CHECKPOINTS, fingerprint
from rlhf.utility.pipeline import Utility
from rlhf.utility.scales import WRONG

if TYPE_CHECKING:
    from actors.stages.job import Job

CODE = (
    "rlhf.learn.align_task",
    "rlhf.learn.tasks",
    "rlhf.models.reward",
    "rlhf.utility.pipeline",
    "rlhf.utility.statistics",
    "actors.work",
)


class Align(Stage):
    name = "align"

    def __init__(self, stages: Stages) -> None:
        super().__init__(stages)
        self._tried = False  # whether this process has begun it before

    @cached_property
    def utility(self) -> Utility:
        utility, scales = self.config.utility, self.stages.of(RewardModels).scales()
        return Utility(utility.transform, utility.combine, utility.parameters, self._weights, scales)

    @property
    def _weights(self) -> dict[str, float]:
        return {name: own.weight for name, own in rewards_of(self.config.reward_models).items()}

    @property
    def _units(self) -> Any:
        """What the scales depend on."""
        rewards = rewards_of(self.config.reward_models)
        kinds = {n: (own.scale, own.error_rate if own.scale in WRONG else 0) for n, own in rewards.items()}
        calibrated = self.config.utility.calibrated
        return (kinds, self.stages.of(RewardModels).calibration_names if calibrated else None)

    @property
    def _output(self) -> Output:
        return Output("align", "align", self.output_name)

    @cached_property
    def output_name(self) -> str:
        c, align = self.config, asdict(self.config.align)
        resumed = self._given_checkpoint
        for key in ("checkpoint", "max_skipped"):
            del align[key]
        return fingerprint(
            "align",
            code_version(*CODE),
            self.stages.of(Baseline).output_name,
            {name: vars(rule) for name, rule in self.stages.of(Baseline).rules.items()},
            (c.utility.transform, c.utility.combine, c.utility.parameters, self._weights, self._units),
            c.algorithm,
            align,
            c.policy.lora,
            c.rollout,
            engine_identity(c.rollout),
            c.deepspeed.dtype,
            self._evaluated,
            resumed and fingerprint(resumed.step, dict(resumed.state)),
            c.seed,
        )

    @property
    def _evaluated(self) -> Any:
        """What of the evaluation it depends on."""
        e = self.config.evaluate
        if e.every is None:
            return None
        settings = (e.every, e.during_samples, e.policy, e.max_kl, e.patience)
        return (settings, code_version("rlhf.evaluate.curve"), self.stages.of(BaseSamples).output_name)

    @property
    def outputs(self) -> list[Output]:
        return [self._output]

    @property
    def path(self) -> Path:
        """What it made."""
        return self.made(self._output)

    @property
    def begun(self) -> bool:
        """Whether there is something of it, finished or not."""
        output = self._output
        unfinished = self.store.unfinished(output.kind, output.name) / CHECKPOINTS
        return self.done or Checkpoints(unfinished, 1).newest_unread() is not None

    @property
    def policy_path(self) -> Path:
        """The aligned policy."""
        return self.path / "policy"

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as a checkpoint has it."""
        return json.loads(json.dumps(redacted_values(asdict(self.config))))

    @cached_property
    def _given_checkpoint(self) -> Checkpoint | None:
        """What `align.checkpoint.resume` names.

        Raises:
            ValueError: it is none, or is of another history than this configuration would have made.
        """
        resume = self.config.align.checkpoint.resume
        if resume in ("auto", "never"):
            return None
        try:
            found = read(Path(resume).expanduser())
        except ValueError as error:
            raise ValueError(f"align.checkpoint.resume: {error}") from None
        check_same(found.state["config"], self.settings, f"align.checkpoint.resume={resume}")
        if found.step > self.config.align.steps:
            raise ValueError(
                f"align.checkpoint.resume={resume} is of step {found.step}, and align.steps={self.config.align.steps}"
            )
        return found

    def execute(self, job: Job) -> None:
        if self.config.evaluate.every is not None and not self.done:
            self.stages.of(BaseSamples).path(job)
        super().execute(job)

    def make(self, job: Job, output: Output, folder: Path) -> None:
        c = self.config
        checkpoints = Checkpoints(folder / CHECKPOINTS, c.align.checkpoint.keep)
        begun = self._begun(checkpoints, folder, job)
        with job.view.stage("align", c.align.steps) as progress, orderly(c.recovery.grace) as asked:
            run = AlignRun(self, job, folder, checkpoints, progress, asked)
            run.load(begun)
            run.train()

    def _begun(self, checkpoints: Checkpoints, folder: Path, job: Job) -> Checkpoint | None:
        """The checkpoint to go on from; None: there is none."""
        if self.config.align.checkpoint.resume == "never" and not self._tried:
            checkpoints.back_to(-1)
            shutil.rmtree(folder / KEPT, ignore_errors=True)  # for loggers, too, it is another run
        found = checkpoints.newest(job.view.line)
        if found is None and self._given_checkpoint is not None:
            found = self._given_checkpoint
            self._take_over(found, folder)
        if found is None and not self._tried:
            self._tell_of_others(job)
        self._tried = True
        return found

    def _take_over(self, found: Checkpoint, folder: Path) -> None:
        """Copies what the run of a given checkpoint wrote until then."""
        before = found.folder.parents[1]
        try:
            copy_until(before / HISTORY, folder / HISTORY, found.step)
            shutil.copy(before / METRICS, folder / METRICS)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(
                f"align.checkpoint.resume={found.folder} is not where its run left it ({error})"
            ) from None

    def _tell_of_others(self, job: Job) -> None:
        """Says which unfinished run is the most like this one, and why it is not gone on from."""
        found = []
        for folder in (self.store.root / "unfinished" / self.name).glob("*"):
            other = Checkpoints(folder / CHECKPOINTS, 1).newest_unread()
            if other is not None:
                found.append((differences(other.state["config"], self.settings), other))
        if found:
            different, other = min(found, key=lambda pair: len(pair[0]))
            why = f"differs in {changes_told(different)}" if different else "was made by other code"
            more = (
                "" if different else f"; align.checkpoint.resume={other.folder} goes on from it all the same"
            )
            job.view.line(
                f"align: begins at step 0; a run that is unfinished at step {other.step} {why}{more}"
            )

    def logged(self, job: Job, folder: Path, step: int) -> Run:
        """What loggers are told of it when it goes on from this step."""
        name = job.run.name
        return Run(f"{job.run.parent.name}-{name}" if name.isdigit() else name, self.settings, folder, step)

    def links(self) -> Mapping[str, Path]:
        if not self.done:
            return {}
        return {"align": self.path, "policy": self.policy_path}
