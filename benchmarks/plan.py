"""What `rlhf plan` predicts beside what is measured: the peak memory of each role's process, two steps of align.

    python -m benchmarks.plan                    every case; writes benchmarks/plan.json
    python -m benchmarks.plan W2-float32 ...     some cases; prints them

Measured is the peak of RssAnon of /proc/PID/status, read every 20 ms: the memory that is a process's own. Pages of
files (libraries, checkpoints being read), which the system can drop, and of the object store, which processes share,
are left out. A checkpoint is made of each step, as it is in a long run. Predicted is for responses of the mean length.
"""

from __future__ import annotations

import itertools
import json
import logging
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from benchmarks import smollm2
from benchmarks.workloads import PER_STEP, PROMPTS, SAMPLES, WORKLOADS, make
from rlhf.config import Config

RESULTS = Path(__file__).with_suffix(".json")
STEPS = 2
OWN, RESIDENT = "RssAnon", "VmHWM"
ROLES = {
    "ray::LearnerRank": "learner rank",
    "ray::Generator": "generator",
    "ray::BaselineEstimator": "baseline",
    "ray::ExperienceQueue": "queue",
    "ray::ServeReplica:rewards": "reward model",
}
"""Titles of processes, by their beginnings. """
WORDS = (
    "tell me how a river finds its way down to the sea and why the water there is salt while rain is not. "
)


@dataclass(frozen=True)
class Case:
    world: str  # a workload, or SmolLM2
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return "-".join(
            [self.world, *(word.split("=")[-1] for word in self.overrides if "lora=" not in word)]
        )


LORA = "policy.lora={rank: 16, alpha: 32, target_modules: all-linear}"


def cases() -> dict[str, Case]:
    found = {}
    for dtype in ("float32", "bfloat16"):
        for world in ("W1", "W2", "W3", "SmolLM2"):
            found[f"{world}-{dtype}"] = Case(world, (f"dtype={dtype}",))
            found[f"{world}-{dtype}-checkpointing"] = Case(
                world, (f"dtype={dtype}", "deepspeed.activation_checkpointing=true")
            )
        found[f"SmolLM2-{dtype}-lora"] = Case("SmolLM2", (f"dtype={dtype}", LORA))
        found[f"W3-{dtype}-zero2"] = Case(
            "W3", (f"dtype={dtype}", "deepspeed=zero2", "resources.learner.count=2")
        )
    return found


