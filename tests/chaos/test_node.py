"""A node of a cluster is lost: what ran there comes up again on the others once they have room."""

import json
import signal
import subprocess
import time

import psutil
import pytest
from ray.cluster_utils import Cluster

from rlhf.flow.check import check
from rlhf.flow.history import read
from tests.chaos.job import TICK
from tests.chaos.processes import title
from tests.chaos.test_chaos import SMALL
from tests.e2e.command import COMMAND, environment

STEPS = 12
WAIT = 200.0  # seconds for any one thing


@pytest.fixture
def cluster():
    """A head alone, without CPUs for a job: the driver's node."""
    found = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    yield found
    found.shutdown()


def wait_for(what, command: subprocess.Popen) -> None:
    end = time.monotonic() + WAIT
    while not what():
        assert command.poll() is None, command.communicate()
        assert time.monotonic() < end, what
        time.sleep(TICK)


def of_node(node) -> list[psutil.Process]:
    """A node's processes."""
    found = []
    for infos in node.all_processes.values():
        for info in infos:
            started = psutil.Process(info.process.pid)
            found += [started, *started.children(recursive=True)]
    return found


@pytest.mark.e2e
@pytest.mark.timeout(400, method="signal")
def test_a_lost_node_is_replaced_and_the_job_comes_through(cluster, tmp_path):
    node = cluster.add_node(num_cpus=2)
    command = subprocess.Popen(
        [
            *COMMAND,
            "experiment=quick",
            *SMALL,
            f"resources.address='{cluster.address}'",
            f"align.steps={STEPS}",
            "align.checkpoint.every=2",
            "recovery.backoff=0.5",
            "logging.live=plain",
        ],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    store = tmp_path / "outputs" / "store"
    try:

        def trained() -> int:
            found = [*store.glob("unfinished/align/*/metrics.jsonl")]
            return found[0].read_text().count("\n") if found else 0

        wait_for(lambda: trained() >= 4, command)
        lost = of_node(node)
        assert {"ray::LearnerRank", "ray::Generator"} <= {title(p).split(".")[0] for p in lost}
        for process in lost:
            process.send_signal(signal.SIGKILL)
        cluster.remove_node(node, allow_graceful=False)
        time.sleep(10)  # there is no room for anything meanwhile
        assert command.poll() is None
        cluster.add_node(num_cpus=2)
        out, err = command.communicate(timeout=WAIT)
    finally:
        if command.poll() is None:
            command.kill()
            command.wait()
    assert command.returncode == 0, (out, err)
    assert "its processes are started again" in out
    (folder,) = store.glob("align/*")
    verdict = check(read(folder / "history.jsonl"))
    assert verdict.clean, verdict
    rows = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, STEPS + 1))
