"""deepspeed.offload_optimizer: what is learnt with the optimiser's state on the CPU, saved and loaded."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.learner_group import merged
from tests.ranks import RUNS, Ranks, together
from tests.states import restored, resumed
from tests.unit.test_config import config

NAMES = ("sft", "rloo", "ppo", "lora")
CASES = [
    *itertools.product(NAMES, (1, 2, 3), ("float32",)),
    *itertools.product(("sft",), (1, 2, 3), ("bfloat16",)),
]
SAVED = [*itertools.product(("sft", "ppo"), (1, 2, 3), ("float32", "bfloat16"))]


def everything(root: Path, rank: int, world: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name, stage, dtype in CASES:
        for offload in (False, True):
            steps, trainer = RUNS[name](Ranks(rank, world, stage, dtype, offload))
            weights = {n: v.clone() for n, v in trainer._parameters().items()}
            found[name, stage, dtype, offload] = (steps, weights)
    for name, stage, dtype in SAVED:
        at = Ranks(rank, world, stage, dtype, offload=True)
        found["saved", name, stage, dtype] = resumed(at, root, name)
        plain = Ranks(rank, world, stage, dtype)
        found["without", name, stage, dtype] = restored(plain, root, name)
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict[Any, Any]]]:
    return together(partial(everything, tmp_path_factory.mktemp("states")), (1, 2), 240)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("name", "stage", "dtype"), CASES)
def test_steps_are_those_without(found, world, name, stage, dtype):
    """Norms and sums are added up elsewhere, in another order."""
    ranks = [[found[world][rank][name, stage, dtype, way] for way in (False, True)] for rank in range(world)]
    for plain, offloaded in zip(
        *([merged(p) for p in zip(*(r[w][0] for r in ranks), strict=True)] for w in (0, 1)), strict=True
    ):
        assert offloaded == pytest.approx(plain, rel=1e-5, abs=1e-6)
        assert plain["grad_norm"] > 0
    close = {"atol": 1e-6, "rtol": 1e-6} if dtype == "float32" else {"atol": 1e-3, "rtol": 1e-2}
    (_, weights), (_, others) = ranks[0]
    assert others.keys() == weights.keys()
    for key, value in weights.items():
        torch.testing.assert_close(others[key], value, **close, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("name", "stage", "dtype"), SAVED)
def test_training_from_a_saved_state_goes_on_bit_for_bit(found, world, name, stage, dtype):
    for rank in range(world):
        run = found[world][rank]["saved", name, stage, dtype]
        assert run["same memory"]
        assert run["alike without room"]
        assert run["steps from 1"] == run["steps"][1:]
        assert run["end from 1"]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("name", "stage", "dtype"), SAVED)
def test_a_trainer_without_takes_over_the_state(found, world, name, stage, dtype):
    for rank in range(world):
        middle = found[world][rank]["saved", name, stage, dtype]["middle"]
        loaded = found[world][rank]["without", name, stage, dtype]
        assert loaded.keys() == middle.keys()
        assert all(torch.equal(loaded[key], value) for key, value in middle.items())


def test_it_is_refused_where_nothing_would_be_offloaded():
    with pytest.raises(ValueError, match=r"^deepspeed\.offload_optimizer=true needs a ZeRO stage of 1 to 3"):
        config("deepspeed.offload_optimizer=true")
    assert config("deepspeed=zero1", "deepspeed.offload_optimizer=true").deepspeed.offload_optimizer
