"""Transforms against 60-digit decimals, their algebra by property, and their gradients."""

from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.utility.reference import Reference
from rlhf.utility.transforms import LOG_PROBABILITY, TRANSFORMS, p_good

EXTREMES = [-1e4, -100.0, -20.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 6.5, 20.0, 80.0, 100.0, 1e4]
rewards_of_a_prompt = st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=8)


def reference(r_ref: float | torch.Tensor, mean: float = 0.0, std: float = 1.0) -> Reference:
    return Reference(*(torch.as_tensor(value, dtype=torch.float32) for value in (r_ref, mean, std)))


def exact_log_sigmoid(x: float) -> float:
    with localcontext() as context:
        context.prec = 60
        return float(-(1 + (-Decimal(x)).exp()).ln())


def exact_sigmoid(x: float) -> float:
    with localcontext() as context:
        context.prec = 60
        return float(1 / (1 + (-Decimal(x)).exp()))


def test_registry() -> None:
    assert set(TRANSFORMS) >= {"lsc", "centered_linear", "linear", "zscore"}
    assert set(TRANSFORMS) >= LOG_PROBABILITY


@pytest.mark.parametrize("r_ref", [-3.25, 0.0, 5.5])
@pytest.mark.parametrize("x", EXTREMES)
def test_lsc_is_the_exact_log_sigmoid(x: float, r_ref: float) -> None:
    reward = torch.tensor([x], dtype=torch.float32)
    utility = TRANSFORMS["lsc"](reward, reference(r_ref)).item()
    # The difference itself is rounded to float32 first, half a unit in the last place of the larger operand.
    slack = 2**-23 * max(abs(x), abs(r_ref))
    assert utility == pytest.approx(exact_log_sigmoid(reward.item() - r_ref), rel=1e-6 + slack, abs=1e-37)
    assert utility <= 0


@pytest.mark.parametrize("x", EXTREMES)
def test_lsc_slope_is_the_probability_of_not_good(x: float) -> None:
    reward = torch.tensor([x], requires_grad=True)
    TRANSFORMS["lsc"](reward, reference(1.0)).sum().backward()
    assert reward.grad is not None
    assert reward.grad.item() == pytest.approx(exact_sigmoid(1.0 - reward.item()), rel=1e-5, abs=1e-37)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["lsc", "centered_linear", "linear", "zscore"])
def test_every_input_type_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    rewards = torch.tensor([-30.0, -1.5, 0.0, 7.25, 12.0], dtype=dtype)
    utility = TRANSFORMS[name](rewards, reference(0.25, 0.5, 1.5))
    assert utility.dtype == torch.float32
    assert torch.equal(utility, TRANSFORMS[name](rewards.float(), reference(0.25, 0.5, 1.5)))


def test_lsc_of_bfloat16_keeps_its_slope_above_the_reference() -> None:
    rewards = torch.tensor([7.0, 8.0, 12.0], dtype=torch.bfloat16)
    assert torch.sigmoid(rewards).log().eq(0).all(), "what lsc must not do"
    utility = TRANSFORMS["lsc"](rewards, reference(0.0))
    assert (utility < 0).all()
    assert (utility.diff() > 0).all()


@given(rewards_of_a_prompt, st.integers(-64, 64), st.floats(-8, 8, width=16))
def test_lsc_and_centred_linear_ignore_the_prompts_offset(
    row: list[float], offset: int, r_ref: float
) -> None:
    grid = np.round(np.array(row) * 64) / 64  # on this grid, float32 differences are exact
    rewards, at = torch.tensor(grid, dtype=torch.float32), round(r_ref * 64) / 64
    for name in ("lsc", "centered_linear"):
        before = TRANSFORMS[name](rewards, reference(at))
        assert torch.equal(before, TRANSFORMS[name](rewards + offset, reference(at + offset)))


@pytest.mark.parametrize("name", ["lsc", "centered_linear", "linear", "zscore"])
@given(row=rewards_of_a_prompt, r_ref=st.floats(-10, 10, width=32))
def test_more_reward_is_never_less_utility(name: str, row: list[float], r_ref: float) -> None:
    rewards = torch.tensor(sorted(row), dtype=torch.float32)
    utility = TRANSFORMS[name](rewards, reference(r_ref, 0.3, 2.0))
    assert utility.isfinite().all()
    assert (utility.diff() >= 0).all()


def test_linear_forms() -> None:
    rewards = torch.tensor([1.0, -2.0, 4.0])
    assert TRANSFORMS["linear"](rewards, reference(9.0)).tolist() == [1.0, -2.0, 4.0]
    assert TRANSFORMS["centered_linear"](rewards, reference(1.5)).tolist() == [-0.5, -3.5, 2.5]
    assert TRANSFORMS["zscore"](rewards, reference(9.0, 1.0, 2.0)).tolist() == [0.0, -1.5, 1.5]


def test_each_prompt_has_its_own_reference() -> None:
    rewards, r_ref = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[0.0], [2.0]])
    utility = TRANSFORMS["lsc"](rewards, reference(r_ref))
    assert utility.shape == (2, 2)
    assert utility[0, 0].item() == pytest.approx(exact_log_sigmoid(1.0), rel=1e-6)
    assert utility[1, 0].item() == pytest.approx(exact_log_sigmoid(-1.0), rel=1e-6)


@pytest.mark.parametrize("std", [0.0, float("nan"), 1e-42])
def test_zscore_refuses_a_spread_it_cannot_divide_by(std: float) -> None:
    stds = torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, std]])
    with pytest.raises(ValueError, match=r"prompt index 2 \(position \(2, 1\)\)"):
        TRANSFORMS["zscore"](torch.ones(3, 2), Reference(stds, torch.zeros(3, 2), stds))


@pytest.mark.parametrize("x", EXTREMES)
def test_p_good_is_the_exact_sigmoid_and_the_exponential_of_lsc(x: float) -> None:
    reward = torch.tensor([x], dtype=torch.bfloat16)
    probability = p_good(reward, reference(0.0))
    assert probability.dtype == torch.float32
    assert probability.item() == pytest.approx(exact_sigmoid(reward.item()), rel=1e-5, abs=1e-37)
    log = TRANSFORMS["lsc"](reward, reference(0.0))
    assert log.exp().item() == pytest.approx(probability.item(), rel=1e-5, abs=1e-37)
