"""The align stage: the policy trained to be good by all reward models, with its checkpoints and its way back."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.saver import Saver
from actors.signals import orderly
from actors.stages.base_samples import BaseSamples
from actors.stages.baseline import Baseline
from actors.stages.curve import EvaluationCurve
from actors.stages.sft import Sft
from actors.stages.stage import Output, Stage, Stages
from actors.work import seed_of
from rlhf import timeline
from rlhf.changes import check_same, differences
from rlhf.changes import told as changes_told
from rlhf.checkpoints import Checkpoint, Checkpoints, read
from rlhf.code import code_version
from rlhf.files import write_atomic
from rlhf.flow.history import Began, Ended, Evaluated, History, copy_until
from rlhf.flow.history import Checkpoint as Saved
from rlhf.logs import METRICS
from rlhf.progress import StageView
from rlhf.shown import redacted_values
from rlhf.store import CHECKPOINTS, fingerprint
from rlhf.types import WorkItem
from rlhf.utility.pipeline import Utility
from rlhf.versions import versions

if TYPE_CHECKING:
    from actors.controller import Controller
    from actors.stages.job import Job

HISTORY = "history.jsonl"
CODE = (
    "rlhf.learn.align_task",
    "rlhf.learn.tasks",
    "rlhf.generate.transformers_engine",
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
        weights = {name: model.weight for name, model in self.config.reward_models.items()}
        utility = self.config.utility
        return Utility(utility.transform, utility.combine, utility.parameters, weights)

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
            self.utility,
            c.algorithm,
            align,
            c.policy.lora,
            c.rollout,
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
            run = _Run(self, job, folder, checkpoints, progress, asked)
            run.load(begun)
            run.train()

    def _begun(self, checkpoints: Checkpoints, folder: Path, job: Job) -> Checkpoint | None:
        """The checkpoint to go on from; None: there is none."""
        if self.config.align.checkpoint.resume == "never" and not self._tried:
            checkpoints.back_to(-1)
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

    def links(self) -> Mapping[str, Path]:
        if not self.done:
            return {}
        return {"align": self.path, "policy": self.policy_path}


class _Run:
    """One way through the stage, from its beginning or from a checkpoint."""

    def __init__(
        self,
        stage: Align,
        job: Job,
        folder: Path,
        checkpoints: Checkpoints,
        progress: StageView,
        asked: Callable[[], bool],
    ) -> None:
        from actors.metrics import StepMetrics

        self.stage, self.job, self.folder, self.checkpoints = stage, job, folder, checkpoints
        self.progress, self.asked, self.config, self.roles = progress, asked, stage.config, job.roles
        self.metrics = StepMetrics(self.config.align, self.config.algorithm, str(job.run / "inspect"))
        self.policy = stage.stages.of(Sft).policy_path
        self.items_per_step = self.config.align.prompts_per_step // self.config.rollout.prompts_per_item
        self._versions = versions()
        self.step = 0

    def load(self, begun: Checkpoint | None) -> None:
        """Brings every role to where the checkpoint was written."""
        from rlhf.learn.align_task import AlignTask

        c, roles, line = self.config, self.roles, self.job.view.line
        task = AlignTask(
            policy=self.policy,
            settings=c.algorithm,
            lora=c.policy.lora,
            penalise=c.align.kl_coef != 0 or c.evaluate.every is not None,
            max_new_tokens=c.rollout.max_new_tokens,
            dtype=c.deepspeed.dtype,
            seed=c.seed,
        )
        roles.baseline.load(self.stage.stages.of(Baseline).statistics_path)
        notes = roles.learner.load_policy(task, c.align.weight_decay, c.align.max_grad_norm)
        roles.generators.load(self.policy)
        if begun is not None:
            self.step = begun.step
            roles.learner.restore(begun.folder)
            self.metrics.restore(begun.state["metrics"])
            roles.generators.set_weights(roles.learner.weights(), self.step)
            line(f"align: goes on from step {self.step}")
        notes = list(dict.fromkeys([*notes, *roles.generators.notes, *roles.rewards.notes]))
        for note in notes:
            line(note)
        write_atomic(self.folder / "notes.json", json.dumps(notes, indent=1))

    def train(self) -> None:
        from rlhf.logs import MetricsWriter

        writer = MetricsWriter(self.folder, self.config.logging.tensorboard, self.step)
        align, items = self.config.align, self.items_per_step
        history = History(self.folder / HISTORY)
        history.begin(Began(self.step, align.steps, items, align.staleness, self.job.why))

        def on_step(found: dict[str, float]) -> None:
            step = int(found["step"])
            writer.write(step, found)
            self.job.progressed()
            text = f"utility {found.get('utility/combined', math.nan):.3f}  "
            text += f"KL {found['kl']:.2f} nats  " if "kl" in found else ""
            self.progress.update(step, text + f"{found['response_tokens']:.0f} tokens")

        curve = EvaluationCurve(self.stage, self.job, self.folder, self.step)

        def saved(step: int) -> None:
            writer.sync()
            history.add(Saved(step))

        saver = Saver(
            self.config.align.checkpoint,
            self.checkpoints,
            self.roles.learner,
            self.step,
            before=saved,
            also=curve.is_due,
            besides=curve.best,
        )
        controller = self._controller(saver, history, on_step)
        early = curve.go_on(self.step)
        while controller.version < align.steps and early is None:
            controller.run(curve.next_stop(controller.version))
            saver.finish()
            if self.asked():
                return saver.save(controller.version, self._state())
            early = curve.go_on(controller.version)
            if curve.is_due(controller.version):
                history.add(Evaluated(controller.version))
        history.add(Ended(controller.version, early or ""))
        history.close()
        writer.close()
        timeline.write(self.folder / "timeline.json", list(controller.spans))
        self._save_policy(curve.chosen(controller.version), controller.version)
        return None

    def _save_policy(self, step: int, held: int) -> None:
        """Of the step that was chosen; the learner holds that of the step `held`."""
        from rlhf.learn.tasks import save_tokenizer

        if step != held:
            self.roles.learner.restore(self.checkpoints.at(step).folder)
        self.roles.learner.save(self.folder / "policy")
        save_tokenizer(self.policy, self.folder / "policy")

    def _state(self) -> dict[str, Any]:
        """What a checkpoint says beside the learner's state."""
        return {"metrics": self.metrics.state(), "config": self.stage.settings, "versions": self._versions}

    def _controller(
        self, saver: Saver, history: History, on_step: Callable[[dict[str, float]], None]
    ) -> Controller:
        from actors.controller import Controller, Parts
        from actors.queue import Queue

        c, rewards = self.config, self.roles.rewards
        baseline = self.stage.stages.of(Baseline)
        utility, rules, statistics = self.stage.utility, baseline.rules, baseline.statistics_path
        parts = Parts(
            self._work,
            self.roles.generators,
            lambda rollouts: rewards.rewards(rollouts, utility, rules, statistics),
            Queue(c.recovery),
            self.roles.learner,
            self.metrics,
            saver,
            history,
            self._state,
            on_step,
            self.asked,
        )
        return Controller(c.align, self.items_per_step, self.step, c.recovery.silence, parts)

    def _work(self, item: int) -> WorkItem:
        """Work item `item` of the run, the same whenever it is asked for."""
        from rlhf.learn.tasks import batch_indices

        c, prompts = self.config, self.stage.data.prompts
        size = c.rollout.prompts_per_item
        step, part = divmod(item, self.items_per_step)
        chosen = batch_indices(len(prompts), c.align.prompts_per_step, step, c.seed)
        contents = tuple(prompts[i].content for i in chosen[part * size : (part + 1) * size])
        return WorkItem(item, contents, c.align.samples_per_prompt, seed_of(c.seed, "align", item))
