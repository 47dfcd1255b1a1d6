"""What roles compute on, what presets for GPUs ask for, and what cannot be placed."""

import ast
from pathlib import Path

import pytest
import torch

from actors.resources import asked, check_machine, check_offer
from rlhf.config import RoleConfig
from rlhf.generate.engines import engine_class
from rlhf.learn.engine import deepspeed_settings
from rlhf.models.device import Compute, gpu_fault
from tests.unit.test_config import config

ROOT = Path(__file__).resolve().parents[2]
BUILT = torch.version.cuda is not None or torch.version.hip is not None
NODE = {"CPU": 96.0, "GPU": 8.0}
PRESETS = {"gpu1": [{"CPU": 8.0, "GPU": 1.0}], "gpu8": [NODE], "gpu16": [NODE, NODE]}


def test_backend_and_accelerator_follow_from_the_device():
    on_cpu, on_gpu = Compute.of(RoleConfig(1, 0.4, 0.0)), Compute.of(RoleConfig(1, 3.0, 0.25))
    assert (on_cpu.device, on_cpu.backend, on_cpu.accelerator, on_cpu.threads) == ("cpu", "gloo", "cpu", 1)
    assert (on_gpu.device, on_gpu.backend, on_gpu.accelerator, on_gpu.threads) == ("cuda", "nccl", "cuda", 3)
    assert (on_cpu.shared, on_gpu.shared, Compute.of(RoleConfig(1, 3.0, 1.0)).shared) == (False, True, False)
    on_cpu.check("resources.learner")
    on_cpu.rest()


@pytest.mark.skipif(BUILT, reason="this PyTorch is built for GPUs")
def test_a_gpu_that_cannot_be_used_is_refused_by_the_roles_name():
    assert "is built without CUDA" in gpu_fault()
    for role in ("learner", "generators", "reward"):
        asking = config(f"resources.{role}.gpus=1", "resources.learner.count=1")
        with pytest.raises(ValueError, match=rf"^resources.{role}.gpus: PyTorch .* built without CUDA"):
            check_machine(asking)
    with pytest.raises(ValueError, match=r"resources.learner.gpus: PyTorch"):
        Compute.of(RoleConfig(1, 1.0, 1.0)).check("resources.learner")


def decisions(tree: ast.AST) -> list[str]:
    """Where code names a device for GPUs, what goes with it, or asks PyTorch for them."""
    named = [
        node.lineno
        for node in ast.walk(tree)
        if (isinstance(node, ast.Constant) and node.value in ("cuda", "nccl", "gloo"))
        or (isinstance(node, ast.Attribute) and node.attr in ("cuda", "hip"))
    ]
    return [str(line) for line in named]


def test_one_module_decides():
    found = {
        str(path.relative_to(ROOT)): decisions(ast.parse(path.read_text()))
        for wing in ("rlhf", "actors")
        for path in (ROOT / wing).rglob("*.py")
    }
    assert {path for path, lines in found.items() if lines} == {"rlhf/models/device.py"}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize(
    "more", [[], ["algorithm=ppo"], ["deepspeed=zero3", "dtype=auto", "evaluators=microcosm"]]
)
def test_presets_for_gpus_pass_the_checks_and_fit(preset, more):
    found = config(f"resources={preset}", *more)
    assert {role.gpus > 0 for role in asked(found).values() if role.count} == {True}
    engine_class(found.rollout).check(found.rollout, found.resources.generators.gpus)
    check_offer(found, PRESETS[preset])


@pytest.mark.parametrize(
    ("overrides", "nodes", "message"),
    [
        (
            ["resources=gpu8"],
            [{"CPU": 96.0, "GPU": 4.0}],
            r"ask for 7.5 GPUs together, there are 4 \(resources.generators for 3, resources.learner for 4, "
            r"resources.reward for 0.5\)",
        ),
        (
            ["resources=gpu8", "resources.generators={count: 1, cpus: 4, gpus: 2}"],
            [{"CPU": 96.0, "GPU": 1.0}] * 8,
            r"^resources.generators asks for 1 processes of 4 CPUs and 2 GPUs each, and there is room for 0 "
            r"\(8 nodes of 96 CPUs and 1 GPUs\)",
        ),
        (
            [
                "resources=gpu8",
                "resources.learner={count: 4, cpus: 1, gpus: 0.6}",
                "resources.generators.gpus=0",
            ],
            [{"CPU": 96.0, "GPU": 3.0}],
            r"^resources.learner asks for 4 processes .* room for 3",
        ),
        (
            ["resources=gpu16", "resources.learner.cpus=40"],
            [{"CPU": 400.0, "GPU": 0.0}, {"CPU": 36.0, "GPU": 8.0}, {"CPU": 36.0, "GPU": 8.0}],
            r"^resources.learner asks for 8 processes .* room for 0",
        ),
    ],
)
def test_what_no_node_has_room_for_is_refused_by_the_roles_name(overrides, nodes, message):
    found = config(*overrides)
    with pytest.raises(ValueError, match=message):
        check_offer(found, nodes)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "resources.learner={count: 1, cpus: 1, gpus: 2}",
            r"learner.gpus=2: .* raise resources.learner.count",
        ),
        ("resources.reward.gpus=4", r"reward.gpus=4: .* raise resources.reward.count"),
        (
            "resources.learner={count: 2, cpus: 1, gpus: 0.5}",
            r"two of the 2 ranks on one GPU, which NCCL refuses",
        ),
    ],
)
def test_gpus_that_a_role_cannot_use_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        config("resources=gpu8", override)


def test_the_embedded_engine_takes_one_gpu():
    rollout = config().rollout
    engine_class(rollout).check(rollout, 1.0)
    with pytest.raises(ValueError, match=r"generators.gpus=2: rollout.engine=embedded samples on one GPU"):
        engine_class(rollout).check(rollout, 2.0)


def test_the_optimiser_is_the_same_on_every_device():
    """A device that the machine has beside the rank's decides nothing."""
    settings = config("deepspeed=zero2", "deepspeed.dtype=bfloat16").deepspeed
    on_cpu, on_gpu = (deepspeed_settings(settings, 1e-3, 0.0, 1.0, device) for device in ("cpu", "cuda"))
    assert on_cpu == on_gpu
    assert on_gpu["optimizer"]["params"]["torch_adam"]
