"""The baseline estimator: quantile statistics for each (prompt, reward model), from the base policy only."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.exceptions import GetTimeoutError

from actors.fault import Fault
from actors.resources import beside_driver
from rlhf.config import RecoveryConfig
from rlhf.flow.fleet import TRIES
from rlhf.types import Rollouts
from rlhf.utility.adaptive import AdaptiveSampling, Progress
from rlhf.utility.statistics import BaselineStatistics, ReferenceRule


class BaselineEstimator:
    """`BaselineStatistics` in an actor. Updates are idempotent by item, so a lost one may be sent again.

    A process that Ray has started again knows nothing. It says so to whoever fills it; frozen statistics are in a file
    that who asks for references names, and it loads that.
    """

    def __init__(self) -> None:
        self._known: BaselineStatistics | None = None
        self._path: str | None = None  # of frozen ones

    @property
    def _statistics(self) -> BaselineStatistics:
        if self._known is None:
            raise Fault("the baseline estimator was started again in the middle of the stage")
        return self._known

    def reset(self, keys: dict[str, str], exact: int) -> None:
        """Starts empty statistics; `keys` names, by model, the fingerprint of base policy and reward model."""
        self._known, self._path = BaselineStatistics(exact=exact, keys=keys), None

    def resume(self, path: str) -> None:
        """Goes on from statistics that were saved when they were not complete."""
        self._known, self._path = BaselineStatistics.load(Path(path)), None

    def reopen(self, path: str, keys: dict[str, str], exact: int) -> None:
        """Takes over statistics that were frozen, to add to them."""
        known = BaselineStatistics.load(Path(path))
        self._known, self._path = BaselineStatistics(exact=exact, keys=keys), None
        self._known.merge(known)

    def open_rules(
        self, rules: Mapping[str, ReferenceRule], prompt_id: int, base: bool
    ) -> tuple[bool, list[str]]:
        """Whether a prompt's references need samples that are not there, and the canned rules whose responses were not
        scored for it. base: whatever the rules are, samples are needed."""
        ids = np.array([prompt_id], np.uint64)
        needed = [n for n, rule in rules.items() if base or rule.sampled]
        lacks = any(not self._statistics.known(name, ids)[0] for name in needed)
        canned = [n for n, rule in rules.items() if rule.kind == "canned"]
        return lacks, [n for n in canned if not self._statistics.canned(n, ids)[0]]

    def update_prompt(self, models: Sequence[str], prompt_id: int, raw: np.ndarray) -> None:
        """Takes in the base policy's rewards of a prompt that was asked for. raw: float32 [n, M]."""
        ids = np.full(len(raw), prompt_id, np.uint64)
        self._add(models, ids, raw, ("served", prompt_id))

    def absent(self, rules: Mapping[str, ReferenceRule], prompt_ids: np.ndarray) -> dict[str, int]:
        """To how many of these prompts each reward does not apply."""
        return {m: int(self._statistics.absent(m, prompt_ids).sum()) for m in rules}

    def count(self, model: str, prompt_ids: np.ndarray) -> int:
        """Samples of these prompts together."""
        return int(self._statistics.counts(model, prompt_ids).sum())

    def taken(self, source: str) -> set[int]:
        """The items of a source that were taken in."""
        return self._statistics.taken(source)

    def adopt(self, path: str, keys: dict[str, str]) -> None:
        """Takes over what an earlier run's statistics have of the same policy and models."""
        self._statistics.adopt(Path(path), keys)

    def update(self, models: Sequence[str], rollouts: Rollouts, raw: np.ndarray, source: str) -> None:
        """Takes in the base policy's rewards of one work item. raw: float32 [B, M], a column for each model, NaN
        where it does not apply to the prompt.

        source: names the sampling that the item is of, so that those of two runs are not taken for one.
        """
        self._add(models, rollouts.prompt_ids[rollouts.group], raw, (source, rollouts.item))

    def _add(self, models: Sequence[str], ids: np.ndarray, raw: np.ndarray, item: tuple[str, int]) -> None:
        for column, model in enumerate(models):
            self._statistics.add_scores(model, ids, raw[:, column], item)

    def update_canned(
        self, model: str, prompt_ids: np.ndarray, rewards: np.ndarray, item: tuple[str, int]
    ) -> None:
        """Takes in rewards of canned responses, NaN where the reward does not apply. prompt_ids: uint64 [N], rewards:
        float32 [N]"""
        applies = ~np.isnan(rewards)
        self._statistics.add_canned(model, prompt_ids[applies], rewards[applies], item)

    def update_column(self, model: str, prompt_ids: np.ndarray, values: np.ndarray) -> None:
        """Takes in reference rewards that came with the data set. prompt_ids: uint64 [N], values: float32 [N]"""
        self._statistics.add_column(model, prompt_ids, values)

    def references(
        self,
        prompt_ids: np.ndarray,
        rules: Mapping[str, ReferenceRule],
        points: int,
        frozen: str | None = None,
    ) -> dict:
        """For each model the `PromptReferences` of the prompts, with at most `points` samples of each. frozen: the file
        that the statistics are in; None: they are being filled."""
        if frozen is not None:
            self.load(frozen)
        return {m: self._statistics.reference(m, prompt_ids, rule, points) for m, rule in rules.items()}

    def known(self, rules: Mapping[str, ReferenceRule], prompt_ids: np.ndarray) -> np.ndarray:
        """Whether there are samples of a prompt by every model, bool [N]."""
        return np.logical_and.reduce([self._statistics.known(m, prompt_ids) for m in rules])

    def progress(
        self, sampling: AdaptiveSampling, rules: Mapping[str, ReferenceRule], prompt_ids: np.ndarray
    ) -> Progress:
        """Which prompts need more samples."""
        return sampling.progress(self._statistics, rules, prompt_ids)

    def samples(self, rules: Mapping[str, ReferenceRule], prompt_ids: np.ndarray) -> dict:
        """For each model the base policy's rewards of each prompt."""
        return {m: [self._statistics.samples(m, int(i)) for i in prompt_ids] for m in rules}

    def freeze(self) -> str:
        """No more updates from now on. Returns the digest of the statistics."""
        self._statistics.freeze()
        return self._statistics.digest()

    def save(self, path: str) -> None:
        self._statistics.save(Path(path))

    def load(self, path: str) -> None:
        """Takes over frozen statistics, unless they are here already."""
        if path != self._path:
            self._known, self._path = BaselineStatistics.load(Path(path)), path
            self._known.freeze()


class Baseline:
    """The estimator, seen from the driver. A process that ends is started again by Ray, and the call made again.

    Raises:
        Fault: by any call: it gives no answer, or was started again and has lost what it was filled with.
    """

    def __init__(self, recovery: RecoveryConfig) -> None:
        options = {**beside_driver(), "max_restarts": -1, "max_task_retries": TRIES}
        self.actor = ray.remote(BaselineEstimator).options(**options).remote()
        self._silence = recovery.silence

    def ask(self, method: str, *arguments: Any) -> Any:
        """The estimator's answer."""
        try:
            return ray.get(getattr(self.actor, method).remote(*arguments), timeout=self._silence)
        except GetTimeoutError:
            raise Fault(f"the baseline estimator gave no answer for {self._silence:g} s ({method})") from None

    def load(self, path: Path) -> None:
        """Takes over frozen statistics."""
        self.ask("load", str(path))

    def stop(self) -> None:
        ray.kill(self.actor)