class Peaks(threading.Thread):
    """The most memory of its own that each process of this run had, by its role, MiB; read every 20 ms."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._roles: dict[int, str] = {}  # by process
        self._ever: dict[int, str] = {}
        self._peaks: dict[int, dict[str, int]] = {}
        self._over = threading.Event()

    def run(self) -> None:
        for turn in itertools.count():
            if turn % 50 == 0:
                self._find()
            for pid in list(self._roles):
                self._look(pid)
            if self._over.wait(0.02):
                return

    def _find(self) -> None:
        here = psutil.Process()
        self._roles = {here.pid: "driver"}
        for process in here.children(recursive=True):
            with suppress(psutil.Error):  # it has ended
                role = role_of(" ".join(process.cmdline()))
                if role is not None:
                    self._roles[process.pid] = role
        self._ever |= self._roles

    def _look(self, pid: int) -> None:
        try:
            text = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # it has ended
            return
        fields = dict(line.split(":", 1) for line in text.splitlines())
        known = self._peaks.setdefault(pid, {})
        for key in (OWN, RESIDENT):
            if key in fields:
                known[key] = max(known.get(key, 0), int(fields[key].split()[0]) // 1024)

    def stop(self) -> dict[str, dict[str, int]]:
        """Of the process of each role that took the most."""
        self._over.set()
        self.join()
        found: dict[str, dict[str, int]] = {}
        for pid, peak in self._peaks.items():
            role = self._ever[pid]
            if peak.get(OWN, 0) > found.get(role, {OWN: -1})[OWN]:
                found[role] = peak
        return found


def role_of(title: str) -> str | None:
    if title.startswith("ray::ServeReplica"):
        return "reward ingress" if ":ingress" in title else "reward model"
    if title.startswith(("ray::ServeController", "ray::ProxyActor")):
        return "serve controller"
    return next((role for start, role in ROLES.items() if title.startswith(start)), None)


def world(name: str, folder: Path) -> list[str]:
    """Makes the models and prompts of a world; the overrides that give them."""
    policy = folder / "policy"
    if name == "SmolLM2":
        policy = smollm2.make()
        _reward_models(policy, folder)
        lines = [json.dumps({"prompt": f"Say it in {i} words: {WORDS * 2}"}) for i in range(1, PROMPTS + 2)]
        (folder / "prompts.jsonl").write_text("\n".join(lines[1:]))
        (folder / "eval.jsonl").write_text(lines[0])
        new, samples = 48, 4
    else:
        make(WORKLOADS[name], folder)
        new, samples = WORKLOADS[name].new, SAMPLES
    return [
        "data=files",
        f"data.prompts={folder / 'prompts.jsonl'}",
        f"data.eval_prompts={folder / 'eval.jsonl'}",
        f"data.train_size={PER_STEP}",
        f"policy.path={policy}",
        "reward_models=none",
        *(f"+source@reward_models.{name}=classifier" for name in ("rm0", "rm1")),
        *(f"reward_models.{name}.path={folder / name}" for name in ("rm0", "rm1")),
        *(f"reward_models.{name}.reference=constant" for name in ("rm0", "rm1")),
        "resources.learner.count=1",
        "resources.generators.count=1",
        f"rollout.max_new_tokens={new}",
        f"rollout.prompts_per_item={PER_STEP}",
        f"align.prompts_per_step={PER_STEP}",
        f"align.samples_per_prompt={samples}",
        "align.learning_rate=0.0",
    ]


def _reward_models(policy: Path, folder: Path) -> None:
    """Two classifiers of the policy's shape, of random weights."""
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(policy)
    config = AutoConfig.from_pretrained(policy, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    for name in ("rm0", "rm1"):
        torch.manual_seed(0)
        AutoModelForSequenceClassification.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def configured(overrides: Sequence[str]) -> Config:
    from hydra import compose, initialize_config_module

    from rlhf.config_checks import typed

    with initialize_config_module("conf", version_base=None):
        return typed(compose("config", overrides=list(overrides)))


def measured(config: Config, folder: Path) -> tuple[dict[str, dict[str, int]], float]:
    """Peaks of the roles' processes in two steps of align, and the tokens of a response."""
    from actors.job import run
    from actors.preflight import preflight
    from actors.session import Session
    from actors.stages.align import Align
    from actors.stages.stage import Stages
    from rlhf.logs import read_metrics
    from rlhf.store import Store

    peaks, session = Peaks(), Session()
    peaks.start()
    try:
        run(config, folder / "run", "", session)
    finally:
        session.stop()
    store = Store(folder / "store")
    rows = read_metrics(Stages(config, preflight(config, store), store).of(Align).path)
    return peaks.stop(), statistics.fmean(row["response_tokens"] for row in rows)


def predicted(config: Config, folder: Path) -> dict[str, int]:
    """MiB of a process of each role."""
    from actors.preflight import preflight
    from rlhf.plan.roles import plan
    from rlhf.store import Store

    store = Store(folder / "store")
    needs = plan(config, preflight(config, store), store).needs
    return {_as_measured(need.role): need.total // 2**20 for need in needs}


def _as_measured(role: str) -> str:
    return "reward model" if role.startswith("reward_models.") else role


def one(name: str) -> dict[str, Any]:
    """A case: measured and predicted MiB of each role, and by how much the prediction is off, percent."""
    case = cases()[name]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        with multiprocessing.get_context("spawn").Pool(1) as apart:  # its memory is not the driver's
            overrides = apart.apply(world, (case.world, folder))
        config = configured(
            [
                *overrides,
                "stages=[baseline,align]",
                f"output_dir={folder}",
                "baseline.samples=1",
                f"align.steps={STEPS}",
                "align.checkpoint.every=1",
                "logging={live: 'off', loggers: []}",
                *case.overrides,
            ]
        )
        peaks, tokens = measured(config, folder)
        config = replace(config, plan=replace(config.plan, response_tokens=max(1, round(tokens))))
        expected = predicted(config, folder)
    roles = {
        role: {
            "measured": peaks[role][OWN],
            "predicted": expected[role],
            "off": round(100 * (expected[role] / peaks[role][OWN] - 1), 1),
            "resident": peaks[role][RESIDENT],
        }
        for role in expected
    }
    return {"case": name, "response_tokens": round(tokens, 1), "roles": roles}


def main(names: Sequence[str]) -> None:
    """Each case in a process of its own, so that none begins with what another left."""
    if len(names) == 1:
        print(json.dumps(one(names[0])), flush=True)
        return
    found = []
    for name in names or list(cases()):
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.plan", name],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            check=True,
        )
        found.append(json.loads(done.stdout.splitlines()[-1]))
        print(told(found[-1]), flush=True)
    if not names:
        lines = ",\n".join(json.dumps(case) for case in found)
        RESULTS.write_text(f"[\n{lines}\n]\n")


def told(found: dict[str, Any]) -> str:
    """A line for each role."""
    lines = [
        f"{found['case']:<32} {role:<18} {r['measured']:>6} MiB, predicted {r['predicted']:>6}, {r['off']:+.1f} %"
        for role, r in found["roles"].items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    main(sys.argv[1:])
