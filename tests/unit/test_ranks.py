"""Two ranks with different work, under every ZeRO stage, against one rank; and what bfloat16 adds up.

Three processes, two ranks and one alone, make all runs; each of the tests looks at some.
"""

from typing import Any

import numpy as np
import pytest
import torch

from actors.learner import merged
from tests.ranks import RUNS, Ranks, accumulated, refused, together

STAGES = dict.fromkeys(RUNS, (3,)) | dict.fromkeys(
    ("pairs", "rloo", "ppo", "lora", "sft, 50 000 words"), (2, 3)
)
STAGES |= dict.fromkeys(("sft", "rloo, one prompt"), (0, 1, 2, 3))
SMALL = [(stage, dtype) for dtype in ("float32", "bfloat16") for stage in range(4)]
SECONDS = 240  # a hang is a failure


def everything(rank: int, world: int) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for stage, dtype in SMALL:
        at = Ranks(rank, world, stage, dtype)
        found["accumulated", stage, dtype] = accumulated(at)
        found["refused", stage, dtype] = refused(at)
    for name, run in RUNS.items():
        for stage in STAGES[name] if world > 1 else (0,):
            steps, trainer = run(Ranks(rank, world, stage))
            weights = trainer.weights()
            named = {} if weights is None else {n: v.clone() for n, v in weights.tensors().items()}
            found[name, stage] = steps, named
    return found


@pytest.fixture(scope="module")
def found() -> dict[int, list[dict[Any, Any]]]:
    """What each run gave, by the number of ranks and the rank."""
    return together(everything, (1, 2), SECONDS)


@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name in RUNS for stage in STAGES[name]])
def test_ranks_with_unequal_work_learn_what_one_rank_does(found, name, stage):
    """Numbers of chunks of the head, of micro-batches, of rows and of prompts differ between the ranks; where there is
    one, a rank has nothing at all."""
    (expected, truth), (steps, weights) = found[1][0][name, 0], found[2][0][name, stage]
    for one, *parts in zip(expected, steps, found[2][1][name, stage][0], strict=True):
        several = merged(parts)
        assert several.keys() == one.keys()
        for key, value in one.items():
            assert several[key] == pytest.approx(value, rel=1e-5, abs=1e-5), key
    assert weights.keys() == truth.keys()
    for key, value in truth.items():
        np.testing.assert_allclose(weights[key], value, atol=1e-5, err_msg=key)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("stage", "dtype"), SMALL)
def test_gradients_add_up_in_float32_and_the_first_step_is_adams_first(found, world, stage, dtype):
    """Equal gradients move each weight by the learning rate at every step of Adam, from the first on."""
    for rank in range(world):
        for step, (norm, weights) in enumerate(found[world][rank]["accumulated", stage, dtype]):
            assert norm == pytest.approx(4 * (1 + 31 / 512), rel=1e-6)
            torch.testing.assert_close(weights, torch.full((16,), -0.125 * (step + 1)), atol=1e-5, rtol=0)


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("stage", "dtype"), SMALL)
def test_what_is_not_finite_is_an_error_on_all_ranks_and_no_step(found, world, stage, dtype):
    """It names the step, the rows and the learning rate; of a loss on one rank alone, too."""
    ranks = [found[world][rank]["refused", stage, dtype] for rank in range(world)]
    assert len(ranks[0]) == 2
    for (loss, _), (gradient, _) in ranks:
        assert loss.startswith(f"step 7: the loss of row {world - 1} is nan")
        assert gradient.startswith("step 7: the gradient of row 0 is not finite")
        assert loss.endswith("lower the learning rate (0.125)")
    assert all(weights.eq(0).all() for errors in ranks for _, weights in errors)
