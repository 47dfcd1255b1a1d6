"""The baseline stage: samples of the base policy for every prompt, until r_ref is known as well as asked."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from actors.failures import Call
from actors.generator_pool import Sampled
from actors.signals import orderly
from actors.stages.reward_models import RewardModels
from actors.stages.sft import Sft
from actors.stages.stage import Output, Stage
from actors.work import work_items
from rlhf.code import code_version
from rlhf.files import write_atomic
from rlhf.generate.engines import engine_identity
from rlhf.progress import StageView
from rlhf.sources.source import Source, rewards_of
from rlhf.store import CHECKPOINTS, fingerprint, source_fingerprint
from rlhf.types import Prompt
from rlhf.utility.adaptive import AdaptiveSampling
from rlhf.utility.statistics import ReferenceRule

if TYPE_CHECKING:
    from actors.stages.job import Job

EVERY = 60.0  # seconds between two snapshots
SCORED_BY = ("rlhf.generate.dialogue", "rlhf.models.reward", "rlhf.sources.answers", "actors.work")
"""Modules on which the base policy's samples and their rewards depend, beside the engine."""


class Baseline(Stage):
    name = "baseline"

    @cached_property
    def rules(self) -> dict[str, ReferenceRule]:
        """What r_ref is, by reward."""
        b = self.config.baseline
        return {name: own.rule(b.level, b.estimator) for name, own in self._rewards.items()}

    @property
    def _rewards(self) -> dict[str, Source]:
        return rewards_of(self.config.reward_models)

    @cached_property
    def keys(self) -> dict[str, str]:
        """What the base policy's rewards by each model depend on, whatever the prompts and their number."""
        c = self.config
        r = c.rollout
        sampled = (
            code_version(*SCORED_BY),
            engine_identity(r),
            self.stages.of(Sft).policy_name,
            c.policy.chat_template,
            r.max_new_tokens,
            r.temperature,
            r.dtype,
            c.dtype,
        )
        return {n: fingerprint(sampled, name) for n, name in self.stages.of(RewardModels).names.items()}

    @cached_property
    def output_name(self) -> str:
        b, rewards = self.config.baseline, self._rewards
        adaptive = (
            (b.tolerance, b.max_samples, {n: vars(r) for n, r in self.rules.items()}) if b.tolerance else None
        )
        return fingerprint(
            "baseline",
            code_version("rlhf.utility.statistics", "rlhf.utility.adaptive"),
            self.keys,
            self.data.prompts_fingerprint(),
            self.config.rollout.prompts_per_item,
            b.samples,
            b.exact,
            b.known and source_fingerprint(b.known),
            adaptive,
            {n: own.canned for n, own in rewards.items() if own.reference == "canned"},
            {n: self.data.column(own.column) for n, own in rewards.items() if own.reference == "column"},
            self.config.seed,
        )

    @property
    def _output(self) -> Output:
        return Output("baseline", "baseline", self.output_name)

    @property
    def outputs(self) -> list[Output]:
        return [self._output]

    @property
    def statistics_path(self) -> Path:
        return self.made(self._output) / "statistics.npz"

    def make(self, job: Job, output: Output, folder: Path) -> None:
        snapshot = folder / CHECKPOINTS / "statistics.npz"
        with job.view.stage("baseline", 1) as progress, orderly(self.config.recovery.grace) as asked:
            found = _Sampling(self, job, progress, snapshot, asked).run()
            if found is None:
                return
        shutil.rmtree(snapshot.parent, ignore_errors=True)
        errors = "  ".join(f"{n} {row['standard_error']:.2f}" for n, row in found["references"].items())
        left = {n: row["absent"] for n, row in found["references"].items() if row["absent"]}
        if left:
            told = ", ".join(f"{name} to {count}" for name, count in left.items())
            job.view.line(f"baseline: of {found['prompts']} prompts rewards do not apply: {told}")
        job.view.line(
            f"baseline: {found['samples']} base responses; median standard error of r_ref: {errors}"
        )
        if "samples_saved" in found:
            job.view.line(f"baseline: {found['samples_saved']} samples saved by the tolerance")
        job.roles.baseline.ask("save", str(folder / "statistics.npz"))
        write_atomic(folder / "summary.json", json.dumps(found, indent=1))

    def links(self) -> Mapping[str, Path]:
        return {"baseline": self.made(self._output)} if self.done else {}


