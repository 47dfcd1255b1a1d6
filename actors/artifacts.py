"""What the stages make: each output's name (a fingerprint of what goes in) and its place in the store."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from rlhf.config import Config
from rlhf.data.prepare import RunData, demonstrations_source, preferences_source
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
        return Utility(self.config.utility.transform, self.config.utility.combine, weights)

    @cached_property
    def rules(self) -> dict[str, ReferenceRule]:
        b = self.config.baseline
        return {
            name: ReferenceRule(kind=m.reference, level=b.level, estimator=b.estimator, constant=m.constant)
            for name, m in self.config.reward_models.items()
        }

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
