"""The stages of a run: sft, reward_models, baseline, align, evaluate, report.

Each writes one folder of the store, named by the fingerprint of its inputs, and is skipped when that is there.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import ray

from actors.baseline import start_baseline
from actors.cluster import Cluster
from actors.controller import Controller
from actors.evaluation import Evaluation
from actors.generator import GeneratorPool
from actors.learner import LearnerGroup
from actors.queue import start_queue
from actors.reward_pool import RewardPool
from actors.work import seed_of, work_items
from rlhf.config import STAGES, Config, TrainingConfig
from rlhf.data.prepare import RunData, demonstrations_source, preferences_source
from rlhf.learn.tasks import AlignTask, BradleyTerryTask, SupervisedTask, Task, batch_indices, save_tokenizer
from rlhf.logs import MetricsWriter
from rlhf.progress import View
from rlhf.store import Store, fingerprint, link, source_fingerprint
from rlhf.types import Prompt, WorkItem
from rlhf.utility.pipeline import Utility
from rlhf.utility.statistics import ReferenceRule

FIT_CHUNK = 20  # steps of supervised training between two reports


class Job:
    """One run on a running Ray. `execute` runs the configured stages in order.

    Roles start when a stage first needs them and serve all later stages.
    """

    def __init__(self, config: Config, data: RunData, store: Store, run: Path, view: View) -> None:
        self.config, self.data, self.store, self.run, self.view = config, data, store, run, view
        self.seconds: dict[str, float] = {}
        self.skipped: list[str] = []
        self._started = time.perf_counter()

    def execute(self) -> None:
        stages: dict[str, Callable[[], None]] = {
            "sft": self.sft,
            "reward_models": self.reward_models,
            "baseline": self.baseline,
            "align": self.align,
            "evaluate": self.evaluate,
            "report": self.report,
        }
        for name in STAGES:
            if name in self.config.stages:
                started = time.perf_counter()
                stages[name]()
                self.seconds[name] = time.perf_counter() - started
        self._link_outputs()

    def stop(self) -> None:
        """Ends what the run started; Ray too, if the run started it."""
        if "rewards" in self.__dict__:
            self.rewards.stop()
        if "cluster" in self.__dict__:
            self.cluster.stop()

    # ---- fingerprints: what goes into each stage -------------------------------------------------------------

    @cached_property
    def policy_name(self) -> str:
        policy = self.config.policy
        if policy.path is not None:
            return source_fingerprint(policy.path)
        source = demonstrations_source(self.data)
        start = policy.init_from and source_fingerprint(policy.init_from)
        return fingerprint(
            "sft", policy, start, source_fingerprint(source), self.config.deepspeed, self.config.seed
        )

    @cached_property
    def reward_names(self) -> dict[str, str]:
        names = {}
        for name, model in self.config.reward_models.items():
            if model.path is not None:
                names[name] = source_fingerprint(model.path)
                continue
            start = source_fingerprint(model.init_from) if model.init_from else self.policy_name
            pairs = source_fingerprint(preferences_source(self.data, name))
            names[name] = fingerprint(
                "reward",
                start,
                pairs,
                model.chat_template,
                model.training,
                self.config.deepspeed,
                self.config.seed,
            )
        return names

    @cached_property
    def baseline_name(self) -> str:
        canned = {n: m.canned for n, m in self.config.reward_models.items() if m.reference == "canned"}
        return fingerprint(
            "baseline",
            self.policy_name,
            self.reward_names,
            self.data.prompts_fingerprint(),
            self.config.rollout,
            self.config.baseline.samples,
            canned,
            self.config.seed,
        )

    @cached_property
    def align_name(self) -> str:
        c = self.config
        rules = {n: vars(rule) for n, rule in self.rules.items()}
        return fingerprint(
            "align",
            self.baseline_name,
            rules,
            self.utility,
            c.algorithm,
            c.align,
            c.rollout,
            c.deepspeed,
            c.seed,
        )

    @cached_property
    def evaluate_name(self) -> str:
        return fingerprint("evaluate", self.align_name, self.config.evaluate, self.config.data.judge)

    # ---- outputs of stages ---------------------------------------------------------------------------------

    @property
    def policy_path(self) -> str:
        return self.config.policy.path or str(self._made("sft", self.policy_name))

    @property
    def reward_paths(self) -> dict[str, str]:
        models = self.config.reward_models
        return {
            n: m.path or str(self._made("reward_models", f"{n}-{self.reward_names[n]}"))
            for n, m in models.items()
        }

    @property
    def statistics_path(self) -> Path:
        return self._made("baseline", self.baseline_name) / "statistics.npz"

    @property
    def align_path(self) -> Path:
        return self._made("align", self.align_name)

    def _made(self, stage: str, name: str) -> Path:
        if not self.store.has(stage, name):
            raise ValueError(
                f"stages={self.config.stages}: stage {stage} has no output for this configuration; add it to stages"
            )
        return self.store.folder(stage, name)

    def _skip(self, stage: str, what: str) -> None:
        self.view.line(f"{stage}: skipped, {what}")
        if stage not in self.skipped:
            self.skipped.append(stage)

    # ---- roles ---------------------------------------------------------------------------------------------

    @cached_property
    def cluster(self) -> Cluster:
        started = time.perf_counter()
        cluster = Cluster(self.config)
        self.seconds["ray"] = time.perf_counter() - started
        self.view.line(f"ray: {cluster.describe()}, started in {self.seconds['ray']:.1f} s")
        return cluster

    @cached_property
    def utility(self) -> Utility:
        weights = {name: model.weight for name, model in self.config.reward_models.items()}
        return Utility(self.config.utility.transform, self.config.utility.combine, weights)

    @cached_property
    def rules(self) -> dict[str, ReferenceRule]:
        b = self.config.baseline
        return {
            name: ReferenceRule(kind=m.reference, level=b.level, estimator=b.estimator, constant=m.constant)
            for name, m in self.config.reward_models.items()
        }

    @cached_property
    def learner(self) -> LearnerGroup:
        assert self.cluster
        resources = self.config.resources
        return LearnerGroup(self.config.deepspeed, resources.learner, resources.master_port)

    @cached_property
    def generators(self) -> GeneratorPool:
        assert self.cluster
        return GeneratorPool(
            self.config.rollout, self.config.policy.chat_template, self.config.resources.generators
        )

    @cached_property
    def estimator(self) -> Any:
        assert self.cluster
        return start_baseline(self.rules)

    @cached_property
    def rewards(self) -> RewardPool:
        return RewardPool(self.config, self.reward_paths, self.estimator, self.utility)

    # ---- stages --------------------------------------------------------------------------------------------

    def sft(self) -> None:
        policy = self.config.policy
        if policy.path is not None:
            return self._skip("sft", f"policy.path={policy.path} is given")
        if self.store.has("sft", self.policy_name):
            return self._skip("sft", f"done before ({self.policy_name})")
        from rlhf.learn.tokenise import demonstration_tokens, tokenizer_folder

        tokenizer = policy.init_from or str(tokenizer_folder(self.config, self.data, self.store))
        tokens = demonstration_tokens(self.config, tokenizer, demonstrations_source(self.data))
        task = SupervisedTask(policy.init_from, policy.architecture, tokenizer, self.config.seed)

        def fill(folder: Path) -> None:
            self._fit("sft", task, tokens, policy.training, folder)
            save_tokenizer(tokenizer, folder)

        self.store.make("sft", self.policy_name, fill)
        return None

    def reward_models(self) -> None:
        from rlhf.learn.tokenise import preference_tokens

        for name, model in self.config.reward_models.items():
            made = f"{name}-{self.reward_names[name]}"
            if model.path is not None:
                self._skip("reward_models", f"reward_models.{name}.path={model.path} is given")
                continue
            if self.store.has("reward_models", made):
                self._skip("reward_models", f"{name} done before ({self.reward_names[name]})")
                continue
            start = model.init_from or self.policy_path
            tokens = preference_tokens(self.config, name, start, preferences_source(self.data, name))
            task = BradleyTerryTask(name, start, self.config.seed)

            def fill(folder: Path, n: str = name, t: Task = task, d: Any = tokens, s: str = start) -> None:
                self._fit(f"reward {n}", t, d, self.config.reward_models[n].training, folder)
                save_tokenizer(s, folder)

            self.store.make("reward_models", made, fill)

    def _fit(self, name: str, task: Task, data: Any, training: TrainingConfig, folder: Path) -> None:
        """Supervised or Bradley-Terry training, saved to `folder` with its metrics."""
        with self.view.stage(name, training.steps) as progress:
            self.learner.load(task, training.weight_decay)
            reference = ray.put(data)
            writer = MetricsWriter(folder, tensorboard=False)
            for start in range(0, training.steps, FIT_CHUNK):
                stop = min(start + FIT_CHUNK, training.steps)
                steps = self.learner.fit(reference, training, self.config.seed, start, stop)
                for i, metrics in enumerate(steps):
                    writer.write(start + i, {"step": start + i + 1, **metrics})
                progress.update(
                    stop, "  ".join(f"{k} {np.mean([m[k] for m in steps]):.3f}" for k in steps[0])
                )
            writer.close()
            self.learner.save(folder)

    def baseline(self) -> None:
        if self.store.has("baseline", self.baseline_name):
            return self._skip("baseline", f"done before ({self.baseline_name})")
        prompts = self.data.prompts + self.data.eval_prompts
        items = work_items(
            prompts,
            self.config.rollout.prompts_per_item,
            self.config.baseline.samples,
            self.config.seed,
            "baseline",
        )
        with self.view.stage("baseline", len(items)) as progress:
            self.generators.load(self.policy_path)
            updates = []
            for done, sampled in enumerate(self.generators.sample(items), start=1):
                raw = self.rewards.raw(sampled.rollouts)
                updates.append(self.estimator.update.remote(sampled.rollouts, raw))
                progress.update(done, f"{done * items[0].samples * items[0].groups} base responses")
            ray.get([*updates, *self._canned(prompts)])
            digest = ray.get(self.estimator.freeze.remote())

        def fill(folder: Path) -> None:
            ray.get(self.estimator.save.remote(str(folder / "statistics.npz")))
            (folder / "digest").write_text(digest)

        self.store.make("baseline", self.baseline_name, fill)
        return None

    def _canned(self, prompts: Sequence[Prompt]) -> list[ray.ObjectRef]:
        """Rewards of the canned responses to every prompt, on their way to the estimator."""
        updates = []
        for name, model in self.config.reward_models.items():
            for i, canned in enumerate(model.canned if model.reference == "canned" else []):
                contents = [p.content for p in prompts]
                rewards = self.rewards.canned(name, contents, [canned] * len(prompts))
                ids = np.array([p.id for p in prompts], np.uint64)
                updates.append(self.estimator.update_canned.remote(name, ids, rewards, i))
        return updates

    def align(self) -> None:
        if self.store.has("align", self.align_name):
            return self._skip("align", f"done before ({self.align_name})")
        c = self.config
        penalise = c.align.kl_coef != 0
        task = AlignTask(self.policy_path, c.algorithm.name, c.algorithm.importance_cap, penalise)
        with self.view.stage("align", c.align.steps) as progress:
            ray.get(self.estimator.load.remote(str(self.statistics_path)))
            self.learner.load(task, c.align.weight_decay, c.align.max_grad_norm)
            self.generators.load(self.policy_path)

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
                self.learner.save(folder / "policy")
                save_tokenizer(self.policy_path, folder / "policy")

            self.store.make("align", self.align_name, fill)
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
            c.align, per_step, work, self.generators, self.rewards, start_queue(), self.learner, on_step
        )

    def evaluate(self) -> None:
        if self.store.has("evaluate", self.evaluate_name):
            return self._skip("evaluate", f"done before ({self.evaluate_name})")
        aligned = self.align_path / "policy"
        ray.get(self.estimator.load.remote(str(self.statistics_path)))
        evaluation = Evaluation(
            self.config,
            self.data.eval_prompts,
            self.generators,
            self.rewards,
            self.statistics_path,
            self.rules,
        )
        with self.view.stage("evaluate", evaluation.total) as progress:
            self.store.make(
                "evaluate",
                self.evaluate_name,
                lambda folder: evaluation.run(self.policy_path, str(aligned), folder, progress),
            )
        return None

    def report(self) -> None:
        from rlhf.evaluate.report import write_report
        from rlhf.evaluate.run import lexicon, run_record

        evaluated = self._made("evaluate", self.evaluate_name)
        seconds = {**self.seconds, "total": time.perf_counter() - self._started}
        record = run_record(
            self.config,
            self.run,
            seconds,
            self.skipped,
            self.align_path,
            evaluated,
            self.statistics_path,
            self.rules,
        )
        write_report(record, self.run, lexicon(self.config))
        self.view.line(f"report: {self.run / 'report.html'}")

    def _link_outputs(self) -> None:
        """Points from the run's folder to what its stages made."""
        if self.config.policy.path is None and self.store.has("sft", self.policy_name):
            link(self.run / "base_policy", Path(self.policy_path))
        for name, model in self.config.reward_models.items():
            folder = f"{name}-{self.reward_names[name]}"
            if model.path is None and self.store.has("reward_models", folder):
                link(self.run / "reward_models" / name, self.store.folder("reward_models", folder))
        for stage, name in (("baseline", self.baseline_name), ("align", self.align_name)):
            if self.store.has(stage, name):
                link(self.run / stage, self.store.folder(stage, name))
        if self.store.has("align", self.align_name):
            link(self.run / "policy", self.align_path / "policy")
        if self.store.has("evaluate", self.evaluate_name):
            link(self.run / "evaluate", self.store.folder("evaluate", self.evaluate_name))
