"""`rlhf doctor`, as users call it."""

import re

import pytest

from tests.e2e.command import rlhf
from tests.unit.test_device import BUILT

LINE = re.compile(r"^ *[\d.]+s +(ok|warn|FAIL) +([^:]+): (.+)$")


def findings(text: str) -> dict[str, str]:
    lines = [LINE.match(line) for line in text.splitlines()]
    return {found[2]: found[1] for found in lines if found}


@pytest.mark.e2e
def test_a_machine_that_can_has_status_0(tmp_path, policy_folder):
    run = rlhf("doctor", f"policy.path={policy_folder}", cwd=tmp_path, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    found = findings(run.stdout)
    assert "FAIL" not in found.values()
    for what in ("sampler", "learner", "reward model good", "reward model kind"):
        assert {found[f"{what} on cpu in {dtype}"] for dtype in ("float32", "bfloat16")} == {"ok"}
    assert found["learner on ray"] == "ok"
    assert not list(tmp_path.iterdir())


@pytest.mark.e2e
@pytest.mark.skipif(BUILT, reason="this PyTorch is built for GPUs")
def test_gpus_that_are_asked_for_and_not_there_are_the_only_failures(tmp_path):
    run = rlhf("doctor", "resources=gpu1", cwd=tmp_path, timeout=240)
    assert run.returncode == 1, run.stdout + run.stderr
    found = findings(run.stdout)
    assert {what for what, level in found.items() if level == "FAIL"} == {"gpu", "roles"}
    assert "learner's gradient on cpu in bfloat16" in found


@pytest.mark.e2e
def test_it_is_no_sweep(tmp_path):
    run = rlhf("doctor", "-m", "utility=lsc,linear", cwd=tmp_path, timeout=120)
    assert run.returncode == 1
    assert run.stderr.strip() == "error: rlhf doctor is no sweep: leave -m out"
