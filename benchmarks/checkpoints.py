"""What a checkpoint of a learner costs: python -m benchmarks.checkpoints [W1 W2]

One rank, ZeRO 0, float32, the policy of a workload, supervised steps on as many tokens as its batches have: what the
copy takes on the critical path, what the file takes beside, and by how much the steps beside it are slowed. The share
of a step is that of the copy and of the slowing, at a checkpoint every 5 minutes and every 10 steps.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks.workloads import PER_STEP, SAMPLES, WORKLOADS, Workload, make

TURNS, EVERY, MINUTES = 3, 10, 5


def _trainer(workload: Workload, folder: Path) -> tuple[Callable[[], object], dict]:
    """A step, and the trainers whose state is saved."""
    from rlhf.config import DeepSpeedConfig
    from rlhf.learn.logprobs import PolicyModel
    from rlhf.learn.objectives import Supervised, TokenPairs
    from rlhf.learn.trainer import Trainer
    from rlhf.models.load import load_policy
    from rlhf.types import Ragged

    make(workload, folder)
    policy = PolicyModel(load_policy(str(folder / "policy")))
    trainer = Trainer(policy, DeepSpeedConfig(0, "float32", 4096, False), 0.0, 1.0)
    trainer.objective = Supervised(policy.lay)
    rng, rows = np.random.default_rng(0), PER_STEP * SAMPLES
    data = TokenPairs(
        *(
            Ragged.of([rng.integers(4, workload.vocabulary, size=n) for _ in range(rows)], np.int32)
            for n in (workload.prompt, workload.new)
        )
    )
    return lambda: trainer.step((data, np.arange(rows)), 0.0), {"policy": trainer}


def measured(workload: Workload, folder: Path) -> dict[str, float]:
    """Seconds, but for megabytes."""
    from rlhf.checksums import checksum
    from rlhf.learn.state import Snapshot

    step, trainers = _trainer(workload, folder)
    step()
    snapshot, path = Snapshot(), folder / "state.safetensors"
    snapshot.take(trainers)

    def timed(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    def write() -> None:
        snapshot.write(path)
        checksum(path)

    def beside() -> tuple[float, float]:
        """The write's time, and what steps took more than alone while it lasted."""
        found: list[float] = []
        writing = threading.Thread(target=lambda: found.append(timed(write)))
        started, steps = time.perf_counter(), 0
        writing.start()
        while writing.is_alive():
            step()
            steps += 1
        return found[0], time.perf_counter() - started - steps * alone

    take = median(timed(lambda: snapshot.take(trainers)) for _ in range(TURNS))
    alone = median(timed(step) for _ in range(TURNS))
    by_itself = median(timed(write) for _ in range(TURNS))
    with_steps = [beside() for _ in range(TURNS)]
    slowed = median(max(0.0, lost) for _, lost in with_steps)
    return {
        "megabytes": snapshot.size / 1e6,
        "step": alone,
        "copy": take,
        "write alone": by_itself,
        "write beside": median(t for t, _ in with_steps),
        "slowed by": slowed,
    }


def main(names: list[str]) -> None:
    import deepspeed
    import deepspeed.ops
    import torch

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) - 1))
    logging.disable(logging.WARNING)
    for key, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}.items():
        os.environ[key] = value
    os.environ["MASTER_PORT"] = "0"
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    gc.freeze()
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            found = measured(WORKLOADS[name], Path(folder))
        cost = found["copy"] + found["slowed by"]
        shares = {
            f"every {MINUTES} minutes": cost / (60 * MINUTES),
            f"every {EVERY} steps": cost / (EVERY * found["step"]),
        }
        cells = [f"{key} {value:.3f}" for key, value in found.items()]
        cells += [f"{key} {100 * value:.2f} %" for key, value in shares.items()]
        sys.stdout.write(f"{name}: {', '.join(cells)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "error")
    main(sys.argv[1:] or ["W1", "W2"])
