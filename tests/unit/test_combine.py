"""Combinations against exact products of probabilities and direct sums."""

import math
from fractions import Fraction
from random import Random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.utility.combine import COMBINATIONS
from rlhf.utility.reference import Reference
from rlhf.utility.transforms import TRANSFORMS

log_probabilities = st.lists(st.floats(-1e4, 0, width=32), min_size=1, max_size=6)


@given(st.lists(st.fractions(Fraction(1, 1000), 1, max_denominator=1000), min_size=1, max_size=6))
def test_and_is_the_log_of_the_product(probabilities: list[Fraction]) -> None:
    utilities = torch.tensor([math.log(p) for p in probabilities])
    combined = COMBINATIONS["and"](utilities, torch.ones(len(probabilities))).item()
    assert combined == pytest.approx(math.log(math.prod(probabilities)), rel=1e-5, abs=1e-6)


@given(log_probabilities)
def test_and_is_at_most_the_least_and_finite(utilities: list[float]) -> None:
    row = torch.tensor(utilities)
    combined = COMBINATIONS["and"](row, torch.ones(len(utilities)))
    assert combined.isfinite()
    assert combined <= row.min()


@given(log_probabilities, st.randoms())
def test_and_does_not_depend_on_the_order_of_models(utilities: list[float], random: Random) -> None:
    shuffled = list(utilities)
    random.shuffle(shuffled)
    ones = torch.ones(len(utilities))
    one, other = (COMBINATIONS["and"](torch.tensor(row), ones).item() for row in (utilities, shuffled))
    assert one == pytest.approx(other, rel=1e-6)


def test_and_of_extreme_rewards() -> None:
    rewards, zero = torch.tensor([[-1e4, 1e4], [1e4, 1e4], [-1e4, -1e4]]), torch.zeros(3, 2)
    utilities = TRANSFORMS["lsc"](rewards, Reference(zero, zero, zero))
    assert COMBINATIONS["and"](utilities, torch.ones(2)).tolist() == [-1e4, 0.0, -2e4]


@pytest.mark.parametrize("weights", [[1.0, 0.5], [2.0, 2.0], [0.0, 1.0], [1.0, float("nan")]])
def test_and_refuses_weights(weights: list[float]) -> None:
    with pytest.raises(ValueError, match=r"utility.combine=and takes weights of 1, not \["):
        COMBINATIONS["and"](torch.zeros(4, 2), torch.tensor(weights))


@given(
    st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=1, max_size=5),
    st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3),
)
def test_weighted_sum_is_the_direct_sum(rows: list[list[float]], weights: list[float]) -> None:
    combined = COMBINATIONS["weighted_sum"](torch.tensor(rows), torch.tensor(weights))
    assert combined.dtype == torch.float32
    for value, row in zip(combined.tolist(), rows, strict=True):
        direct = math.fsum(u * w for u, w in zip(row, weights, strict=True))
        assert value == pytest.approx(direct, abs=1e-3)


def test_whole_number_weights_and_leading_dimensions() -> None:
    utilities = torch.arange(24.0).reshape(2, 3, 4)
    combined = COMBINATIONS["weighted_sum"](utilities, torch.tensor([1, 0, 0, 2]))
    assert torch.equal(combined, utilities[..., 0] + 2 * utilities[..., 3])
    assert combined.shape == (2, 3)


def test_a_weight_for_each_model() -> None:
    with pytest.raises(AssertionError):
        COMBINATIONS["weighted_sum"](torch.zeros(5, 2), torch.ones(1))
