"""Learner ranks: each holds a DeepSpeed engine and trains whatever task it is given.

The same processes train the SFT model, the reward models and the policy, one after another.
"""

from __future__ import annotations

import gc
import os
import socket
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray

from actors.failures import fetched, short
from actors.resources import free_memory, keep_memory, set_threads
from actors.stuck import place, stacks
from rlhf.checksums import checksum
from rlhf.config import DeepSpeedConfig, RoleConfig, TrainingConfig
from rlhf.models.device import Compute, is_gpu
from rlhf.timeline import Recorder, Span
from rlhf.types import Experience

if TYPE_CHECKING:
    from rlhf.learn.align_task import AlignTask
    from rlhf.learn.state import Snapshot
    from rlhf.learn.tasks import Task
    from rlhf.learn.trainer import Trainer, Weights


@dataclass(frozen=True)
class Coefficients:
    """What changes from step to step of alignment."""

    kl: float
    learning_rate: float
    critic_learning_rate: float
    step: int  # from 0
    strict: bool  # what is not finite is an error; else the step is left out
    inspect: str  # folder for the batch of that error; empty: it is not kept


@dataclass(frozen=True)
class Written:
    """A rank's file of a checkpoint."""

    name: str
    size: int  # bytes
    checksum: str
    waited: str  # why training waited while it was written; empty: it did not


@dataclass(frozen=True)
class Lost:
    """What a rank misses of a batch that was not trained on."""

    why: dict[int, str]  # by place in the batch, the error

    @classmethod
    def of(cls, pairs: list[tuple[Any, Any]]) -> Lost:
        errors = [(i, v) for i, pair in enumerate(pairs) for v in pair if isinstance(v, BaseException)]
        return cls({i: short(error) for i, error in errors})


GROUPS = {"beside": 1, "health": 1}
"""Concurrency groups of a rank: what is written while it trains, and whether it is alive."""


