"""Simulated generators, which sleep, through the real controller, ledger, queue and generator pool.

Throughput against linear in the number of generators, and the driver's own load; then generators that take no time
at all: what the controller can do.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

import numpy as np

COUNTS = (1, 4, 16, 64)
SECONDS = 2.0  # that a generator takes for an item
STEPS = 8
KEPT = 6  # the last steps, which are measured


class SleepingGenerator:
    """Answers as a generator does, after a while; items come one after another."""

    def __init__(self, number: int, seconds: float, *_: Any) -> None:
        self._seconds, self._number = seconds, number
        self._lock = asyncio.Lock()

    def ping(self) -> None:
        """It is there."""

    def progress(self) -> int:
        return time.monotonic_ns()

    async def load(self, policy: str) -> list[str]:
        """There is no policy."""
        return []

    async def set_weights(self, weights: Any, version: int) -> bool:
        self._version = version
        return True

    async def generate(self, item: Any) -> Any:
        from actors.generator import Summary

        async with self._lock:
            await asyncio.sleep(self._seconds)
        version = getattr(self, "_version", 0)
        return np.zeros(8), Summary(item.id, version, 8, 80, 8, self._seconds, ())


class Other:
    """Reward pool and learner in one."""

    def rewards(self, rollouts: Any, item: int) -> Any:
        from rlhf.types import Rewards

        one = np.zeros((8, 1), np.float32)
        return Rewards(item, 0, ("a",), (1.0,), one, one, one, one, one[:, 0], one)

    def align(self, batch: Any, coefficients: Any) -> Any:
        return {"sum/trained_tokens": 1.0, "sum/tokens": 1.0, "sum/surprise": 0.0, "loss": 0.0}, ()

    def weights(self) -> np.ndarray:
        return np.zeros(8)


class Learner:
    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def align(self, batch: Any, coefficients: Any) -> list[Any]:
        return [self._actor.align.remote(batch, coefficients)]

    def weights(self) -> Any:
        return self._actor.weights.remote()


def measure(generators: int, seconds: float) -> dict[str, float]:
    """Items/s over the last steps, and the driver's CPU time per second. A step has one item of each generator."""
    import ray
    from hydra import compose, initialize_config_module

    from actors.controller import Controller
    from actors.generator_pool import GeneratorPool
    from actors.metrics import StepMetrics
    from actors.queue import start_queue
    from rlhf.config import RoleConfig
    from rlhf.config_checks import typed
    from rlhf.types import WorkItem

    overrides = [f"align.steps={STEPS}", "align.staleness=1", "align.kl_coef=0.1", "align.learning_rate=0.0"]
    with initialize_config_module("conf", version_base=None):
        config = typed(compose("config", overrides=overrides))
    pool = GeneratorPool(seconds, None, RoleConfig(generators, 0.0, 0.0), 600.0, SleepingGenerator)
    pool.load("")
    other = ray.remote(Other).options(num_cpus=0).remote()
    stamps: list[tuple[float, float]] = []

    def on_step(_: dict[str, float]) -> None:
        stamps.append((time.perf_counter(), time.process_time()))

    items = iter(range(10**9))
    controller = Controller(
        config.align,
        StepMetrics(config.align, config.algorithm),
        generators,
        lambda i: WorkItem(i, ("x",), 8, i),
        pool,
        lambda rollouts: other.rewards.remote(rollouts, next(items)),
        start_queue(),
        Learner(other),
        on_step,
    )
    controller.run()
    pool.stop()
    wall, cpu = (b - a for a, b in zip(stamps[-KEPT - 1], stamps[-1], strict=True))
    return {"items_per_s": KEPT * generators / wall, "driver_cpu": cpu / wall}


def run() -> dict[str, Any]:
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    found: dict[str, Any] = {}
    for count in COUNTS:
        one = measure(count, SECONDS)
        linear = count / SECONDS
        found[str(count)] = {
            "items_per_s": round(one["items_per_s"], 3),
            "of_linear": round(one["items_per_s"] / linear, 3),
            "driver_cpu": round(one["driver_cpu"], 3),
        }
    found["saturation_items_per_s"] = round(measure(16, 0.0)["items_per_s"])
    ray.shutdown()
    return found
