"""The checklist's lines, and that a gap which is too large is found."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from actors.doctor import machine
from actors.doctor.command import _devices, _found, _models
from actors.doctor.finding import FAIL, OK, WARN, Finding
from rlhf.generate.transformers_engine import TransformersEngine
from rlhf.selftest.compare import Gap, gaps
from rlhf.selftest.learning import examples, plain_loss
from rlhf.selftest.models import Models, tiny
from tests.unit.test_config import config
from tests.unit.test_device import BUILT


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return tiny(tmp_path_factory.mktemp("doctor"))


class Off(TransformersEngine):
    """A sampler whose log-probabilities are a hundredth of a nat off."""

    def generate(self, item):
        found = super().generate(item)
        return replace(found, logprobs=found.logprobs + np.float32(0.01))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nothing_is_off_here(models, dtype):
    found = list(gaps(models, config().rollout, {}, "cpu", dtype, gradients=True))
    assert [gap.what for gap in found] == [
        "sampler", "learner", "learner's gradient", "reward model good", "reward model kind"
    ]  # fmt: skip
    assert all(gap.passed for gap in found), found
    assert dtype == "bfloat16" or max(gap.found for gap in found) < 1e-5


def test_a_sampler_that_is_off_is_found_out(models):
    rollout = replace(config().rollout, engine=f"{__name__}:Off")
    sampler, learner = itertools.islice(gaps(models, rollout, {}, "cpu", "float32", gradients=False), 2)
    assert not sampler.passed
    assert sampler.found == pytest.approx(0.01, rel=1e-2)
    assert learner.passed


def test_a_gap_that_is_no_number_is_none_that_passes():
    assert Gap("sampler", 0.0, 0.0, "nats").passed
    assert not Gap("sampler", float("nan"), 1.0, "nats").passed
    assert not Gap("sampler", 1.0, float("nan"), "nats").passed


def test_the_loss_to_begin_with_is_the_plain_one(models):
    from transformers import AutoModelForCausalLM

    data, model = examples(models.policy), AutoModelForCausalLM.from_pretrained(models.policy)
    every = []
    for i in range(len(data)):
        prompt, own = data.prompts[i].tolist(), data.responses[i].tolist()
        with torch.no_grad():
            logprobs = model(torch.tensor([prompt + own])).logits[0].double().log_softmax(-1)
        every += [float(logprobs[len(prompt) - 1 + t, token]) for t, token in enumerate(own)]
    assert plain_loss(models.policy, data) == pytest.approx(-np.mean(every), abs=1e-5)


def test_a_check_that_fails_is_a_finding_and_is_told_in_full(capsys):
    def check():
        yield Finding(OK, "a", "there")
        raise RuntimeError("no kernel image")

    first, second = _found("gpu", check)
    assert (first.level, second.level, second.found) == (OK, FAIL, "RuntimeError: no kernel image")
    assert "Traceback" in capsys.readouterr().err


def test_what_this_machine_has():
    assert {f.level for f in machine.versions()} <= {OK, WARN}
    found = {finding.what: finding for finding in machine.host(config())}
    assert found.keys() == {"memory", "compiled layers", "open files"}
    assert machine.shared_memory(0.0).level == OK
    much = machine.shared_memory(2.0**60)
    assert (much.level, much.advice.startswith("docker run --shm-size=")) == (WARN, True)


@pytest.mark.skipif(BUILT, reason="this PyTorch is built for GPUs")
def test_a_role_that_asks_for_a_gpu_fails_where_there_is_none():
    (quiet,) = machine.devices(config())
    assert quiet.level in (OK, WARN)
    (loud,) = machine.devices(config("resources=gpu1"))
    assert loud.level == FAIL
    assert "is built without CUDA" in loud.found
    (placed,) = _found("roles", lambda: machine.placement(config("resources=gpu1")))
    assert placed.level == FAIL
    assert placed.found.startswith("resources.generators.gpus: PyTorch")


def test_the_driver_is_read_from_what_the_system_says(tmp_path: Path):
    text = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 23 2025\nGCC version: gcc 11.4.0\n"
    (tmp_path / "version").write_text(text)
    assert machine._driver(tmp_path / "version") == "570.86.15"


def test_given_models_take_the_place_of_those_made(models):
    given = config("policy.path=p", "reward_models.helpful.path=h", "resources=gpu1")
    assert _models(given, models) == Models("p", {"helpful": "h"})
    assert _devices(given, given=True) == ["cuda"]
    assert _models(config(), models) == models
