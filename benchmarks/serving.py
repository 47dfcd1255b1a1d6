"""What `rlhf serve` takes: requests and responses a second, p50 and p99, with several clients, beside the same models
called in process on the same texts; and a replica that is killed under load.

    python -m benchmarks.serving W2                  two reward models of 34 M parameters; benchmarks/serving.json
    python -m benchmarks.serving W1 --clients 1,8,32

One request has one response (slime's and OpenRLHF's way of asking) or eight. Prompts are known from the first, untimed
round on: what is measured is scoring, not the making of references.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import requests

from benchmarks.workloads import WORKLOADS, make

TOKEN = "benchmark"
SECONDS = 15.0  # of each measurement


class Server:
    def __init__(self, world: Path, replicas: int) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url, log = f"http://127.0.0.1:{self.port}", world / "serve.log"
        given = [
            "serve", "data=none", "reward_models=none", "utility=sigmoid", "utility.combine=and", "dtype=auto",
            *(f"+source@reward_models.{n}=classifier" for n in ("rm0", "rm1")),
            *(f"reward_models.{n}.path={world / n}" for n in ("rm0", "rm1")),
            *(f"reward_models.{n}.reference=constant" for n in ("rm0", "rm1")),
            f"serve.port={self.port}", "serve.token_env=RLHF_SERVE_TOKEN", f"resources.reward.count={replicas}",
            "resources.reward.cpus=0.2", f"output_dir={world / 'out'}", "logging.live=plain",
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf", *given],
            env=os.environ | {"RLHF_SERVE_TOKEN": TOKEN, "PYTHONUNBUFFERED": "1"},
            stdout=log.open("w"),
            stderr=subprocess.STDOUT,
        )
        while f"serve: {self.url}" not in log.read_text():
            assert self.process.poll() is None, log.read_text()
            time.sleep(0.3)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(120)

    def replicas(self) -> list[psutil.Process]:
        children = psutil.Process(self.process.pid).children(recursive=True)
        return [c for c in children if "reward-rm0" in " ".join(c.cmdline())]


def load(
    server: Server, bodies: Sequence[dict], clients: int, seconds: float, between: Any = None
) -> dict[str, Any]:
    """Clients that ask one request after another. `between`: is called in the middle."""
    took: list[float] = []
    failed: list[str] = []
    end = time.perf_counter() + seconds

    def client(number: int) -> None:
        session = requests.Session()
        session.headers["Authorization"] = f"Bearer {TOKEN}"
        turn = number
        while time.perf_counter() < end:
            started = time.perf_counter()
            try:
                answer = session.post(
                    f"{server.url}/v1/rewards", json=bodies[turn % len(bodies)], timeout=120
                )
                if answer.status_code != 200:
                    failed.append(f"{answer.status_code} {answer.text[:100]}")
            except requests.RequestException as error:
                failed.append(type(error).__name__)
            took.append(time.perf_counter() - started)
            turn += clients

    if between is not None:
        threading.Timer(seconds / 3, between).start()
    started = time.perf_counter()
    with ThreadPoolExecutor(clients) as threads:
        for one in [threads.submit(client, n) for n in range(clients)]:
            one.result()
    wall = time.perf_counter() - started
    size = len(bodies[0]["conversations"][0]["responses"])
    return {
        "clients": clients,
        "responses_a_request": size,
        "requests_a_second": len(took) / wall,
        "responses_a_second": size * len(took) / wall,
        "p50_ms": 1000 * float(np.quantile(took, 0.5)),
        "p99_ms": 1000 * float(np.quantile(took, 0.99)),
        "failed": len(failed),
        "first_failures": failed[:3],
    }


def in_process(world: Path, texts: Sequence[tuple[str, list[str]]]) -> float:
    """Responses a second of both models called one after the other, 64 at a time, with all threads."""
    import torch

    from rlhf.models.reward import RewardScorer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    scorers = [RewardScorer(n, str(world / n), dtype="auto") for n in ("rm0", "rm1")]
    rows = [(p, r) for p, responses in texts for r in responses][:64]
    prompts, responses = (list(column) for column in zip(*rows, strict=True))
    for scorer in scorers:
        scorer.score(prompts, responses)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < SECONDS:
        for scorer in scorers:
            scorer.score(prompts, responses)
        count += len(rows)
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", choices=WORKLOADS, nargs="?", default="W2")
    parser.add_argument("--clients", default="1,8,32")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    workload, rng = WORKLOADS[given.workload], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        make(workload, world)
        prompts = [json.loads(line)["prompt"] for line in (world / "prompts.jsonl").read_text().splitlines()]
        words = prompts[0].split() + prompts[1].split()
        texts = [(p, [" ".join(rng.choice(words, workload.new // 2)) for _ in range(8)]) for p in prompts]
        single = [{"conversations": [{"prompt": p, "responses": [r]}]} for p, every in texts for r in every]
        eight = [{"conversations": [{"prompt": p, "responses": every}]} for p, every in texts]
        found: dict[str, Any] = {"workload": given.workload, "about": workload.about, "load": []}
        with Server(world, replicas=1) as server:
            load(server, single, 8, 5.0)
            for bodies in (single, eight):
                for clients in map(int, given.clients.split(",")):
                    found["load"].append(load(server, bodies, clients, SECONDS))
                    print(json.dumps(found["load"][-1]))
        with Server(world, replicas=2) as server:
            load(server, single, 8, 5.0)
            killed = load(server, single, 16, 2 * SECONDS, lambda: server.replicas()[0].kill())
            found["a_replica_killed"] = killed
            print("a replica of two is killed:", json.dumps(killed))
        found["in_process_responses_a_second"] = in_process(world, texts)
        best = max(row["responses_a_second"] for row in found["load"])
        found["ratio"] = best / found["in_process_responses_a_second"]
        alone = found["in_process_responses_a_second"]
        print(f"in process: {alone:.1f} responses/s; served {found['ratio']:.2f} of it")
    if given.output:
        given.output.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
