"""Ours and the peer in turn on each workload, the micro-benchmarks, and the scale run: `make bench`.

    python -m benchmarks.bench                          all, written to benchmarks/results.json
    python -m benchmarks.bench --only W1,generation     some; the others keep what the file says
    python -m benchmarks.bench --rounds 3               turns of ours and the peer (default 2)

A round runs the peer, then ours, and measures the machine's matrix rate before and after ours. Samples/s of a round are
those of all its steps after the warm-up. The share of the bound is the floating-point operations that a step needs,
each token computed once by each model that must see it, at the rate of bfloat16 matrix products of the workload's
shapes, over the step's time. The overhead is the share of the machine's time that is no model's: when no role is busy,
what processes without a model take, and the publishing and pulling of weights.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.workloads import PER_STEP, SAMPLES, WORKLOADS, Workload
from rlhf.files import write_atomic

RESULTS = Path(__file__).with_name("results.json")
TURNS = {"W1": (6, 24), "W2": (3, 10), "W3": (2, 6), "W4": (1, 5)}
"""Steps of the peer and of ours in a round, after the warm-up."""

SIDE_BY_SIDE = [
    "resources.generators={count: 1, cpus: 1, gpus: 0}",
    "resources.learner={count: 1, cpus: 1, gpus: 0}",
    "resources.reward={count: 1, cpus: 0, gpus: 0}",
    f"rollout.prompts_per_item={PER_STEP}",
]
OURS = {
    "W1": ["dtype=bfloat16", "align.staleness=1", *SIDE_BY_SIDE],
    "W2": ["dtype=bfloat16", "align.staleness=2", *SIDE_BY_SIDE],
    "W3": ["dtype=bfloat16", "align.staleness=1", *SIDE_BY_SIDE],
    "W4": ["dtype=bfloat16", "align.staleness=1", *SIDE_BY_SIDE],
}
"""Our configuration, by workload; the peer's best was chosen from float32 and bfloat16."""
PEER = {"W1": [], "W2": ["--bf16"], "W3": ["--bf16"], "W4": ["--bf16"]}

MICRO = (
    "generation",
    "smollm2",
    "learner",
    "publication",
    "queue",
    "quantiles",
    "rewards",
    "tokens",
    "scale",
)


def matrix_rate(workload: Workload, dtype: str) -> float:
    """Floating-point operations a second of the layers' matrix products, with as many rows as a step has tokens."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    kind = getattr(torch, dtype)
    rows = PER_STEP * workload.prompt + PER_STEP * SAMPLES * min(workload.new, 32)
    shapes = workload.shapes
    weights = [torch.randn(shape).to(kind) for shape in shapes]
    inputs = {n: torch.randn(rows, n).to(kind) for n in (workload.hidden, workload.intermediate)}

    def once() -> None:
        for weight in weights:
            torch.nn.functional.linear(inputs[weight.shape[1]], weight)

    once()
    best = 0.0
    until = time.perf_counter() + 2.0
    while time.perf_counter() < until:
        started = time.perf_counter()
        once()
        work = 2 * rows * sum(a * b for a, b in shapes)
        best = max(best, work / (time.perf_counter() - started))
    return best


def last_json(command: Sequence[str], timeout: float) -> dict[str, Any]:
    """Runs a command; the JSON of its last line."""
    done = subprocess.run([sys.executable, "-m", *command], capture_output=True, text=True, timeout=timeout)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def compare(name: str, rounds: int) -> dict[str, Any]:
    workload = WORKLOADS[name]
    peer_steps, our_steps = TURNS[name]
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "benchmarks.workloads", name, folder], check=True)
        for n in range(rounds):
            peer = last_json(["benchmarks.peer", name, folder, str(peer_steps), *PEER[name]], 3600)
            rates = [matrix_rate(workload, "bfloat16")]  # and after: other users of the machine come and go
            ours = last_json(["benchmarks.ours", name, folder, str(our_steps), *OURS[name]], 3600)
            rates.append(matrix_rate(workload, "bfloat16"))
            rate = statistics.fmean(rates)
            necessary = workload.necessary(PER_STEP * SAMPLES * ours["response_tokens"])
            seconds = PER_STEP * SAMPLES / ours["samples_per_s"]
            found.append(
                {
                    "ours": ours,
                    "peer": peer,
                    "matrix_rates": rates,
                    "ratio": ours["samples_per_s"] / peer["samples_per_s"],
                    "share_of_bound": necessary / rate / seconds,
                }
            )
            print(
                f"{name} round {n + 1}: ours {ours['samples_per_s']:.2f}, peer {peer['samples_per_s']:.2f} samples/s",
                flush=True,
            )
    return {
        "about": workload.about,
        "configuration": OURS[name],
        "peer": f"TRL RLOO {'bfloat16' if PEER[name] else 'float32'}",
        "ours_samples_per_s": spread([f["ours"]["samples_per_s"] for f in found]),
        "peer_samples_per_s": spread([f["peer"]["samples_per_s"] for f in found]),
        "ratio": spread([f["ratio"] for f in found]),
        "share_of_bound": spread([f["share_of_bound"] for f in found]),
        "overhead": spread([f["ours"]["overhead"] for f in found]),
        "bound": "bfloat16 matrix products",
        "rounds": found,
    }


def spread(values: Sequence[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 4),
        "min": round(min(values), 4),
        "max": round(max(values), 4),
    }


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    lines = [
        "| workload | ours, samples/s | peer, samples/s | ratio | share of the bound | overhead |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in results.items():
        if "ratio" not in row or "peer_samples_per_s" not in row:
            continue
        ours, peer, ratio, share, overhead = (
            row[k]
            for k in ("ours_samples_per_s", "peer_samples_per_s", "ratio", "share_of_bound", "overhead")
        )
        lines.append(
            f"| {name}: {row['about']} | {ours['median']:.2f} ({ours['min']:.2f}-{ours['max']:.2f}) "
            f"| {peer['median']:.2f} ({peer['min']:.2f}-{peer['max']:.2f}) "
            f"| {ratio['median']:.2f} ({ratio['min']:.2f}-{ratio['max']:.2f}) | {100 * share['median']:.0f} % "
            f"| {100 * overhead['median']:.1f} % |"
        )
    return "\n".join(lines)


def machine() -> dict[str, Any]:
    from rlhf.versions import versions

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "processor": platform.processor() or platform.machine(),
        "system": platform.system(),
        "versions": versions(),
        "commit": commit.stdout.strip(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default=",".join((*WORKLOADS, *MICRO)))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    results = json.loads(arguments.output.read_text()) if arguments.output.exists() else {}
    for name in arguments.only.split(","):
        if name in WORKLOADS:
            results[name] = compare(name, arguments.rounds)
        elif name in MICRO:
            results[name] = last_json(["benchmarks.micro", name], 3600)
            print(f"{name}: {json.dumps(results[name])}", flush=True)
        else:
            sys.exit(f"--only: {name} is none of {', '.join((*WORKLOADS, *MICRO))}")
        results[name] |= {"measured": machine()}
        write_atomic(arguments.output, json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
