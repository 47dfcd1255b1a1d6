"""What the stages make: each output's name (a fingerprint of what goes in) and its place in the store."""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

from rlhf.config import Config, RewardModelConfig
from rlhf.data.prepare import RunData, Sources, demonstrations_source, evaluator_source, preferences_source
from rlhf.store import Store, fingerprint, link, source_fingerprint
from rlhf.utility.pipeline import Utility
from rlhf.utility.statistics import ReferenceRule


class Artifacts:
    """Names and places. A path of something that is not there raises a ValueError that names the stage to run."""

    def __init__(self, config: Config, data: RunData, store: Store) -> None:
        self.config, self.data, self.store = config, data, store

    @cached_property
    def utility(self) -> Utility:
        weights = {name: model.weight for name, model in self.config.reward_models.items()}
        utility = self.config.utility
        return Utility(utility.transform, utility.combine, utility.parameters, weights)

    @cached_property
    def rules(self) -> dict[str, ReferenceRule]:
        b = self.config.baseline
        return {
            name: ReferenceRule(kind=m.reference, level=b.level, estimator=b.estimator, constant=m.constant)
            for name, m in self.config.reward_models.items()
        }

    @cached_property
    def evaluator_rules(self) -> dict[str, ReferenceRule]:
        """Of what wins by an evaluator: the same in every run, whatever its own references are."""
        level = self.config.evaluate.level
        return {
            name: ReferenceRule(kind=m.reference, level=level, estimator="empirical", constant=m.constant)
            for name, m in self.config.evaluators.items()
        }

    @cached_property
    def policy_name(self) -> str:
        policy = self.config.policy
        if policy.path is not None:
            return source_fingerprint(policy.path)
        source = demonstrations_source(self.data)
        start = policy.init_from and source_fingerprint(policy.init_from)
        trained = replace(policy, lora=None)  # adapters come with alignment
        return fingerprint(
            "sft", trained, start, source_fingerprint(source), self.config.deepspeed, self.config.seed
        )

    @cached_property
    def reward_names(self) -> dict[str, str]:
        models = self.config.reward_models
        sources = {n: preferences_source(self.data, n) for n, m in models.items() if m.path is None}
        return self._trained_names(models, sources, self.config.seed)

    @cached_property
    def evaluator_names(self) -> dict[str, str]:
        models = self.config.evaluators
        sources = {n: evaluator_source(self.data, n) for n, m in models.items() if m.path is None}
        return self._trained_names(models, sources, self.evaluator_seed)

    @property
    def evaluator_seed(self) -> int:
        """Of the evaluators' training: another than that of the models they check."""
        return self.config.seed + 1_000_003

    def _trained_names(
        self, models: dict[str, RewardModelConfig], sources: dict[str, Sources], seed: int
    ) -> dict[str, str]:
        names = {}
        for name, model in models.items():
            if model.path is not None:
                names[name] = source_fingerprint(model.path)
                continue
            start = source_fingerprint(model.init_from) if model.init_from else self.policy_name
            pairs = source_fingerprint(sources[name])
            names[name] = fingerprint(
                "reward", start, pairs, model.chat_template, model.training, self.config.deepspeed, seed
            )
        return names

    @cached_property
    def baseline_keys(self) -> dict[str, str]:
        """What the base policy's rewards by each model depend on, whatever the prompts and their number."""
        c = self.config
        r = c.rollout
        sampled = (
            self.policy_name,
            c.policy.chat_template,
            r.max_new_tokens,
            r.temperature,
            r.dtype,
            c.dtype,
        )
        models = c.reward_models
        return {
            n: fingerprint(sampled, name, models[n].chat_template) for n, name in self.reward_names.items()
        }

    @cached_property
    def baseline_name(self) -> str:
        b, models = self.config.baseline, self.config.reward_models
        adaptive = (
            (b.tolerance, b.max_samples, {n: vars(r) for n, r in self.rules.items()}) if b.tolerance else None
        )
        return fingerprint(
            "baseline",
            self.baseline_keys,
            self.data.prompts_fingerprint(),
            self.config.rollout.prompts_per_item,
            b.samples,
            b.exact,
            b.known and source_fingerprint(b.known),
            adaptive,
            {n: m.canned for n, m in models.items() if m.reference == "canned"},
            {n: self.data.column(m.column) for n, m in models.items() if m.reference == "column"},
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
            c.policy.lora,
            c.rollout,
            c.deepspeed,
            c.seed,
        )

    @cached_property
    def base_samples_name(self) -> str:
        """Of the base policy's evaluation samples, which the runs of a sweep share."""
        c = self.config
        return fingerprint(
            "base samples",
            self.baseline_keys,
            self.evaluator_names,
            {n: (m.chat_template, m.reference, m.canned, m.constant) for n, m in c.evaluators.items()},
            self._evaluator_columns(),
            c.evaluate.level if c.evaluators else None,
            [p.id for p in self.data.eval_prompts],
            c.rollout.prompts_per_item,
            (c.evaluate.samples, c.evaluate.judge_samples),
            c.data.judge,
            c.seed,
        )

    def _evaluator_columns(self) -> dict[str, list[tuple[int, float]]]:
        found, models = self.data.eval_prompts, self.config.evaluators
        return {n: self.data.column(m.column, found) for n, m in models.items() if m.reference == "column"}

    @cached_property
    def evaluate_name(self) -> str:
        return fingerprint("evaluate", self.align_name, self.base_samples_name)

    @property
    def policy_path(self) -> str:
        return self.config.policy.path or str(self.made("sft", self.policy_name))

    @property
    def reward_paths(self) -> dict[str, str]:
        models = self.config.reward_models
        return {
            n: m.path or str(self.made("reward_models", f"{n}-{self.reward_names[n]}"))
            for n, m in models.items()
        }

    @property
    def evaluator_paths(self) -> dict[str, str]:
        names = self.evaluator_names
        return {
            n: m.path or str(self.made("reward_models", f"evaluator-{n}-{names[n]}"))
            for n, m in self.config.evaluators.items()
        }

    @property
    def statistics_path(self) -> Path:
        return self.made("baseline", self.baseline_name) / "statistics.npz"

    @property
    def align_path(self) -> Path:
        return self.made("align", self.align_name)

    def made(self, stage: str, name: str) -> Path:
        if not self.store.has(stage, name):
            raise ValueError(
                f"stages={self.config.stages}: stage {stage} has no output for this configuration; add it to stages"
            )
        return self.store.folder(stage, name)

    def complete(self) -> bool:
        """Whether every configured stage that needs Ray has its output."""
        rewards = [
            f"{n}-{self.reward_names[n]}" for n, m in self.config.reward_models.items() if m.path is None
        ]
        rewards += [
            f"evaluator-{n}-{self.evaluator_names[n]}"
            for n, m in self.config.evaluators.items()
            if m.path is None
        ]
        outputs = {
            "sft": [self.policy_name] if self.config.policy.path is None else [],
            "reward_models": rewards,
            "baseline": [self.baseline_name],
            "align": [self.align_name],
            "evaluate": [self.evaluate_name],
            "report": [],
        }
        return all(self.store.has(stage, name) for stage in self.config.stages for name in outputs[stage])

    def link_from(self, run: Path) -> None:
        """Points from the run's folder to what its stages made."""
        if self.config.policy.path is None and self.store.has("sft", self.policy_name):
            link(run / "base_policy", Path(self.policy_path))
        for name, model in self.config.reward_models.items():
            folder = f"{name}-{self.reward_names[name]}"
            if model.path is None and self.store.has("reward_models", folder):
                link(run / "reward_models" / name, self.store.folder("reward_models", folder))
        for stage, name in (("baseline", self.baseline_name), ("align", self.align_name)):
            if self.store.has(stage, name):
                link(run / stage, self.store.folder(stage, name))
        if self.store.has("align", self.align_name):
            link(run / "policy", self.align_path / "policy")
        if self.store.has("evaluate", self.evaluate_name):
            link(run / "evaluate", self.store.folder("evaluate", self.evaluate_name))
