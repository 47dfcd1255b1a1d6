"""A process of Ray that ends while Ray starts: the command begins anew, and comes through."""

import re
import signal
import subprocess
import time

import psutil
import pytest

from tests.e2e.command import COMMAND, environment
from tests.e2e.test_errors import TINY, _given, place  # noqa: F401 - a fixture

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300, method="signal")]


def born(command: subprocess.Popen, name: str) -> psutil.Process:
    """A child of the command, once it is there."""
    while True:
        assert command.poll() is None, command.communicate()
        for child in psutil.Process(command.pid).children():
            if child.name() == name:
                return child
        time.sleep(0.005)


def test_a_raylet_that_ends_at_its_start(place, tmp_path):  # noqa: F811
    given = [*TINY, *_given(place), f"output_dir={tmp_path}", "logging.live=plain", "stages=[baseline]"]
    command = subprocess.Popen(
        [*COMMAND, *given, "recovery.backoff=0.1"],
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    born(command, "raylet").send_signal(signal.SIGKILL)
    out, err = command.communicate(timeout=200)
    assert command.returncode == 0, (out, err)
    assert re.search(r"baseline: .*(raylet ended|Ray does not start).*; the command begins anew", out), out
    assert out.count("baseline: done in") == 1, out
