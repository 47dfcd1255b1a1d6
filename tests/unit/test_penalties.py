"""Penalties of length, against the formulas and TRL's."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.penalties import length, overlong, unfinished

LENGTHS = st.lists(st.integers(0, 60), min_size=1)


@given(LENGTHS, st.integers(1, 50), st.data())
def test_overlong_is_dapos(lengths, limit, data):
    """Equation 13 of arXiv 2503.14476 in its three cases, and TRL's function of it."""
    from trl.rewards import get_soft_overlong_punishment

    buffer = data.draw(st.integers(1, limit))
    given = [[5] * n for n in lengths]
    expected = []
    for n in lengths:
        if n <= limit - buffer:
            expected.append(0.0)
        elif n <= limit:
            expected.append(((limit - buffer) - n) / buffer)
        else:
            expected.append(-1.0)
    found = overlong(completion_ids=given, limit=limit, buffer=buffer, prompts=["x"] * len(given))
    assert found == expected == get_soft_overlong_punishment(limit, buffer)(given)


@given(LENGTHS, st.floats(0, 1e3))
def test_length_is_what_each_token_costs(lengths, per_token):
    found = length(completion_ids=[np.zeros(n, np.int32) for n in lengths], per_token=per_token, topic=None)
    np.testing.assert_allclose(found, [-sum([per_token] * n) for n in lengths], rtol=1e-9)


def test_unfinished_takes_numpys_booleans():
    found = unfinished(finished=np.array([False, True, False]), penalty=1, completions=["a", "b", "c"])
    assert found == [-1.0, 0.0, -1.0]
    assert all(type(value) is float for value in found)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: overlong([[1]], limit=10, buffer=0), r"overlong: buffer=0 must be within \[1, limit=10\]"),
        (lambda: overlong([[1]], limit=10, buffer=11), r"overlong: buffer=11 must be within \[1, limit=10\]"),
        (lambda: length([[1]], per_token=-0.1), r"length: per_token=-0.1 must be 0 or more"),
        (lambda: unfinished([True], penalty=-1.0), r"unfinished: penalty=-1.0 must be 0 or more"),
        (lambda: unfinished([True], penalty=float("nan")), r"unfinished: penalty=nan must be 0 or more"),
    ],
)
def test_what_would_mislead_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
