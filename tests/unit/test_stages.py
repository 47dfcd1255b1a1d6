"""What a stage's output is named by: everything that it depends on, and nothing else."""

import json

import pytest

from actors.stages.align import Align
from actors.stages.base_samples import BaseSamples
from actors.stages.baseline import Baseline
from actors.stages.evaluate import Evaluate
from actors.stages.reward_models import RewardModels
from actors.stages.sft import Sft
from actors.stages.stage import Stages
from rlhf.data.prepare import prepare
from rlhf.store import Store
from tests.unit.test_config import config

SMALL = ["data.microcosm={demonstrations: 50, pairs: 20, eval_share: 0.2, seed: 0}", "evaluators=microcosm"]
NAMES = ("policy_name", "reward_names", "evaluator_names", "baseline_name", "align_name", "base_samples_name")


def names_of(stages: Stages) -> dict[str, object]:
    models = stages.of(RewardModels)
    return {
        "policy_name": stages.of(Sft).policy_name,
        "reward_names": models.names,
        "evaluator_names": models.evaluator_names,
        "baseline_name": stages.of(Baseline).output_name,
        "align_name": stages.of(Align).output_name,
        "base_samples_name": stages.of(BaseSamples).output_name,
        "evaluate_name": stages.of(Evaluate).output_name,
    }


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    """The names of a run with these overrides."""
    store = Store(tmp_path_factory.mktemp("store"))

    def of(*overrides: str) -> dict[str, object]:
        made = config(*SMALL, *overrides)
        return names_of(Stages(made, prepare(made, store), store))

    return of


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        (
            "reward_models.helpful.held_out=0.1",
            {"reward_names", "baseline_name", "align_name", "base_samples_name", "evaluate_name"},
        ),
        ("utility.calibrated=false", {"align_name", "evaluate_name"}),
        ("reward_models.harmless.canned=[No.]", {"baseline_name", "align_name", "evaluate_name"}),
        ("baseline.samples=8", {"baseline_name", "align_name", "evaluate_name"}),
        ("baseline.level=0.5", {"align_name", "evaluate_name"}),
        ("utility=linear", {"align_name", "evaluate_name"}),
        ("policy.lora={rank: 2, alpha: 4, target_modules: all-linear}", {"align_name", "evaluate_name"}),
        ("evaluators.helpful.chat_template=hh", {"evaluator_names", "base_samples_name", "evaluate_name"}),
        ("evaluate.level=0.5", {"base_samples_name", "evaluate_name"}),
        ("evaluate.best_of=[2]", set()),
        ("resources.generators.count=1", set()),
        ("align.checkpoint={every: 2, keep: 9}", set()),
        ("deepspeed=zero3", set()),
        ("recovery.silence=5", set()),
        ("logging={loggers: [], project: other, run: one, tags: [a], patience: 1}", set()),
        ("hub={repo: me/it, license: mit}", set()),
        ("seed=1", {*NAMES, "evaluate_name"}),
    ],
)
def test_a_setting_changes_the_names_of_what_depends_on_it(names, override, changed):
    before, after = names(), names(override)
    assert {name for name in before if before[name] != after[name]} == changed


def test_a_change_in_any_of_several_files_changes_the_names(tmp_path):
    def put(name: str, *words: str) -> None:
        rows = [
            {"prompt": f"{word} ?", "completion": "yes", "chosen": "yes", "rejected": "no"} for word in words
        ]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    def of() -> tuple[str, dict[str, str], dict[str, str]]:
        reward = {"init_from": "r", "preferences": f"{tmp_path}/shard*.jsonl"}
        overrides = [
            f"{group}.helpful.{k}={v}" for group in ("reward_models", "evaluators") for k, v in reward.items()
        ]
        made = config(
            *("data=files", f"data.prompts={tmp_path}/p.jsonl", "data.eval_size=1", "policy.init_from=p"),
            *(
                "evaluators=microcosm",
                "reward_models.harmless.path=s",
                *overrides,
                "evaluators.harmless.path=s",
            ),
            f"data.demonstrations=[{tmp_path}/shard1.jsonl,{tmp_path}/shard2.jsonl]",
        )
        store = Store(tmp_path / "store")
        stages = Stages(made, prepare(made, store), store)
        return (
            stages.of(Sft).policy_name,
            stages.of(RewardModels).names,
            stages.of(RewardModels).evaluator_names,
        )

    put("p.jsonl", "a", "b")
    put("shard1.jsonl", "c")
    put("shard2.jsonl", "d")
    first, again = of(), of()
    put("shard2.jsonl", "e")
    changed = of()
    put("shard3.jsonl", "f")  # matches the pattern, and is not in the list
    more = of()
    assert first == again
    assert [a != b for a, b in zip(first, changed, strict=True)] == [True, True, True]
    assert [a != b for a, b in zip(changed, more, strict=True)] == [False, True, True]
    assert more[1]["harmless"] == first[1]["harmless"]


def test_columns_that_a_source_reads_change_the_names(tmp_path):
    """The prompts are the same; what is right of them is not."""
    (tmp_path / "rule.py").write_text(
        "def right(completions, answer, **_): return [c == a for c, a in zip(completions, answer)]\n"
    )

    def of(answer: str, *overrides: str) -> dict[str, object]:
        rows = [{"prompt": f"{word} ?", "answer": answer} for word in ("a", "b", "c")]
        (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = ["data=files", f"data.prompts={tmp_path}/prompts.jsonl", "data.eval_size=1", "policy.path=p"]
        made = config(*files, "reward_models.helpful.path=h", "reward_models.harmless.path=s", *overrides)
        store = Store(tmp_path / "store")
        return names_of(Stages(made, prepare(made, store), store))

    rule = ["+source@reward_models.rule=function", f"reward_models.rule.path={tmp_path}/rule.py:right",
            "reward_models.rule.scale=verdict"]  # fmt: skip
    assert of("x") == of("y")
    before, after = of("x", *rule), of("y", *rule)
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {"reward_names", "baseline_name", "align_name", "base_samples_name", "evaluate_name"}
    assert before["reward_names"]["helpful"] == after["reward_names"]["helpful"]
