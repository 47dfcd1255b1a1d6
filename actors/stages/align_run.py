"""One way through the align stage, from its beginning or from a checkpoint."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.saver import Saver
from actors.stages.baseline import Baseline
from actors.stages.curve import EvaluationCurve
from actors.stages.sft import Sft
from actors.work import seed_of
from rlhf import timeline
from rlhf.checkpoints import Checkpoint, Checkpoints
from rlhf.files import write_atomic
from rlhf.flow.history import FILE as HISTORY
from rlhf.flow.history import Began, Ended, Evaluated, History
from rlhf.flow.history import Checkpoint as Saved
from rlhf.loggers.loggers import Loggers
from rlhf.logs import MetricsWriter
from rlhf.progress import StageView
from rlhf.types import WorkItem
from rlhf.versions import versions

if TYPE_CHECKING:
    from actors.controller import Controller
    from actors.stages.align import Align
    from actors.stages.job import Job


class AlignRun:
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

    def _tell_more(self) -> None:
        """What was noted of rewards since the stage began."""
        path = self.folder / "notes.json"
        notes = json.loads(path.read_text())
        more = [note for note in self.roles.rewards.latest_notes() if note not in notes]
        for note in more:
            self.job.view.line(note)
        write_atomic(path, json.dumps([*notes, *more], indent=1))

    def train(self) -> None:
        run = self.stage.logged(self.job, self.folder, self.step)
        with Loggers(self.config.logging, self.stage.store.root.parent, run, self.job.view.line) as loggers:
            chosen, version = self._steps(loggers)
        if chosen is not None:
            self._save_policy(chosen, version)

    def _steps(self, loggers: Loggers) -> tuple[int | None, int]:
        """Trains. The step whose policy is kept, None if a signal came before the end, and the last step."""
        writer = MetricsWriter(self.folder, self.step)
        align, items = self.config.align, self.items_per_step
        history = History(self.folder / HISTORY)
        history.begin(Began(self.step, align.steps, items, align.staleness, self.job.why))

        def on_step(found: dict[str, float]) -> None:
            step = int(found["step"])
            writer.write(found)
            loggers.write(step, found)
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
                saver.save(controller.version, self._state())
                return None, controller.version
            early = curve.go_on(controller.version)
            if curve.is_due(controller.version):
                history.add(Evaluated(controller.version))
        self._tell_more()
        history.add(Ended(controller.version, early or ""))
        history.close()
        writer.close()
        timeline.write(self.folder / "timeline.json", list(controller.spans))
        return curve.chosen(controller.version), controller.version

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
