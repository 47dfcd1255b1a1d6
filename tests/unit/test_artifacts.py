"""What a stage's output is named by: everything that it depends on, and nothing else."""

import pytest

from actors.artifacts import Artifacts
from rlhf.data.prepare import prepare
from rlhf.store import Store
from tests.unit.test_config import config

SMALL = ["data.microcosm={demonstrations: 50, pairs: 20, eval_share: 0.2, seed: 0}", "evaluators=microcosm"]
NAMES = ("policy_name", "reward_names", "evaluator_names", "baseline_name", "align_name", "base_samples_name")


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The names of a run with these overrides."""
    store = Store(tmp_path_factory.mktemp("store"))

    def of(*overrides: str) -> dict[str, object]:
        made = config(*SMALL, *overrides)
        artifacts = Artifacts(made, prepare(made, store), store)
        return {name: getattr(artifacts, name) for name in NAMES} | {"evaluate_name": artifacts.evaluate_name}

    return of


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("reward_models.harmless.canned=[No.]", {"baseline_name", "align_name", "evaluate_name"}),
        ("baseline.samples=8", {"baseline_name", "align_name", "evaluate_name"}),
        ("baseline.level=0.5", {"align_name", "evaluate_name"}),
        ("utility=linear", {"align_name", "evaluate_name"}),
        ("policy.lora={rank: 2, alpha: 4, target_modules: all-linear}", {"align_name", "evaluate_name"}),
        ("evaluators.helpful.chat_template=hh", {"evaluator_names", "base_samples_name", "evaluate_name"}),
        ("evaluate.level=0.5", {"base_samples_name", "evaluate_name"}),
        ("evaluate.best_of=[2]", set()),
        ("resources.generators.count=1", set()),
        ("seed=1", {*NAMES, "evaluate_name"}),
    ],
)
def test_a_setting_changes_the_names_of_what_depends_on_it(names, override, changed):
    before, after = names(), names(override)
    assert {name for name in before if before[name] != after[name]} == changed
