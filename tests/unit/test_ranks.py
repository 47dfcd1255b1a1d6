"""Two ranks with different work, under every ZeRO stage, against one rank; and what bfloat16 adds up.

Three processes, two ranks and one alone, make all runs; each of the tests looks at some. And what becomes of the state
of a trainer: saved and loaded, by as many ranks or others, and where a step is left out.
"""

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from actors.learner_group import merged
from tests import states
from tests.ranks import RUNS, Ranks, accumulated, together
from tests.states import ACROSS, CASES

STAGES = dict.fromkeys(RUNS, (3,)) | dict.fromkeys(
    ("pairs", "rloo", "ppo", "lora", "sft, 50 000 words"), (2, 3)
)
STAGES |= dict.fromkeys(("sft", "rloo, one prompt"), (0, 1, 2, 3))
SMALL = [(stage, dtype) for dtype in ("float32", "bfloat16") for stage in range(4)]
SECONDS = 240  # a hang is a failure


def everything(root: Path, rank: int, world: int) -> dict[Any, Any]:
    found: dict[Any, Any] = dict(states.everything(rank, world, root))
    for stage, dtype in SMALL:
        found["accumulated", stage, dtype] = accumulated(Ranks(rank, world, stage, dtype))
    for name, run in RUNS.items():
        for stage in STAGES[name] if world > 1 else (0,):
            steps, trainer = run(Ranks(rank, world, stage))
            weights = trainer.weights()
            named = {} if weights is None else {n: v.clone() for n, v in weights.tensors().items()}
            found[name, stage] = steps, named
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict[int, list[dict[Any, Any]]]:
    """What each run gave, by the number of ranks and the rank."""
    return together(partial(everything, tmp_path_factory.mktemp("states")), (1, 2), SECONDS)


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
    for (loss, *of_loss), (gradient, *of_gradient) in ranks:
        assert loss.startswith(f"step 7: the loss of row {world - 1} is nan")
        assert gradient.startswith("step 7: the gradient of row 0, row 0 is not finite")
        assert loss.endswith("lower the learning rate (0.125)")
        assert (
            of_loss == of_gradient == [True, True]
        )  # nothing has changed, and training goes on as if it had not been


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("stage", "dtype"), states.SOME)
def test_a_batch_that_gives_no_finite_gradient_leaves_no_trace(found, world, stage, dtype):
    """Neither in the policy nor in the critic, on any rank; its metrics say so, and are finite."""
    ranks = [found[world][rank]["skipped", stage, dtype] for rank in range(world)]
    steps = [merged(parts) for parts in zip(*(steps for steps, _, _ in ranks), strict=True)]
    assert [step["skipped"] for step in steps] == [0.0, 1.0, 0.0]
    assert all(math.isfinite(value) for step in steps for value in step.values())
    assert steps[1]["kl"] > 0
    assert all(alike for _, alike, _ in ranks)
    assert len({error for _, _, error in ranks}) == 1
    assert "step 4: the loss of " in ranks[0][2]


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize(("name", "stage", "dtype"), CASES)
def test_training_from_a_saved_state_goes_on_bit_for_bit(found, world, name, stage, dtype):
    """Steps, weights, moments and counts; the state is that of the moment it was taken, in memory that serves again."""
    for rank in range(world):
        run = found[world][rank]["resumed", name, stage, dtype]
        assert run["same memory"]
        assert run["alike without room"]
        for start in (0, 1) if name == "sft" else (1,):
            assert run[f"steps from {start}"] == run["steps"][start:]
            assert run[f"end from {start}"]


@pytest.mark.parametrize(("name", "source", "target", "dtype"), ACROSS)
def test_other_ranks_and_stages_take_over_a_state(found, name, source, target, dtype):
    truth = found[source[0]][0]["resumed", name, source[1], dtype]
    ranks = [found[target[0]][rank]["across", name, source, target, dtype] for rank in range(target[0])]
    loaded, _, end = ranks[0]
    assert states.same(loaded, truth["middle"])
    close = {"atol": 1e-6, "rtol": 1e-6} if dtype == "float32" else {"atol": 1e-3, "rtol": 1e-2}
    for key, value in truth["end"].items():
        torch.testing.assert_close(end[key], value, **close, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("world", [1, 2])
def test_a_state_of_another_model_names_the_parameter(found, world):
    for rank in range(world):
        error = found[world][rank]["another model"]
        assert "the state of another model: of lm_head.weight it has None" in error, error
