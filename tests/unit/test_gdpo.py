"""GDPO's advantages against loops over groups, models and responses in plain numpy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from rlhf.learn.advantages import SMALL, Outcome, decoupled

K = 4  # responses to a prompt


def brute_force(utilities, weights, size):
    """The advantage of each response, float64 [B], by the three formulas of arXiv 2601.05242."""
    sums = np.zeros(len(utilities))
    for first in range(0, len(utilities), size):
        for model, weight in enumerate(weights):
            own = [float(utilities[b][model]) for b in range(first, first + size)]
            if np.isnan(own).any():
                continue
            mean = sum(own) / size
            std = (sum((u - mean) ** 2 for u in own) / (size - 1)) ** 0.5
            for b, u in enumerate(own, start=first):
                sums[b] += weight * (u - mean) / (std + SMALL)
    mean = sums.mean()
    std = (((sums - mean) ** 2).sum() / (len(sums) - 1)) ** 0.5
    return (sums - mean) / (std + SMALL)


def outcome(utilities, lengths=None, weights=(1.0, 0.5, 2.0), size=K, **more):
    lengths = torch.ones(len(utilities), dtype=torch.int64) if lengths is None else torch.as_tensor(lengths)
    given = torch.tensor(np.asarray(utilities), dtype=torch.float32)
    weights = torch.tensor(weights[: given.shape[1]])
    nothing = torch.zeros(int(lengths.sum()))
    return Outcome(given.nansum(1), nothing, lengths, size, utilities=given, weights=weights, **more)


def advantages(utilities, **more):
    return decoupled(outcome(utilities, **more)).numpy()


def random(groups=5, models=3, seed=0):
    rng = np.random.default_rng(seed)
    unit = np.array([0.1, 3.0, 50.0])[:models]
    return (rng.normal(size=(groups * K, models)) * unit + 100 * unit).astype(np.float32)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (1.0, 0.5, 2.0), (1.0, 0.0, -1.0)])
def test_random_groups(weights):
    utilities, lengths = random(), np.random.default_rng(1).integers(1, 6, 5 * K)
    found = advantages(utilities, lengths=lengths, weights=weights)
    expected = brute_force(utilities, weights, K).repeat(lengths)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_the_papers_example_tells_two_rewards_from_one():
    """Two responses to a prompt, two rewards of 0 or 1: to win one gives half the advantage of winning both."""
    found = advantages([[0, 0], [1, 0], [0, 0], [1, 1]], weights=(1.0, 1.0), size=2)
    apart = np.array([-1, 1, -2, 2]) / 2**0.5
    np.testing.assert_allclose(found, apart / apart.std(ddof=1), rtol=1e-5)


def ranks(utilities, split, lengths=None):
    """The advantages that two ranks find, the second with the groups from `split` on; their sums over ranks add up."""
    parts = [slice(0, split * K), slice(split * K, None)]
    own: list[torch.Tensor] = []

    def first(sums):
        own.append(sums)
        return sums

    given = [(utilities[p], None if lengths is None else lengths[p]) for p in parts]
    for rows, counts in given:
        decoupled(outcome(rows, counts, over_ranks=first))
    assert len(own) == 2
    return np.concatenate(
        [advantages(rows, lengths=counts, over_ranks=lambda _: own[0] + own[1]) for rows, counts in given]
    )


@pytest.mark.parametrize("split", [2, 5])
def test_two_ranks_find_what_one_does(split):
    """Also where one of them has nothing; and not what either finds by itself."""
    utilities, lengths = random(), np.random.default_rng(2).integers(1, 6, 5 * K)
    alone = advantages(utilities, lengths=lengths)
    np.testing.assert_allclose(ranks(utilities, split, lengths), alone, rtol=1e-5)
    if split == 2:
        apart = advantages(utilities[: 2 * K], lengths=lengths[: 2 * K])
        assert np.abs(apart - alone[: len(apart)]).max() > 0.01


@given(
    arrays(np.int8, (3 * K, 2), elements=st.integers(-20, 20)),
    st.sampled_from([0.25, 4.0, 1024.0]),
    st.sampled_from([0.0, -3.0, 500.0]),
)
def test_the_unit_and_the_zero_of_a_utility_do_not_matter(utilities, factor, offset):
    """Nor do those of another prompt's; beside SMALL, which is a millionth of these deviations or less."""
    changed = utilities.astype(np.float32)
    changed[:K, 0] = changed[:K, 0] * factor + offset
    np.testing.assert_allclose(advantages(changed), advantages(utilities), atol=1e-4)


def test_the_size_of_all_weights_does_not_matter():
    found = [advantages(random(), weights=tuple(c * w for w in (1.0, 0.5, 2.0))) for c in (1, 8)]
    np.testing.assert_allclose(*found, rtol=1e-5)


def test_a_model_that_does_not_apply_to_a_prompt_adds_nothing_there():
    utilities = random()
    utilities[K : 2 * K, 1] = np.nan
    utilities[2 * K : 3 * K] = np.nan
    found = advantages(utilities)
    np.testing.assert_allclose(found, brute_force(utilities, (1.0, 0.5, 2.0), K), rtol=1e-4, atol=1e-6)
    assert (found[2 * K : 3 * K] == 0).all()
    constant = utilities.copy()
    constant[K : 2 * K, 1] = constant[2 * K : 3 * K] = 7.0
    np.testing.assert_array_equal(found, advantages(constant))


def test_a_model_cannot_apply_to_a_part_of_a_prompts_responses():
    utilities = random()
    utilities[1, 0] = np.nan
    with pytest.raises(AssertionError, match="some of a prompt's responses"):
        advantages(utilities)


@pytest.mark.parametrize("value", [0.1, 123.456, -3e37, 1e-30])
@pytest.mark.parametrize("size", [3, 7])
def test_equal_utilities_add_exactly_nothing(value, size):
    """In float32 their mean need not be equal to them, and the difference over its deviation is about 1."""
    utilities = np.full((2 * size, 1), value, np.float32)
    assert (advantages(utilities, size=size) == 0).all()


def test_what_is_not_finite_is_not_hidden():
    utilities = random()
    utilities[0, 0] = np.inf
    assert np.isnan(advantages(utilities)[:K]).all()


def test_a_penalty_is_not_lost():
    given = outcome(random())
    with pytest.raises(AssertionError, match="penalty"):
        decoupled(Outcome(**(vars(given) | {"penalty": given.penalty + 1})))
