"""All learner ranks, seen from the driver."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from actors.failures import tell_if_late
from actors.learner import GROUPS, Coefficients, LearnerRank, Written
from actors.ranks import Watch, of_ranks
from actors.resources import actor_options
from rlhf.config import DeepSpeedConfig, RecoveryConfig, RoleConfig, TrainingConfig

if TYPE_CHECKING:
    from rlhf.learn.align_task import AlignTask
    from rlhf.learn.tasks import Task


class LearnerGroup:
    """Nothing here waits for a rank that does not get on.

    Raises:
        Fault: by any call: a rank has ended, or has given no sign of life for `recovery.silence` seconds while it was
            at work, or for `recovery.startup` seconds while it started and loaded.
    """

    def __init__(
        self, config: DeepSpeedConfig, role: RoleConfig, port: int | None, recovery: RecoveryConfig
    ) -> None:
        actor = ray.remote(concurrency_groups=GROUPS)(LearnerRank)
        self.ranks = [
            actor.options(**actor_options(role)).remote(rank, role.count, config, role, recovery.startup)
            for rank in range(role.count)
        ]
        self._port, self._joined, self._recovery = port, False, recovery
        self._watch = Watch(self.ranks, recovery.silence)

    def _join(self) -> None:
        """Makes the ranks' process group; not at once, because they take seconds to start."""
        starting = [rank.address.remote() for rank in self.ranks]
        tell_if_late(starting, "learner ranks", "have not started")
        address, *_ = self._loaded(starting)
        free, *_ = self._loaded([rank.free_port.remote() for rank in self.ranks])
        self._loaded([rank.join.remote(address, self._port or free) for rank in self.ranks])
        self._watch.places = self._loaded([rank.place.remote() for rank in self.ranks])
        self._joined = True

    def _loaded(self, calls: list[ray.ObjectRef]) -> list[Any]:
        return of_ranks(calls, Watch(self.ranks, self._recovery.startup, self._watch.places))

    def _done(self, calls: list[ray.ObjectRef]) -> list[Any]:
        self._watch.begin()
        return of_ranks(calls, self._watch)

    def load(self, task: Task, weight_decay: float, max_grad_norm: float = 1.0) -> list[str]:
        """What to tell of how the model is computed: the same on every rank."""
        if not self._joined:
            self._join()
        notes, *_ = self._loaded([r.load.remote(task, weight_decay, max_grad_norm) for r in self.ranks])
        return notes

    def load_policy(self, task: AlignTask, weight_decay: float, max_grad_norm: float) -> list[str]:
        """As `load`, of the policy, the reference and the critic."""
        if not self._joined:
            self._join()
        loading = [rank.load_policy.remote(task, weight_decay, max_grad_norm) for rank in self.ranks]
        notes, *_ = self._loaded(loading)
        return notes

    def fit(
        self, data: ray.ObjectRef, training: TrainingConfig, seed: int, start: int, stop: int
    ) -> list[dict]:
        parts = self._done([rank.fit.remote(data, training, seed, start, stop) for rank in self.ranks])
        return [merged(step) for step in zip(*parts, strict=True)]

    def values(self, data: ray.ObjectRef, indices: np.ndarray) -> np.ndarray:
        """What the objective measures each of these rows by (margins of pairs), float32 [len(indices)]."""
        first, *_ = self._done([rank.values.remote(data, indices) for rank in self.ranks])
        return first

    def align(self, batch: list[tuple], coefficients: Coefficients) -> list[ray.ObjectRef]:
        """Starts the training on a batch; the references of the ranks' metrics."""
        self._watch.begin()
        return [rank.align.remote(batch, coefficients) for rank in self.ranks]

    def check(self, calls: Sequence[ray.ObjectRef]) -> None:
        """Looks, without waiting, whether the ranks get on with these calls; for about once a second."""
        self._watch.look(calls)

    def weights(self) -> ray.ObjectRef:
        """Starts the gathering of weights, on every rank; the reference of rank 0's."""
        first, *_ = [rank.weights.remote() for rank in self.ranks]
        return first

    def checkpoint(self, folder: Path) -> list[ray.ObjectRef]:
        """Starts the saving of the state as it is after all calls before, beside those after. References of what each
        rank has `Written`."""
        nodes = [node for _, node in self._watch.places]
        return [
            rank.write.options(concurrency_group="beside").remote(
                str(folder), rank.snapshot.remote(str(folder), nodes.count(node))
            )
            for rank, node in zip(self.ranks, nodes, strict=True)
        ]

    def written(self, calls: list[ray.ObjectRef]) -> list[Written]:
        """Waits for what `checkpoint` started."""
        return self._loaded(calls)

    def restore(self, folder: Path) -> None:
        """Takes over the state of a checkpoint, of however many ranks and under whatever ZeRO stage."""
        self._loaded([rank.restore.remote(str(folder)) for rank in self.ranks])

    def log_ratios(self, rollouts: Sequence[ray.ObjectRef]) -> np.ndarray:
        """log policy - log reference of each response of these rollouts, float64 [B]."""
        first, *_ = self._done([rank.log_ratios.remote(list(rollouts)) for rank in self.ranks])
        return first

    def save(self, path: Path) -> None:
        self._loaded([rank.save.remote(str(path)) for rank in self.ranks])

    def stop(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)


def merged(parts: tuple[dict[str, float], ...] | list[dict[str, float]]) -> dict[str, float]:
    """Metrics of a batch from those of its ranks: sums, but for the gradient norms and whether the step was left out,
    which all ranks say alike. Those that are not finite are left out."""
    keys = {key for part in parts for key in part}
    out = {key: sum(part.get(key, 0.0) for part in parts) for key in sorted(keys)}
    out |= {key: value for key, value in parts[0].items() if key.endswith("grad_norm") or key == "skipped"}
    return {key: value for key, value in out.items() if math.isfinite(value)}