class _Sampling:
    """Fills the estimator and freezes it.

    Prompts that earlier statistics have (`baseline.known`) are not sampled again; others are, or are refused. With a
    tolerance, rounds of `baseline.samples` go on for the prompts whose r_ref is not sure enough yet.

    A snapshot of the statistics is saved now and then, with a tolerance after a round: what it has is not sampled
    again.
    """

    def __init__(
        self, stage: Baseline, job: Job, progress: StageView, snapshot: Path, asked: Callable[[], bool]
    ) -> None:
        self._stage, self._job, self._progress = stage, job, progress
        self._snapshot, self._asked = snapshot, asked
        self._saved, self._silence = time.monotonic(), stage.config.recovery.silence
        self._config, self._data, self._rules = stage.config, stage.data, stage.rules
        data = stage.data
        self._prompts = list({p.id: p for p in [*data.prompts, *data.eval_prompts]}.values())
        self._ids = np.array([p.id for p in self._prompts], np.uint64)
        self._items = self._taken = 0

    def run(self) -> dict[str, Any] | None:
        """What to tell of it: samples taken and saved, and for each model the median standard error of r_ref. Nothing,
        if it was asked to end."""
        roles = self._job.roles
        with roles.start_beside("rewards"):
            roles.generators.load(self._stage.stages.of(Sft).policy_path)
        self._actor, ask = roles.baseline.actor, roles.baseline.ask
        ask("reset", self._stage.keys, self._config.baseline.exact)
        unseen = self._unseen()
        model, *_ = self._rules
        known = ask("count", model, self._ids)
        self._resume()
        self._taken = ask("count", model, self._ids) - known
        updates = self._canned() + self._columns()
        found: dict[str, Any] = {}
        if self._config.baseline.tolerance is None:
            self._sample(unseen)
        else:
            found["samples_saved"] = self._adaptive()
        for update in updates:
            update.result()
        if self._asked():
            if self._config.baseline.tolerance is None:
                self._save()
            return None
        found |= {"samples": self._taken, "prompts": len(self._ids), "prompts_sampled": len(unseen)}
        references = ask("references", self._ids, self._rules, 0)
        absent = ask("absent", self._rules, self._ids)
        found["references"] = {
            name: {
                "r_ref": float(np.nanmean(r.r_ref)) if absent[name] < len(self._ids) else None,
                "standard_error": float(np.median(r.standard_error)),
                "standard_error_max": float(np.max(r.standard_error)),
                "absent": absent[name],  # prompts to which it does not apply
            }
            for name, r in references.items()
        }
        found["digest"] = ask("freeze")
        return found

    def _unseen(self) -> list[Prompt]:
        """Prompts without samples, after taking over those of `baseline.known`."""
        baseline = self._config.baseline
        if baseline.known is None:
            return self._prompts
        ask = self._job.roles.baseline.ask
        ask("adopt", baseline.known, self._stage.keys)
        known = ask("known", self._rules, self._ids)
        unseen = [p for p, k in zip(self._prompts, known, strict=True) if not k]
        if unseen and baseline.unseen == "refuse":
            raise ValueError(
                f"baseline.known={baseline.known} has no samples of {len(unseen)} of the {len(self._ids)} prompts, "
                f"first {unseen[0].source}; leave them out, or set baseline.unseen=sample"
            )
        return unseen

    def _sample(self, prompts: Sequence[Prompt]) -> None:
        """One round of samples for these prompts."""
        c = self._config
        # Beside known samples new ones are drawn, not those of the earlier run again.
        purpose = "baseline" if c.baseline.known is None else f"baseline {self._stage.output_name}"
        items = work_items(
            prompts, c.rollout.prompts_per_item, c.baseline.samples, c.seed, purpose, self._items
        )
        self._items += len(items)
        self._progress.extend(self._items)
        source, models, rewards = self._stage.output_name, list(self._rules), self._job.roles.rewards
        taken = self._job.roles.baseline.ask("taken", source)
        open_ = [item for item in items if item.id not in taken]

        def update(sampled: Sampled) -> ray.ObjectRef:
            raw = rewards.raw(sampled.rollouts)
            return self._actor.update.remote(models, sampled.rollouts, raw, source)

        found = self._job.roles.generators.sample(open_, update)
        for done, sampled in enumerate(found, self._items - len(open_) + 1):
            self._taken += sampled.summary.responses
            self._progress.update(done, f"{self._taken} base responses")
            self._job.progressed()
            if self._asked():
                return
            if c.baseline.tolerance is None and time.monotonic() - self._saved > EVERY:
                self._save()

    def _save(self) -> None:
        self._snapshot.parent.mkdir(exist_ok=True)
        self._job.roles.baseline.ask("save", str(self._snapshot))
        self._saved = time.monotonic()

    def _resume(self) -> None:
        """Goes on from a snapshot, if there is one that is whole."""
        if not self._snapshot.exists():
            return
        ask, line = self._job.roles.baseline.ask, self._job.view.line
        try:
            ask("resume", str(self._snapshot))
        except ValueError as error:
            line(f"baseline: {error}: it is sampled anew")
            self._snapshot.unlink()
        else:
            done = len(ask("taken", self._stage.output_name))
            line(f"baseline: goes on after {done} items that were sampled before")
            if self._config.baseline.tolerance is not None:  # whole rounds
                self._items = done

    def _adaptive(self) -> int:
        """Rounds, until every prompt's r_ref is sure enough or it has its most samples. The samples saved."""
        b = self._config.baseline
        assert b.tolerance is not None
        sampling = AdaptiveSampling(b.tolerance, b.samples, b.max_samples)
        while True:
            progress = self._job.roles.baseline.ask("progress", sampling, self._rules, self._ids)
            if not progress.needs.any():
                return progress.saved
            self._sample([p for p, needs in zip(self._prompts, progress.needs, strict=True) if needs])
            if self._asked():
                return progress.saved
            self._save()

    def _canned(self) -> list[Call]:
        """Rewards of the canned responses to every prompt, on their way to the estimator."""
        updates = []
        contents, ids = [p.content for p in self._prompts], self._ids
        for name, own in rewards_of(self._config.reward_models).items():
            for i, canned in enumerate(own.canned if own.reference == "canned" else []):
                item = (self._stage.output_name, i)

                def update(
                    name: str = name, canned: str = canned, item: tuple[str, int] = item
                ) -> ray.ObjectRef:
                    rewards = self._job.roles.rewards.texts(name, contents, [canned] * len(contents))
                    return self._actor.update_canned.remote(name, ids, rewards, item)

                updates.append(Call(f"scoring of reward_models.{name}.canned", update, self._silence))
        return updates

    def _columns(self) -> list[Call]:
        """Reference rewards that the data set brings."""
        updates = []
        for name, own in rewards_of(self._config.reward_models).items():
            if own.reference == "column":
                ids, values = zip(*self._data.column(own.column), strict=True)
                columns = np.array(ids, np.uint64), np.array(values, np.float32)
                update = partial(self._actor.update_column.remote, name, *columns)
                updates.append(Call(f"reference of reward_models.{name}", update, self._silence))
        return updates
