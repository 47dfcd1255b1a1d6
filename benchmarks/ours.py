"""Our side of the side-by-side benchmark: the align stage with the real actors. Prints one JSON line.

    python -m benchmarks.ours W2 FOLDER STEPS [OVERRIDE ...]        FOLDER: where benchmarks.workloads.make wrote

Overrides are Hydra's, after those of the workload.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workloads import KL_COEF, PER_STEP, PROMPTS, SAMPLES, WORKLOADS
from rlhf import timeline
from rlhf.config import Config
from rlhf.config_checks import typed
from rlhf.logs import read_metrics

WARM_UP = 4
"""Steps left out: first calls of everything, the pipeline fills, the object store's memory is new."""


MODELS = ("ray::LearnerRank", "ray::Generator", "ray::ServeReplica:rewards")
"""Processes that compute with models, by the beginning of their titles; but not the one that passes calls on."""


class OtherProcesses(threading.Thread):
    """CPU seconds of the processes of this run that hold no model, read every five seconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._read: list[tuple[float, float]] = []  # time, CPU seconds so far
        self._used: dict[int, float] = {}

    def run(self) -> None:
        import psutil

        while True:
            here = psutil.Process()
            for process in [here, *here.children(recursive=True)]:
                try:
                    title = " ".join(process.cmdline())
                    used = process.cpu_times()
                except psutil.Error:
                    continue
                if not title.startswith(MODELS) or title.rstrip().endswith("ingress"):
                    self._used[process.pid] = used.user + used.system
            self._read.append((time.time(), sum(self._used.values())))
            time.sleep(5.0)

    def share(self, start: float, end: float) -> float:
        """Of the CPU time that there was between two times."""
        times, used = zip(*self._read, strict=True)
        before, after = np.interp([start, end], times, used)
        return float(after - before) / (end - start) / len(os.sched_getaffinity(0))


def configure(workload: str, world: Path, output: Path, steps: int, overrides: Sequence[str]) -> Config:
    from hydra import compose, initialize_config_module

    given = [
        "data=files",
        f"data.prompts={world / 'prompts.jsonl'}",
        f"data.eval_prompts={world / 'eval.jsonl'}",
        f"data.train_size={PROMPTS}",
        f"policy.path={world / 'policy'}",
        "reward_models=none",
        *(f"+source@reward_models.{name}=classifier" for name in ("rm0", "rm1")),
        *(f"reward_models.{name}.path={world / name}" for name in ("rm0", "rm1")),
        *(f"reward_models.{name}.reference=constant" for name in ("rm0", "rm1")),
        "stages=[baseline,align]",
        f"output_dir={output}",
        "baseline.samples=1",
        f"rollout.max_new_tokens={WORKLOADS[workload].new}",
        f"rollout.prompts_per_item={PER_STEP // 2}",
        f"align.steps={steps + WARM_UP}",
        f"align.prompts_per_step={PER_STEP}",
        f"align.samples_per_prompt={SAMPLES}",
        f"align.kl_coef={KL_COEF}",
        "align.learning_rate=0.0",
        "logging={live: 'off', loggers: []}",
    ]
    with initialize_config_module("conf", version_base=None):
        return typed(compose("config", overrides=[*given, *overrides]))


def measure(workload: str, world: Path, steps: int, overrides: Sequence[str]) -> dict[str, Any]:
    from actors.job import run
    from actors.preflight import preflight
    from actors.session import Session
    from actors.stages.align import Align
    from actors.stages.stage import Stages
    from rlhf.store import Store

    session, others = Session(), OtherProcesses()
    others.start()
    with tempfile.TemporaryDirectory() as temporary:
        output = Path(temporary)
        config = configure(workload, world, output, steps, overrides)
        try:
            run(config, output / "run", "", session)
        finally:
            session.stop()
        store = Store(output / "store")
        folder = Stages(config, preflight(config, store), store).of(Align).path
        metrics, spans = read_metrics(folder)[WARM_UP:], timeline.read(folder / "timeline.json")
        written = (folder / "timeline.json").stat().st_mtime
    seconds = [m["seconds"] for m in metrics]
    end = max(s.end for s in spans)
    start = end - sum(seconds)
    samples = PER_STEP * SAMPLES
    shares, idle = timeline.shares(spans, start, end), 1 - timeline.covered(spans, start, end)
    other = others.share(written - sum(seconds), written)
    moved = sum(track.get(f"{way} weights", 0.0) for track in shares.values() for way in ("pull", "publish"))
    keys = [k for k in metrics[0] if k.startswith(("seconds/", "sampler_gap", "share/"))]
    return {
        "step_s": [round(s, 4) for s in seconds],
        "samples_per_s": samples / statistics.fmean(seconds),
        "idle_share": idle,
        "other_processes": other,
        "overhead": idle + other + moved / len(os.sched_getaffinity(0)),
        "shares": shares,
        "response_tokens": statistics.fmean(m["response_tokens"] for m in metrics),
        "means": {k: round(statistics.fmean(m[k] for m in metrics), 4) for k in keys},
        "overrides": list(overrides),
    }


def main() -> None:
    workload, world, steps, *overrides = sys.argv[1:]
    print(json.dumps(measure(workload, Path(world), int(steps), overrides)))


if __name__ == "__main__":
    main()
