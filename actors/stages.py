"""The stages of a run: sft, reward_models, baseline, align, evaluate, report.

Each writes one folder of the store, named by the fingerprint of its inputs, and is skipped when that is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.artifacts import Artifacts
from actors.controller import Controller
from actors.evaluation import Evaluation
from actors.queue import start_queue
from actors.roles import Roles
from actors.work import seed_of, work_items
from rlhf.config import STAGES, Config, TrainingConfig
from rlhf.data.prepare import RunData, demonstrations_source, preferences_source
from rlhf.learn.tasks import AlignTask, BradleyTerryTask, SupervisedTask, Task, batch_indices, save_tokenizer
from rlhf.logs import MetricsWriter
from rlhf.progress import View
from rlhf.types import Prompt, WorkItem

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

        with self.roles.starting("learner"):
            tokenizer = policy.init_from or str(tokenizer_folder(self.config, self.data, self.store))
            tokens = demonstration_tokens(self.config, tokenizer, demonstrations_source(self.data))
        task = SupervisedTask(policy.init_from, policy.architecture, tokenizer, self.config.seed)

        fit = partial(self._fit, "sft", task, tokens, tokenizer, policy.training)
        self.store.make("sft", self.artifacts.policy_name, fit)
        return None

    def reward_models(self) -> None:
        from rlhf.learn.tokenise import preference_tokens

        for name, model in self.config.reward_models.items():
            made = f"{name}-{self.artifacts.reward_names[name]}"
            if model.path is not None:
                self._skip("reward_models", f"reward_models.{name}.path={model.path} is given")
                continue
            if self.store.has("reward_models", made):
                self._skip("reward_models", f"{name} done before ({self.artifacts.reward_names[name]})")
                continue
            start = model.init_from or self.artifacts.policy_path
            tokens = preference_tokens(self.config, name, start, preferences_source(self.data, name))
            task = BradleyTerryTask(name, start, self.config.seed)

            assert model.training is not None
            fit = partial(self._fit, f"reward {name}", task, tokens, start, model.training)
            self.store.make("reward_models", made, fit)

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
        prompts = self.data.prompts + self.data.eval_prompts
        items = work_items(
            prompts,
            self.config.rollout.prompts_per_item,
            self.config.baseline.samples,
            self.config.seed,
            "baseline",
        )
        with self.view.stage("baseline", len(items)) as progress:
            with self.roles.starting("rewards"):
                self.roles.generators.load(self.artifacts.policy_path)
            updates = []
            for done, sampled in enumerate(self.roles.generators.sample(items), start=1):
                raw = self.roles.rewards.raw(sampled.rollouts)
                updates.append(self.roles.estimator.update.remote(sampled.rollouts, raw))
                progress.update(done, f"{done * items[0].samples * items[0].groups} base responses")
            ray.get([*updates, *self._canned(prompts)])
            digest = ray.get(self.roles.estimator.freeze.remote())

        def fill(folder: Path) -> None:
            ray.get(self.roles.estimator.save.remote(str(folder / "statistics.npz")))
            (folder / "digest").write_text(digest)

        self.store.make("baseline", self.artifacts.baseline_name, fill)
        return None

    def _canned(self, prompts: Sequence[Prompt]) -> list[ray.ObjectRef]:
        """Rewards of the canned responses to every prompt, on their way to the estimator."""
        updates = []
        for name, model in self.config.reward_models.items():
            for i, canned in enumerate(model.canned if model.reference == "canned" else []):
                contents = [p.content for p in prompts]
                rewards = self.roles.rewards.canned(name, contents, [canned] * len(prompts))
                ids = np.array([p.id for p in prompts], np.uint64)
                updates.append(self.roles.estimator.update_canned.remote(name, ids, rewards, i))
        return updates

    def align(self) -> None:
        if self.store.has("align", self.artifacts.align_name):
            return self._skip("align", f"done before ({self.artifacts.align_name})")
        c = self.config
        penalise = c.align.kl_coef != 0
        task = AlignTask(self.artifacts.policy_path, c.algorithm.name, c.algorithm.importance_cap, penalise)
        with self.view.stage("align", c.align.steps) as progress:
            ray.get(self.roles.estimator.load.remote(str(self.artifacts.statistics_path)))
            self.roles.learner.load(task, c.align.weight_decay, c.align.max_grad_norm)
            self.roles.generators.load(self.artifacts.policy_path)

            def fill(folder: Path) -> None:
                writer = MetricsWriter(folder, c.logging.tensorboard)

                def on_step(metrics: dict[str, float]) -> None:
                    writer.write(int(metrics["step"]), metrics)
                    progress.update(
                        int(metrics["step"]),
                        f"utility {metrics['utility/combined']:.3f}  KL {metrics['kl']:.2f} nats  "
                        f"{metrics['response_tokens']:.0f} tokens",
                    )

                self._controller(on_step).run()
                writer.close()
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

        return Controller(
            c.align,
            per_step,
            work,
            self.roles.generators,
            self.roles.rewards,
            start_queue(),
            self.roles.learner,
            on_step,
        )

    def evaluate(self) -> None:
        if self.store.has("evaluate", self.artifacts.evaluate_name):
            return self._skip("evaluate", f"done before ({self.artifacts.evaluate_name})")
        aligned = self.artifacts.align_path / "policy"
        ray.get(self.roles.estimator.load.remote(str(self.artifacts.statistics_path)))
        evaluation = Evaluation(
            self.config,
            self.data.eval_prompts,
            self.roles.generators,
            self.roles.rewards,
            self.artifacts.statistics_path,
            self.artifacts.rules,
        )
        with self.view.stage("evaluate", evaluation.total) as progress:
            self.store.make(
                "evaluate",
                self.artifacts.evaluate_name,
                lambda folder: evaluation.run(self.artifacts.policy_path, str(aligned), folder, progress),
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
        )
        write_report(record, self.run, lexicon(self.config))
        self.view.line(f"report: {self.run / 'report.html'}")
