"""The reward_models stage: reward models and evaluators trained on preferences, those that are not given, and the unit
of rewards that come with pairs to calibrate them on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.failures import Call
from actors.stages.fit import fit, trained_by
from actors.stages.held_out import CALIBRATION, CURVE, HeldOut
from actors.stages.sft import Sft
from actors.stages.stage import Output, Stage
from rlhf.code import code_version, source_code
from rlhf.data.preferences import load_preferences
from rlhf.data.prepare import Sources, evaluator_source, preferences_source
from rlhf.data.rows import sources as resolved
from rlhf.files import write_atomic
from rlhf.sources.classifier import ClassifierSource
from rlhf.sources.source import Source, rewards_of
from rlhf.store import fingerprint, source_fingerprint
from rlhf.utility.calibration import calibrate
from rlhf.utility.scales import BRADLEY_TERRY, Scale

if TYPE_CHECKING:
    from actors.stages.job import Job

GROUPS = ("reward_models", "evaluators")
EVALUATOR_SEED = 1_000_003  # added: evaluators are trained by another than the models they check
BATCH = 64  # pairs scored in one call


class RewardModels(Stage):
    name = "reward_models"

    @cached_property
    def names(self) -> dict[str, str]:
        """Of rewards, by their names in the configuration."""
        return self._names("reward_models")

    @cached_property
    def evaluator_names(self) -> dict[str, str]:
        return self._names("evaluators")

    def sources(self, group: str) -> dict[str, Source]:
        """Those of a group of the configuration: reward_models or evaluators."""
        return getattr(self.config, group)

    def seed(self, group: str) -> int:
        return self.config.seed + (EVALUATOR_SEED if group == "evaluators" else 0)

    def pairs(self, group: str, name: str) -> Sources:
        """What a source is trained on."""
        find = preferences_source if group == "reward_models" else evaluator_source
        return find(self.data, name)

    def _names(self, group: str) -> dict[str, str]:
        return {
            reward: self._trained_name(group, name, source)
            if isinstance(source, ClassifierSource) and source.trains()
            else fingerprint(
                source.kind,
                own.identity(),
                source_code(type(source)),
                self.data.columns_fingerprint() if source.reads_columns else None,
            )
            for name, source in self.sources(group).items()
            for reward, own in source.names(name).items()
        }

    def _trained_name(self, group: str, name: str, model: ClassifierSource) -> str:
        return fingerprint(
            "reward",
            code_version("rlhf.learn.tasks", "rlhf.learn.tokenise", "rlhf.utility.calibration"),
            source_fingerprint(model.init_from) if model.init_from else self.stages.of(Sft).policy_name,
            source_fingerprint(self.pairs(group, name)),
            model.chat_template,
            model.training,
            (model.held_out, model.evaluations),
            trained_by(self.config),
            self.seed(group),
        )

    def paths(self, group: str) -> dict[str, str]:
        """Where models are that were trained here, by source."""
        return {name: str(self.made(output)) for name, output in self._trained(group).items()}

    def _trained(self, group: str) -> dict[str, Output]:
        prefix = "" if group == "reward_models" else "evaluator-"
        names = self._names(group)
        return {
            n: Output(f"{group}.{n}", self.name, f"{prefix}{n}-{names[n]}")
            for n, source in self.sources(group).items()
            if source.trains()
        }

    @cached_property
    def _calibrated(self) -> dict[str, Output]:
        """Of rewards with pairs to calibrate them on."""
        return {
            reward: Output(
                f"calibration of {reward}",
                "calibration",
                fingerprint(
                    "calibration",
                    code_version("rlhf.utility.calibration", "rlhf.data.preferences"),
                    self.names[reward],
                    source_fingerprint(resolved(own.calibration)),
                    self.config.dtype,
                ),
            )
            for reward, own in rewards_of(self.config.reward_models).items()
            if own.calibration is not None and self.config.utility.calibrated
        }

    @cached_property
    def calibration_names(self) -> dict[str, Any]:
        """Of what the temperatures of rewards depend on."""
        given = {n: o.name for n, o in self._calibrated.items()}
        return {
            n: given.get(n, (name, rewards_of(self.config.reward_models)[n].temperature))
            for n, name in self.names.items()
        }

    def calibrations(self) -> dict[str, dict[str, Any]]:
        """What is known of the unit of rewards, by reward: the contents of their calibration.json."""
        files = {name: Path(path) / CALIBRATION for name, path in self.paths("reward_models").items()}
        for name, source in self.config.reward_models.items():
            if isinstance(source, ClassifierSource) and source.path and not source.heads:
                files[name] = Path(source.path).expanduser() / CALIBRATION  # it was trained here
        files |= {n: self.made(output) / CALIBRATION for n, output in self._calibrated.items()}
        found = {n: json.loads(file.read_text()) for n, file in files.items() if file.is_file()}
        for name, calibration in found.items():
            if (
                not isinstance(calibration, dict)
                or not {"temperature", "before", "after"} <= calibration.keys()
            ):
                raise ValueError(f"{files[name]} is no calibration that was written here: remove it")
            curve = files[name].with_name(CURVE)
            if curve.is_file():
                calibration["curve"] = json.loads(curve.read_text())
        return found

    def scales(self) -> dict[str, Scale]:
        """Of rewards, with the temperatures that were fitted, if utility.calibrated."""
        known, found = self.calibrations(), {}
        for name, own in rewards_of(self.config.reward_models).items():
            scale = own.unit
            if scale.kind == BRADLEY_TERRY:
                fitted = known.get(name, {}).get("temperature") if own.temperature is None else None
                temperature = (fitted or scale.temperature) if self.config.utility.calibrated else 1.0
                scale = replace(scale, temperature=temperature)
            found[name] = scale
        return found

    @property
    def given(self) -> list[str]:
        return [
            f"{group}.{name} is given ({source.kind}: {source.place})"
            for group in GROUPS
            for name, source in self.sources(group).items()
            if not source.trains()
        ]

    @property
    def outputs(self) -> list[Output]:
        trained = [output for group in GROUPS for output in self._trained(group).values()]
        return [*trained, *self._calibrated.values()]

    def make(self, job: Job, output: Output, folder: Path) -> None:
        if output.kind == "calibration":
            self._calibrate(job, next(n for n, o in self._calibrated.items() if o == output), folder)
        else:
            self._train(job, output, folder)

    def _train(self, job: Job, output: Output, folder: Path) -> None:
        from rlhf.learn.tasks import BradleyTerryTask
        from rlhf.learn.tokenise import held_out_pairs, preference_tokens

        group, name = output.label.split(".")
        model, seed = self.sources(group)[name], self.seed(group)
        assert isinstance(model, ClassifierSource)
        assert model.training is not None
        start = model.init_from or self.stages.of(Sft).policy_path
        share = self.config.data.tolerated_share
        pairs, ids = preference_tokens(
            output.label, model.chat_template, start, self.pairs(group, name), share
        )
        apart = held_out_pairs(output.label, ids, model.held_out, seed)
        held_out = None
        if apart.any():
            held_out = partial(
                HeldOut, pairs.part(np.flatnonzero(apart)), model.evaluations, model.training.steps, folder
            )
        task = BradleyTerryTask(output.label, start, seed)
        label = output.label.replace("_models.", " ")
        fit(job, label, task, pairs.part(np.flatnonzero(~apart)), start, model.training, folder, held_out)

    def _calibrate(self, job: Job, reward: str, folder: Path) -> None:
        """Of a given reward, on pairs: by the pool, as the rewards of rollouts."""
        own = rewards_of(self.config.reward_models)[reward]
        pairs = load_preferences(own.calibration, self.config.data.tolerated_share)
        pool, silence = job.roles.rewards, self.config.recovery.silence
        with job.view.stage(f"calibration of {reward}", len(pairs)) as progress:
            scores = []
            for start in range(0, len(pairs), BATCH):
                part = pairs[start : start + BATCH]
                prompts = [p.prompt for p in part for _ in range(2)]
                responses = [r for p in part for r in (p.chosen, p.rejected)]
                call = Call(
                    f"scoring of reward_models.{reward}.calibration",
                    partial(pool.texts, reward, prompts, responses),
                    silence,
                )
                scores.append(call.result().reshape(-1, 2))
                job.progressed()
                progress.update(start + len(part), "pairs")
        margins = np.concatenate(scores).astype(np.float64)
        applies = ~np.isnan(margins).any(1)
        if not applies.any():
            raise ValueError(
                f"reward_models.{reward}.calibration: it applies to none of the {len(pairs)} pairs (None)"
            )
        found = calibrate(margins[applies, 0] - margins[applies, 1])
        write_atomic(folder / CALIBRATION, json.dumps(found.as_json(), indent=1))
        unit = f"temperature {found.temperature:.2f}" if found.temperature is not None else found.fault
        job.view.line(
            f"calibration of {reward}: accuracy {found.before.accuracy:.3f} on {found.pairs} pairs, {unit}"
        )

    def links(self) -> Mapping[str, Path]:
        return {
            f"reward_models/{name}": self.made(output)
            for name, output in self._trained("reward_models").items()
            if self.store.has(output.kind, output.name)
        }
