"""Training through the real actors heads for the closed form pi0 * exp(u / beta); the whole check is
`python -m benchmarks.theorem`."""

import pytest

from benchmarks.theorem import case
from tests.actors.conftest import session_on

pytestmark = pytest.mark.actors


@pytest.fixture(scope="module")
def session(cluster):
    held = session_on(cluster)
    yield held
    held.release()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("theorem")


@pytest.mark.parametrize(("algorithm", "utility"), [("rloo", "lsc"), ("ppo", "par")])
def test_training_covers_most_of_the_way_to_the_closed_form(session, folder, algorithm, utility):
    found = case(algorithm, utility, 60, 64, session, folder)
    assert found["closed_form_to_base"] > 0.4
    assert found["to_closed_form"] < 0.35 * found["base_to_closed_form"]
    assert found["total_probability"] == pytest.approx(1, abs=1e-4)


@pytest.mark.parametrize("fault", ["uncentred", "kl_sign"])
def test_a_wrong_objective_ends_elsewhere(session, folder, fault):
    found = case("rloo", "lsc", 60, 64, session, folder, fault)
    assert found["to_closed_form"] > 0.5 * found["base_to_closed_form"]
