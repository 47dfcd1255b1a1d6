"""A Ray job submitted to a local head: it runs, and its exit status comes back."""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.e2e.command import ROOT

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300, method="signal")]
BIN = Path(sys.executable).parent
TINY = [
    "data.microcosm={demonstrations: 200, pairs: 200, eval_share: 0.2, seed: 0}",
    "data.train_size=16",
    "data.eval_size=8",
    "policy.training.steps=2",
    "reward_models.helpful.training.steps=2",
    "reward_models.harmless.training.steps=2",
    "rollout.prompts_per_item=8",
    "baseline.samples=4",
    "align.steps=2",
    "align.prompts_per_step=8",
    "align.samples_per_prompt=2",
    "evaluate={samples: 2, judge_samples: 4, level: 0.85, best_of: [2]}",
]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """A Ray head of its own: its address for jobs, and the environment of its commands."""
    folder = tmp_path_factory.mktemp("ray")
    dashboard = free_port()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    environment |= {
        "PATH": f"{BIN}:{environment['PATH']}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": "a-token-of-this-test-alone-" + os.urandom(8).hex(),
    }
    ports = ["--port", "--dashboard-port", "--dashboard-agent-listen-port", "--ray-client-server-port"]
    chosen = [str(free_port()), str(dashboard), str(free_port()), str(free_port())]
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", "--node-ip-address=127.0.0.1"]
    with open(folder / "head.log", "w") as log:
        process = subprocess.Popen(
            [*command, *(word for pair in zip(ports, chosen, strict=True) for word in pair)],
            env=environment,
            stdout=log,
            stderr=log,
        )
    yield f"http://127.0.0.1:{dashboard}", environment, folder / "head.log", process
    process.terminate()
    process.wait(60)


def submit(head, *overrides: str) -> subprocess.CompletedProcess[str]:
    address, environment, _, process = head
    command = [str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", ".", "--"]
    deadline = time.monotonic() + 90
    while True:
        done = subprocess.run(
            [*command, "python", "-m", "rlhf", *overrides],
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
        )
        up = "Job 'raysubmit" in done.stdout + done.stderr
        if up or time.monotonic() > deadline or process.poll() is not None:
            return done
        time.sleep(1)


def test_job_runs_and_reports(head, tmp_path):
    done = submit(head, *TINY, f"output_dir={tmp_path}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:] + head[2].read_text()[-1000:]
    assert (tmp_path / "latest" / "report.html").is_file()
    assert "on the given cluster" in done.stdout


def test_job_that_fails_fails(head, tmp_path):
    done = submit(head, "data.microcosm.pairs=200", "utility.transform=square", f"output_dir={tmp_path}")
    assert done.returncode == 1
    assert "utility" in done.stdout
