"""The baseline stage: samples of the base policy for every prompt, until r_ref is known as well as asked."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import ray

from actors.artifacts import Artifacts
from actors.failures import Call
from actors.generator_pool import Sampled
from actors.roles import Roles
from actors.work import work_items
from rlhf.config import Config
from rlhf.data.prepare import RunData
from rlhf.progress import StageView
from rlhf.types import Prompt
from rlhf.utility.adaptive import AdaptiveSampling


class BaselineStage:
    """Fills the estimator and freezes it.

    Prompts that earlier statistics have (`baseline.known`) are not sampled again; others are, or are refused. With a
    tolerance, rounds of `baseline.samples` go on for the prompts whose r_ref is not sure enough yet.
    """

    def __init__(
        self, config: Config, data: RunData, artifacts: Artifacts, roles: Roles, progress: StageView
    ) -> None:
        self._config, self._data, self._artifacts, self._roles = config, data, artifacts, roles
        self._progress, self._rules = progress, artifacts.rules
        self._prompts = list({p.id: p for p in [*data.prompts, *data.eval_prompts]}.values())
        self._ids = np.array([p.id for p in self._prompts], np.uint64)
        self._items = self._taken = 0

    def run(self) -> dict[str, Any]:
        """What to tell of it: samples taken and saved, and for each model the median standard error of r_ref."""
        with self._roles.start_beside("rewards"):
            self._roles.generators.load(self._artifacts.policy_path)
        self._actor, ask = self._roles.baseline.actor, self._roles.baseline.ask
        ask("reset", self._artifacts.baseline_keys, self._config.baseline.exact)
        unseen = self._unseen()
        updates = self._canned() + self._columns()
        found: dict[str, Any] = {}
        if self._config.baseline.tolerance is None:
            self._sample(unseen)
        else:
            found["samples_saved"] = self._adaptive()
        for update in updates:
            update.result()
        found |= {"samples": self._taken, "prompts": len(self._ids), "prompts_sampled": len(unseen)}
        references = ask("references", self._ids, self._rules, 0)
        found["references"] = {
            name: {
                "r_ref": float(np.mean(r.r_ref)),
                "standard_error": float(np.median(r.standard_error)),
                "standard_error_max": float(np.max(r.standard_error)),
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
        ask = self._roles.baseline.ask
        ask("adopt", baseline.known, self._artifacts.baseline_keys)
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
        purpose = "baseline" if c.baseline.known is None else f"baseline {self._artifacts.baseline_name}"
        items = work_items(
            prompts, c.rollout.prompts_per_item, c.baseline.samples, c.seed, purpose, self._items
        )
        self._items += len(items)
        self._progress.extend(self._items)
        source, models, rewards = self._artifacts.baseline_name, list(self._rules), self._roles.rewards

        def update(sampled: Sampled) -> ray.ObjectRef:
            raw = rewards.raw(sampled.rollouts)
            return self._actor.update.remote(models, sampled.rollouts, raw, source)

        found = self._roles.generators.sample(items, update)
        for done, sampled in enumerate(found, self._items - len(items) + 1):
            self._taken += sampled.summary.responses
            self._progress.update(done, f"{self._taken} base responses")

    def _adaptive(self) -> int:
        """Rounds, until every prompt's r_ref is sure enough or it has its most samples. The samples saved."""
        b = self._config.baseline
        assert b.tolerance is not None
        sampling = AdaptiveSampling(b.tolerance, b.samples, b.max_samples)
        while True:
            progress = self._roles.baseline.ask("progress", sampling, self._rules, self._ids)
            if not progress.needs.any():
                return progress.saved
            self._sample([p for p, needs in zip(self._prompts, progress.needs, strict=True) if needs])

    def _canned(self) -> list[Call]:
        """Rewards of the canned responses to every prompt, on their way to the estimator."""
        updates = []
        contents, ids = [p.content for p in self._prompts], self._ids
        for name, model in self._config.reward_models.items():
            for i, canned in enumerate(model.canned if model.reference == "canned" else []):
                item = (self._artifacts.baseline_name, i)

                def update(
                    name: str = name, canned: str = canned, item: tuple[str, int] = item
                ) -> ray.ObjectRef:
                    rewards = self._roles.rewards.canned(name, contents, [canned] * len(contents))
                    return self._actor.update_canned.remote(name, ids, rewards, item)

                updates.append(Call(f"scoring of reward_models.{name}.canned", update))
        return updates

    def _columns(self) -> list[Call]:
        """Reference rewards that the data set brings."""
        updates = []
        for name, model in self._config.reward_models.items():
            if model.reference == "column":
                ids, values = zip(*self._data.column(model.column), strict=True)
                columns = np.array(ids, np.uint64), np.array(values, np.float32)
                update = partial(self._actor.update_column.remote, name, *columns)
                updates.append(Call(f"reference of reward_models.{name}", update))
        return updates
