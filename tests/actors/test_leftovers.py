"""A command that is killed leaves no process of its own Ray, no session folder and no shared memory."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.e2e.command import ROOT, environment

pytestmark = pytest.mark.actors

PROGRAM = """
import os, signal, sys, time
import numpy as np
import ray
from actors.cluster import Cluster
from actors.leftovers import keep
from tests.actors.conftest import composed

cluster = Cluster(composed())
class Busy:
    def data(self): return np.ones(10_000_000)
    def work(self): time.sleep(1000)
actor = ray.remote(num_cpus=0)(Busy).remote()
ray.get(actor.data.remote())
actor.work.remote()
print(ray._private.worker._global_node.get_session_dir_path(), flush=True)
if sys.argv[1] == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if sys.argv[1] == "failed":
    keep()
    sys.exit(1)
cluster.stop()
"""


def left_of(folder: str, before: set[str]) -> list[str]:
    """Processes by their command lines, and files, of a session."""
    found = []
    for process in psutil.process_iter():
        try:
            words = " ".join(process.cmdline())
            files = [f.path for f in process.open_files()]
        except psutil.Error:
            continue
        if any(folder in text for text in (words, *files)):
            found.append(words)
    return found + [name for name in os.listdir("/dev/shm") if name not in before]


@pytest.mark.parametrize("way", ["killed", "ended", "failed"])
def test_nothing_is_left_of_a_command(way):
    before = set(os.listdir("/dev/shm"))
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, way], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert done.returncode == {"killed": -signal.SIGKILL, "ended": 0, "failed": 1}[way], done.stderr
    folder = done.stdout.strip().splitlines()[-1]
    for _ in range(100):
        if not left_of(folder, before) and Path(folder).exists() == (way == "failed"):
            break
        time.sleep(0.1)
    assert left_of(folder, before) == []
    assert Path(folder).exists() == (way == "failed")  # its logs
