"""The reward_models stage: reward models and evaluators trained on preferences, those that are not given."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from actors.stages.fit import fit, trained_by
from actors.stages.sft import Sft
from actors.stages.stage import Output, Stage
from rlhf.code import code_version
from rlhf.config import RewardModelConfig
from rlhf.data.prepare import Sources, evaluator_source, preferences_source
from rlhf.store import fingerprint, source_fingerprint

if TYPE_CHECKING:
    from actors.stages.job import Job

EVALUATOR_SEED = 1_000_003  # added: evaluators are trained by another than the models they check


class RewardModels(Stage):
    name = "reward_models"

    @cached_property
    def names(self) -> dict[str, str]:
        """Of reward models, by their names in the configuration."""
        models = self.config.reward_models
        sources = {n: preferences_source(self.data, n) for n, m in models.items() if m.path is None}
        return self._names(models, sources, self.config.seed)

    @cached_property
    def evaluator_names(self) -> dict[str, str]:
        models = self.config.evaluators
        sources = {n: evaluator_source(self.data, n) for n, m in models.items() if m.path is None}
        return self._names(models, sources, self.config.seed + EVALUATOR_SEED)

    def _names(
        self, models: dict[str, RewardModelConfig], sources: dict[str, Sources], seed: int
    ) -> dict[str, str]:
        names = {}
        for name, model in models.items():
            if model.path is not None:
                names[name] = source_fingerprint(model.path)
                continue
            names[name] = fingerprint(
                "reward",
                code_version("rlhf.learn.tasks", "rlhf.learn.tokenise"),
                source_fingerprint(model.init_from) if model.init_from else self.stages.of(Sft).policy_name,
                source_fingerprint(sources[name]),
                model.chat_template,
                model.training,
                trained_by(self.config),
                seed,
            )
        return names

    @property
    def paths(self) -> dict[str, str]:
        """Where reward models are, by name."""
        models, trained = self.config.reward_models, self._rewards
        return {n: m.path or str(self.made(trained[n])) for n, m in models.items()}

    @property
    def evaluator_paths(self) -> dict[str, str]:
        models, trained = self.config.evaluators, self._evaluators
        return {n: m.path or str(self.made(trained[n])) for n, m in models.items()}

    @property
    def _rewards(self) -> dict[str, Output]:
        return {
            n: Output(f"reward_models.{n}", self.name, f"{n}-{self.names[n]}")
            for n, m in self.config.reward_models.items()
            if m.path is None
        }

    @property
    def _evaluators(self) -> dict[str, Output]:
        return {
            n: Output(f"evaluators.{n}", self.name, f"evaluator-{n}-{self.evaluator_names[n]}")
            for n, m in self.config.evaluators.items()
            if m.path is None
        }

    @property
    def given(self) -> list[str]:
        groups = {"reward_models": self.config.reward_models, "evaluators": self.config.evaluators}
        return [
            f"{group}.{name}.path={model.path} is given"
            for group, models in groups.items()
            for name, model in models.items()
            if model.path is not None
        ]

    @property
    def outputs(self) -> list[Output]:
        return [*self._rewards.values(), *self._evaluators.values()]

    def make(self, job: Job, output: Output, folder: Path) -> None:
        from rlhf.learn.tasks import BradleyTerryTask
        from rlhf.learn.tokenise import preference_tokens

        group, name = output.label.split(".")
        if group == "reward_models":
            model, source = self.config.reward_models[name], preferences_source(self.data, name)
            seed = self.config.seed
        else:
            model, source = self.config.evaluators[name], evaluator_source(self.data, name)
            seed = self.config.seed + EVALUATOR_SEED
        start = model.init_from or self.stages.of(Sft).policy_path
        share = self.config.data.tolerated_share
        tokens = preference_tokens(output.label, model.chat_template, start, source, share)
        assert model.training is not None
        task = BradleyTerryTask(output.label, start, seed)
        fit(job, output.label.replace("_models.", " "), task, tokens, start, model.training, folder)

    def links(self) -> Mapping[str, Path]:
        return {
            f"reward_models/{name}": self.made(output)
            for name, output in self._rewards.items()
            if self.store.has(output.kind, output.name)
        }