class LearnerRank:
    """One rank. Every rank must get the same calls in the same order: their collectives wait for each other. `write`,
    `alive` and `stacks` are called in groups of their own, and answered meanwhile."""

    def __init__(
        self, rank: int, world: int, config: DeepSpeedConfig, role: RoleConfig, patience: float
    ) -> None:
        """patience: seconds that a collective waits for other ranks: who is stuck is found out otherwise."""
        self.rank, self.world, self.config, self._patience = rank, world, config, patience
        self._compute = Compute.of(role)
        self._recorder = Recorder(f"learner {rank}")
        self._weights: Weights | None = None  # published last
        self._snapshot: Snapshot | None = None
        self._trainers: dict[str, Trainer] = {}
        self.trainer: Any = None  # of the task
        self.aligner: Any = None
        self._beats = 0
        set_threads(self._compute.threads)
        keep_memory()
        os.environ["DS_ACCELERATOR"] = self._compute.accelerator
        os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
        import deepspeed  # noqa: F401 - now, while the driver prepares the data

        import rlhf.learn.align_task
        import rlhf.learn.tasks
        import rlhf.learn.trainer  # noqa: F401

    def place(self) -> tuple[int, str]:
        return place()

    def alive(self) -> int:
        """Another number than before if the rank has got on."""
        return self._beats + sum(trainer.beats for trainer in self._trainers.values())

    def stacks(self) -> str:
        return stacks()

    def address(self) -> str:
        return ray.util.get_node_ip_address()

    def free_port(self) -> int:
        with socket.socket() as s:
            s.bind(("", 0))
            return int(s.getsockname()[1])

    def join(self, address: str, port: int) -> None:
        """Joins the ranks' process group; returns when all have."""
        self._compute.check("resources.learner")
        os.environ.update(
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world),
            LOCAL_RANK="0",
        )
        import deepspeed
        import deepspeed.ops

        if not is_gpu(self._compute.device):  # gloo serves; the shared-memory op would be compiled at start
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            self._compute.backend,
            auto_mpi_discovery=False,
            verbose=False,
            timeout=timedelta(seconds=self._patience),
        )

    def load(self, task: Task, weight_decay: float, max_grad_norm: float) -> list[str]:
        """What to tell of how the model is computed."""
        self._begin()
        model, objective = task.build(self._compute.device)
        self.trainer = self._trainer(model, weight_decay, max_grad_norm)
        self.trainer.objective = objective
        self._trainers = {"model": self.trainer}
        return model.notes

    def _begin(self) -> None:
        """Another task: nothing of the one before is needed."""
        set_threads(self._compute.threads)  # of the thread that trains
        self._weights = self._snapshot = None
        self._trainers = {}
        self.trainer = self.aligner = None
        gc.collect()  # a model is in cycles: it would be there beside the next

    def load_policy(self, task: AlignTask, weight_decay: float, max_grad_norm: float) -> list[str]:
        self._begin()
        make = partial(self._trainer, weight_decay=weight_decay, max_grad_norm=max_grad_norm)
        self.aligner = task.start(self._compute.device, make)
        self.trainer = self.aligner.policy
        self._trainers = {"policy": self.trainer}
        if self.aligner.critic is not None:
            self._trainers["critic"] = self.aligner.critic
        return self.aligner.notes

    def _trainer(self, model: Any, weight_decay: float, max_grad_norm: float) -> Trainer:
        from rlhf.learn.trainer import Trainer

        return Trainer(model, self.config, weight_decay, max_grad_norm, self.rank, self.world)

    def fit(
        self, data: Any, training: TrainingConfig, seed: int, start: int, stop: int
    ) -> list[dict[str, float]]:
        """Steps start..stop of supervised or Bradley-Terry training. Metrics of each step, summed over ranks later."""
        from rlhf.learn.schedule import learning_rate
        from rlhf.learn.tasks import batch_indices

        metrics = [
            self.trainer.step(
                (data, batch_indices(len(data), training.batch_size, step, seed)),
                learning_rate(step, training),
                step,
            )
            for step in range(start, stop)
        ]
        self._compute.rest()
        return metrics

    def values(self, data: Any, indices: np.ndarray) -> np.ndarray:
        """What each of these rows is measured by, float32 [len(indices)]."""
        return self.trainer.values(data, indices)

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
        from rlhf.learn.trainer import NotFinite

        try:
            metrics = self.aligner.step(
                experiences,
                coefficients.kl,
                coefficients.learning_rate,
                coefficients.critic_learning_rate,
                self._recorder.span,
                coefficients.step,
                coefficients.strict,
            )
        except NotFinite as error:
            if not coefficients.inspect:
                raise
            raise ValueError(f"{error}; the batch is in {self._kept(experiences, coefficients)}") from error
        self._compute.rest()
        return metrics, self._recorder.take()

    def _kept(self, experiences: list[Experience], coefficients: Coefficients) -> Path:
        """Where the batch is to be looked at. Every rank takes part."""
        from rlhf.learn.inspection import save_batch

        path = Path(coefficients.inspect) / f"batch-{coefficients.step + 1}.npz"
        if self.rank == 0:
            save_batch(path, experiences)
        self._any(False)  # no rank speaks of it before it is there
        return path

    def _any(self, here: bool) -> bool:
        """Whether it is so on any rank."""
        import torch

        return bool(self.trainer.over_ranks(torch.tensor([float(here)])))

    def weights(self) -> Any:
        """Ray copies what is returned, so the memory serves again: fresh pages cost more than the copy."""
        with self._recorder.span("publish weights"):
            self._weights = self.trainer.weights(self._weights)
            return self._weights

    def log_ratios(self, rollouts: list[Any]) -> np.ndarray:
        """log policy - log reference of each response of rollouts, given as references; float64 [B]."""
        found = self.aligner.log_ratios(ray.get(rollouts))
        self._compute.rest()
        return found

    def save(self, path: str) -> None:
        self.trainer.save(Path(path))
        self._beats += 1

    def snapshot(self, folder: str, neighbours: int) -> str:
        """Copies the state of what is trained, for `write`; without room for a copy, writes it, and says so.
        `neighbours`: ranks on this node, which copy theirs too."""
        from rlhf.learn.state import Snapshot

        if self._snapshot is None:
            self._snapshot = Snapshot()
        with self._recorder.span("snapshot"):
            room = free_memory() // neighbours
            if self._snapshot.take(self._trainers, room):
                return ""
            self._snapshot.write(self._file(folder), self._beat)
        return (
            f"training waits while checkpoints are written: there are {room / 2**30:.1f} GiB for the copy of a rank's "
            f"state, which takes {self._snapshot.size / 2**30:.1f}"
        )

    def write(self, folder: str, waited: str) -> Written:
        """Writes what was copied. `waited`: the answer of `snapshot`."""
        assert self._snapshot is not None
        path = self._file(folder)
        if not waited:
            self._snapshot.write(path)
        return Written(path.name, *checksum(path), waited)

    def _file(self, folder: str) -> Path:
        return Path(folder) / f"rank-{self.rank}-of-{self.world}.safetensors"

    def _beat(self) -> None:
        self._beats += 1

    def restore(self, folder: str) -> None:
        """Takes over a state that was written, by however many ranks."""
        from rlhf.learn.state import restore

        restore(Path(folder), self._trainers)
        self._beats += 1
