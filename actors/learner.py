"""Learner ranks: each holds a DeepSpeed engine and trains whatever task it is given.

The same processes train the SFT model, the reward models and the policy, one after another.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

from actors.failures import fetched, of_ranks, short, tell_if_late
from actors.resources import actor_options, keep_memory, set_threads
from rlhf.config import DeepSpeedConfig, RoleConfig, TrainingConfig
from rlhf.timeline import Recorder, Span
from rlhf.types import Experience

if TYPE_CHECKING:
    from rlhf.learn.tasks import AlignTask, Task
    from rlhf.learn.trainer import Trainer, Weights


@dataclass(frozen=True)
class Coefficients:
    """What changes from step to step of alignment."""

    kl: float
    learning_rate: float
    critic_learning_rate: float
    step: int  # from 0


@dataclass(frozen=True)
class Lost:
    """What a rank misses of a batch that was not trained on."""

    why: dict[int, str]  # by place in the batch, the error

    @classmethod
    def of(cls, pairs: list[tuple[Any, Any]]) -> Lost:
        errors = [(i, v) for i, pair in enumerate(pairs) for v in pair if isinstance(v, BaseException)]
        return cls({i: short(error) for i, error in errors})


class LearnerRank:
    """One rank. Every rank must get the same calls in the same order: their collectives wait for each other."""

    def __init__(self, rank: int, world: int, config: DeepSpeedConfig, role: RoleConfig) -> None:
        self.rank, self.world, self.config, self.role = rank, world, config, role
        self._recorder = Recorder(f"learner {rank}")
        self._weights: Weights | None = None  # published last
        set_threads(role.cpus)
        keep_memory()
        if role.gpus == 0:
            os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
        import deepspeed  # noqa: F401 - now, while the driver prepares the data

        import rlhf.learn.tasks
        import rlhf.learn.trainer  # noqa: F401

    def address(self) -> str:
        return ray.util.get_node_ip_address()

    def free_port(self) -> int:
        with socket.socket() as s:
            s.bind(("", 0))
            return int(s.getsockname()[1])

    def join(self, address: str, port: int) -> None:
        """Joins the ranks' process group; returns when all have."""
        gpu = self.role.gpus > 0
        os.environ.update(
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world),
            LOCAL_RANK="0",
        )
        import deepspeed
        import deepspeed.ops

        if not gpu:  # gloo serves; the shared-memory op would be compiled at start
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("nccl" if gpu else "gloo", auto_mpi_discovery=False, verbose=False)

    def load(self, task: Task, weight_decay: float, max_grad_norm: float) -> list[str]:
        """What to tell of how the model is computed."""
        model, objective = task.build(self._device)
        self.trainer = self._trainer(model, weight_decay, max_grad_norm)
        self.trainer.objective = objective
        return model.notes

    def load_policy(self, task: AlignTask, weight_decay: float, max_grad_norm: float) -> list[str]:
        make = partial(self._trainer, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        self.aligner = task.start(self._device, make)
        self.trainer, self._weights = self.aligner.policy, None
        return self.aligner.notes

    @property
    def _device(self) -> str:
        return "cuda" if self.role.gpus > 0 else "cpu"

    def _trainer(self, model: Any, weight_decay: float, max_grad_norm: float) -> Trainer:
        from rlhf.learn.trainer import Trainer

        return Trainer(model, self.config, weight_decay, max_grad_norm, self.rank, self.world)

    def fit(
        self, data: Any, training: TrainingConfig, seed: int, start: int, stop: int
    ) -> list[dict[str, float]]:
        """Steps start..stop of supervised or Bradley-Terry training. Metrics of each step, summed over ranks later."""
        from rlhf.learn.schedule import learning_rate
        from rlhf.learn.tasks import batch_indices

        return [
            self.trainer.step(
                (data, batch_indices(len(data), training.batch_size, step, seed)),
                learning_rate(step, training),
                step,
            )
            for step in range(start, stop)
        ]

    def align(
        self, batch: list[tuple[Any, Any]], coefficients: Coefficients
    ) -> tuple[dict[str, float], tuple[Span, ...]] | Lost:
        """Trains on a leased batch of (rollouts reference, rewards reference); metrics, and what was done when.

        When a rank cannot fetch an item no rank trains, and each says what it misses: a collective that only some of
        them enter would never end.
        """
        found = fetched([reference for pair in batch for reference in pair])
        pairs = list(zip(found[::2], found[1::2], strict=True))
        missed = Lost.of(pairs)
        if self._any(bool(missed.why)):
            return missed
        experiences = [Experience(a, b) for a, b in pairs]
        metrics = self.aligner.step(
            experiences,
            coefficients.kl,
            coefficients.learning_rate,
            coefficients.critic_learning_rate,
            self._recorder.span,
            coefficients.step,
        )
        return metrics, self._recorder.take()

    def _any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        import torch

        return bool(self.trainer.over_ranks(torch.tensor([float(here)])))

    def weights(self) -> Any:
        """Ray copies what is returned, so the memory serves again: fresh pages cost more than the copy."""
        with self._recorder.span("publish weights"):
            self._weights = self.trainer.weights(self._weights)
            return self._weights

    def save(self, path: str) -> None:
        self.trainer.save(Path(path))


class LearnerGroup:
    """All ranks, seen from the driver."""

    def __init__(self, config: DeepSpeedConfig, role: RoleConfig, port: int | None) -> None:
        actor = ray.remote(LearnerRank)
        self.ranks = [
            actor.options(**actor_options(role)).remote(rank, role.count, config, role)
            for rank in range(role.count)
        ]
        self._port, self._joined = port, False

    def _join(self) -> None:
        """Makes the ranks' process group; not at once, because they take seconds to start."""
        starting = [rank.address.remote() for rank in self.ranks]
        tell_if_late(starting, "learner ranks", "have not started")
        address, *_ = of_ranks(starting)
        free, *_ = of_ranks([rank.free_port.remote() for rank in self.ranks])
        of_ranks([rank.join.remote(address, self._port or free) for rank in self.ranks])
        self._joined = True

    def load(self, task: Task, weight_decay: float, max_grad_norm: float = 1.0) -> list[str]:
        """What to tell of how the model is computed: the same on every rank."""
        if not self._joined:
            self._join()
        notes, *_ = of_ranks([rank.load.remote(task, weight_decay, max_grad_norm) for rank in self.ranks])
        return notes

    def load_policy(self, task: AlignTask, weight_decay: float, max_grad_norm: float) -> list[str]:
        """As `load`, of the policy, the reference and the critic."""
        if not self._joined:
            self._join()
        loading = [rank.load_policy.remote(task, weight_decay, max_grad_norm) for rank in self.ranks]
        notes, *_ = of_ranks(loading)
        return notes

    def fit(
        self, data: ray.ObjectRef, training: TrainingConfig, seed: int, start: int, stop: int
    ) -> list[dict]:
        parts = of_ranks([rank.fit.remote(data, training, seed, start, stop) for rank in self.ranks])
        return [merged(step) for step in zip(*parts, strict=True)]

    def align(self, batch: list[tuple], coefficients: Coefficients) -> list[ray.ObjectRef]:
        """Starts the training on a batch; the references of the ranks' metrics."""
        return [rank.align.remote(batch, coefficients) for rank in self.ranks]

    def weights(self) -> ray.ObjectRef:
        """Starts the gathering of weights, on every rank; the reference of rank 0's."""
        first, *_ = [rank.weights.remote() for rank in self.ranks]
        return first

    def save(self, path: Path) -> None:
        of_ranks([rank.save.remote(str(path)) for rank in self.ranks])

    def check(self) -> None: ...

    def stop(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)


def merged(parts: tuple[dict[str, float], ...] | list[dict[str, float]]) -> dict[str, float]:
    """Metrics of a batch from those of its ranks: sums, but for the global gradient norms."""
    keys = {key for part in parts for key in part}
    out = {key: sum(part.get(key, 0.0) for part in parts) for key in sorted(keys)}
    return out | {key: value for key, value in parts[0].items() if key.endswith("grad_norm")}
