"""The stages of a run: sft, reward_models, baseline, align, evaluate, report.

Each writes one folder of the store, named by the fingerprint of its inputs, and is skipped when that is there.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.artifacts import Artifacts
from actors.baseline_stage import BaselineStage
from actors.controller import Controller
from actors.evaluation import Evaluation
from actors.metrics import StepMetrics
from actors.queue import start_queue
from actors.roles import Roles
from actors.work import seed_of
from rlhf import timeline
from rlhf.config import STAGES, Config, RewardModelConfig, TrainingConfig
from rlhf.data.prepare import RunData, Sources, demonstrations_source, evaluator_source, preferences_source
from rlhf.learn.tasks import AlignTask, BradleyTerryTask, SupervisedTask, Task, batch_indices, save_tokenizer
from rlhf.logs import MetricsWriter
from rlhf.progress import View
from rlhf.store import write_atomic
from rlhf.types import WorkItem

FIT_CHUNK = 20  # steps of supervised training between two reports


class Job:
    """One run on a running Ray. `execute` runs the configured stages in order.

    Roles start when a stage first needs them and serve all later stages.
    """

    def __init__(
        self,
        config: Config,
        data: RunData,
        artifacts: Artifacts,
        roles: Roles,
        run: Path,
        view: View,
        started: float,
    ) -> None:
        self.config, self.data, self.artifacts, self.roles = config, data, artifacts, roles
        self.store, self.run, self.view, self._started = artifacts.store, run, view, started
        self.seconds: dict[str, float] = {}
        self.skipped: list[str] = []

    def execute(self) -> None:
        stages: dict[str, Callable[[], None]] = {
            "sft": self.sft,
            "reward_models": self.reward_models,
            "baseline": self.baseline,
            "align": self.align,
            "evaluate": self.evaluate,
            "report": self.report,
        }
        self.seconds["start"] = time.perf_counter() - self._started
        for name in STAGES:
            if name in self.config.stages:
                started = time.perf_counter()
                stages[name]()
                self.seconds[name] = time.perf_counter() - started
        self.artifacts.link_from(self.run)

    def _skip(self, stage: str, what: str) -> None:
        self.view.line(f"{stage}: skipped, {what}")
        if stage not in self.skipped:
            self.skipped.append(stage)

    def sft(self) -> None:
        policy = self.config.policy
        if policy.path is not None:
            return self._skip("sft", f"policy.path={policy.path} is given")
        if self.store.has("sft", self.artifacts.policy_name):
            return self._skip("sft", f"done before ({self.artifacts.policy_name})")
        from rlhf.learn.tokenise import demonstration_tokens, tokenizer_folder

        with self.roles.start_beside("learner"):
            tokenizer = policy.init_from or str(tokenizer_folder(self.config, self.data, self.store))
            tokens = demonstration_tokens(self.config, tokenizer, demonstrations_source(self.data))
        task = SupervisedTask(policy.init_from, policy.architecture, tokenizer, self.config.seed)

        fit = partial(self._fit, "sft", task, tokens, tokenizer, policy.training)
        self.store.make("sft", self.artifacts.policy_name, fit)
        return None

    def reward_models(self) -> None:
        names, seed = self.artifacts.reward_names, self.config.seed
        for name, model in self.config.reward_models.items():
            source = partial(preferences_source, self.data, name)
            self._reward_model(f"reward_models.{name}", model, f"{name}-{names[name]}", source, seed)
        names, seed = self.artifacts.evaluator_names, self.artifacts.evaluator_seed
        for name, model in self.config.evaluators.items():
            source = partial(evaluator_source, self.data, name)
            made = f"evaluator-{name}-{names[name]}"
            self._reward_model(f"evaluators.{name}", model, made, source, seed)

    def _reward_model(
        self, key: str, model: RewardModelConfig, made: str, source: Callable[[], Sources], seed: int
    ) -> None:
        from rlhf.learn.tokenise import preference_tokens

        if model.path is not None:
            return self._skip("reward_models", f"{key}.path={model.path} is given")
        if self.store.has("reward_models", made):
            return self._skip("reward_models", f"{key} done before ({made})")
        start = model.init_from or self.artifacts.policy_path
        tokens = preference_tokens(
            key, model.chat_template, start, source(), self.config.data.tolerated_share
        )
        task = BradleyTerryTask(key, start, seed)
        assert model.training is not None
        fit = partial(self._fit, key.replace("_models.", " "), task, tokens, start, model.training)
        self.store.make("reward_models", made, fit)
        return None

    def _fit(
        self, name: str, task: Task, data: Any, tokenizer: str, training: TrainingConfig, folder: Path
    ) -> None:
        """Supervised or Bradley-Terry training, saved to `folder` with its tokenizer and metrics."""
        with self.view.stage(name, training.steps) as progress:
            self.roles.learner.load(task, training.weight_decay)
            reference = ray.put(data)
            writer = MetricsWriter(folder, tensorboard=False)
            for start in range(0, training.steps, FIT_CHUNK):
                stop = min(start + FIT_CHUNK, training.steps)
                steps = self.roles.learner.fit(reference, training, self.config.seed, start, stop)
                for i, metrics in enumerate(steps):
                    writer.write(start + i, {"step": start + i + 1, **metrics})
                progress.update(
                    stop, "  ".join(f"{k} {np.mean([m[k] for m in steps]):.3f}" for k in steps[0])
                )
            writer.close()
            self.roles.learner.save(folder)
            save_tokenizer(tokenizer, folder)

    def baseline(self) -> None:
        if self.store.has("baseline", self.artifacts.baseline_name):
            return self._skip("baseline", f"done before ({self.artifacts.baseline_name})")
        with self.view.stage("baseline", 1) as progress:
            found = BaselineStage(self.config, self.data, self.artifacts, self.roles, progress).run()
        summary = found["references"]
        errors = "  ".join(f"{n} {row['standard_error']:.2f}" for n, row in summary.items())
        self.view.line(
            f"baseline: {found['samples']} base responses; median standard error of r_ref: {errors}"
        )
        if "samples_saved" in found:
            self.view.line(f"baseline: {found['samples_saved']} samples saved by the tolerance")

        def fill(folder: Path) -> None:
            self.roles.baseline.ask("save", str(folder / "statistics.npz"))
            write_atomic(folder / "summary.json", json.dumps(found, indent=1))

        self.store.make("baseline", self.artifacts.baseline_name, fill)
        return None

    def align(self) -> None:
        if self.store.has("align", self.artifacts.align_name):
            return self._skip("align", f"done before ({self.artifacts.align_name})")
        c = self.config
        task = AlignTask(
            policy=self.artifacts.policy_path,
            settings=c.algorithm,
            lora=c.policy.lora,
            penalise=c.align.kl_coef != 0,
            max_new_tokens=c.rollout.max_new_tokens,
            dtype=c.deepspeed.dtype,
            seed=c.seed,
        )
        with self.view.stage("align", c.align.steps) as progress:
            self.roles.baseline.ask("load", str(self.artifacts.statistics_path))
            notes = self.roles.learner.load_policy(task, c.align.weight_decay, c.align.max_grad_norm)
            self.roles.generators.load(self.artifacts.policy_path)
            notes = list(dict.fromkeys([*notes, *self.roles.generators.notes, *self.roles.rewards.notes]))
            for note in notes:
                self.view.line(note)

            def fill(folder: Path) -> None:
                write_atomic(folder / "notes.json", json.dumps(notes, indent=1))
                writer = MetricsWriter(folder, c.logging.tensorboard)

                def on_step(metrics: dict[str, float]) -> None:
                    writer.write(int(metrics["step"]), metrics)
                    progress.update(
                        int(metrics["step"]),
                        f"utility {metrics['utility/combined']:.3f}  "
                        + (f"KL {metrics['kl']:.2f} nats  " if "kl" in metrics else "")
                        + f"{metrics['response_tokens']:.0f} tokens",
                    )

                controller = self._controller(on_step)
                controller.run()
                writer.close()
                timeline.write(folder / "timeline.json", controller.spans)
                self.roles.learner.save(folder / "policy")
                save_tokenizer(self.artifacts.policy_path, folder / "policy")

            self.store.make("align", self.artifacts.align_name, fill)
        return None

    def _controller(self, on_step: Callable[[dict[str, float]], None]) -> Controller:
        c = self.config
        per_step = c.align.prompts_per_step // c.rollout.prompts_per_item
        prompts = self.data.prompts

        def work(item: int) -> WorkItem:
            step, part = divmod(item, per_step)
            chosen = batch_indices(len(prompts), c.align.prompts_per_step, step, c.seed)
            mine = chosen[part * c.rollout.prompts_per_item : (part + 1) * c.rollout.prompts_per_item]
            contents = tuple(prompts[i].content for i in mine)
            return WorkItem(item, contents, c.align.samples_per_prompt, seed_of(c.seed, "align", item))

        rewards, utility, rules = self.roles.rewards, self.artifacts.utility, self.artifacts.rules
        return Controller(
            c.align,
            StepMetrics(c.align, c.algorithm),
            per_step,
            work,
            self.roles.generators,
            lambda rollouts: rewards.rewards(rollouts, utility, rules),
            start_queue(),
            self.roles.learner,
            on_step,
        )

    def evaluate(self) -> None:
        if self.store.has("evaluate", self.artifacts.evaluate_name):
            return self._skip("evaluate", f"done before ({self.artifacts.evaluate_name})")
        self.artifacts.made("align", self.artifacts.align_name)
        evaluation = Evaluation(self.config, self.data.eval_prompts, self.artifacts, self.roles)
        with self.view.stage("evaluate", evaluation.total) as progress:
            name = self.artifacts.base_samples_name
            if not self.store.has("base_samples", name):
                self.store.make("base_samples", name, lambda folder: evaluation.base(folder, progress))
            base = self.store.folder("base_samples", name)
            self.store.make(
                "evaluate",
                self.artifacts.evaluate_name,
                lambda folder: evaluation.aligned(base, folder, progress),
            )
        return None

    def report(self) -> None:
        from rlhf.evaluate.report import write_report
        from rlhf.evaluate.run import lexicon, run_record

        evaluated = self.artifacts.made("evaluate", self.artifacts.evaluate_name)
        seconds = {**self.seconds, "total": time.perf_counter() - self._started}
        record = run_record(
            self.config,
            self.run,
            seconds,
            self.skipped,
            self.artifacts.align_path,
            evaluated,
            self.artifacts.statistics_path,
            self.artifacts.rules,
            self.artifacts.utility,
        )
        write_report(record, self.run, lexicon(self.config))
        self.view.line(f"report: {self.run / 'report.html'}")
