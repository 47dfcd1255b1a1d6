"""What is refused before Ray starts, and how it is said."""

import pytest
from hydra import compose, initialize_config_module

from rlhf.config_checks import typed
from rlhf.data.microcosm import CANNED_REFUSALS

FILES = ["data=files", "data.prompts=p.jsonl", "policy.path=p"]
GIVEN = [*FILES, "reward_models.helpful.path=h", "reward_models.harmless.path=s"]


def config(*overrides: str):
    with initialize_config_module("conf", version_base=None):
        return typed(compose("config", overrides=list(overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["experiment=quick"],
        ["experiment=study", "arm=par"],
        ["utility=linear"],
        ["deepspeed=zero3"],
        GIVEN,
    ],
)
@pytest.mark.parametrize("more", [[], ["resources=cluster"], ["baseline=gaussian"]])
def test_shipped_choices_are_accepted(overrides, more):
    assert config(*overrides, *more).reward_models.keys() == {"helpful", "harmless"}


@pytest.mark.parametrize(
    ("override", "given"),
    [
        ("data.prompts=p.csv", "p.csv"),
        ("data.prompts=shards/*.jsonl", "shards/*.jsonl"),
        (
            "data.prompts=[a.jsonl,b/*.parquet,owner/name@main:test]",
            ["a.jsonl", "b/*.parquet", "owner/name@main:test"],
        ),
        ("data.eval_prompts=[a.jsonl]", ["a.jsonl"]),
        ("data.demonstrations=[a.jsonl,b.jsonl]", ["a.jsonl", "b.jsonl"]),
        ("reward_models.helpful.preferences=[a.jsonl,b.jsonl]", ["a.jsonl", "b.jsonl"]),
    ],
)
def test_a_data_key_takes_one_source_or_a_list(override, given):
    found = config(*GIVEN, override)
    key = override.split("=")[0]
    for part in key.split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    assert found == given


def test_the_canned_refusals_are_the_microcosms():
    assert tuple(config().reward_models["harmless"].canned) == CANNED_REFUSALS


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+align.epochs=2"], r"'align.epochs'"),
        (["align.steps=many"], r"'align.steps'.*many"),
        (["align.steps=0"], r"align.steps=0 must be above 0"),
        (["stages=[sft,train]"], r"stages: 'train' is not one of sft, reward_models"),
        (["align.samples_per_prompt=1"], r"align.samples_per_prompt=1: .* at least 2"),
        (["align.prompts_per_step=20"], r"align.prompts_per_step=20 must be a multiple of .*=16"),
        (["align.staleness=-1"], r"align.staleness=-1 must be 0 or more"),
        (["align.kl_coef=[[5, 0.1]]"], r"align.kl_coef: the steps of a schedule begin at 0"),
        (["align.kl_coef=high"], r"align.kl_coef must be a number or"),
        (["align.kl_coef=-0.1"], r"align.kl_coef must not be negative"),
        (["baseline.tolerance=0.1", "baseline.samples=48"], r"max_samples=128 must be a multiple of .*=48"),
        (["evaluate.samples=4"], r"evaluate.best_of has 8.*evaluate.samples=4"),
        (["evaluate.level=0"], r"evaluate.level=0.0 must be within"),
        (["baseline.level=1.0"], r"baseline.level=1.0 must be within"),
        (["deepspeed.zero_stage=4"], r"deepspeed.zero_stage=4 is not one of 0, 1, 2, 3"),
        (["utility.transform=linear"], r"utility.combine=and needs .*lsc.*, not linear"),
        (["reward_models.helpful.weight=2"], r"reward_models.helpful.weight=2.0: utility.combine=and"),
        (["reward_models.harmless.canned=[]"], r"reward_models.harmless.reference=canned needs .*canned"),
        (["reward_models.helpful.reference=best"], r"reward_models.helpful.reference=best is not one of"),
        (["data.prompts=x.jsonl"], r"data.prompts needs data=files"),
        (["data=files"], r"data.prompts is missing"),
        ([*GIVEN, "data.prompts=3"], r"data.prompts=3 must be a file, .* or a list of these"),
        ([*GIVEN, "data.eval_prompts=[]"], r"data.eval_prompts=\[\] must be a file"),
        (
            [*GIVEN, "data.demonstrations=[a.jsonl,null]"],
            r"data.demonstrations=\['a.jsonl', None\] must be a file",
        ),
        (
            [*GIVEN, "reward_models.helpful.preferences=''"],
            r"reward_models.helpful.preferences='' must be a file",
        ),
        (
            ["reward_models.harmless.canned=[No.,'\udcff']"],
            r"reward_models.harmless.canned: '\\udcff' holds half",
        ),
        (FILES, r"give reward_models.helpful.path .* or reward_models.helpful.preferences"),
        (
            ["data=files", "data.prompts=p.jsonl"],
            r"give policy.path .* policy.init_from and data.demonstrations",
        ),
        ([*GIVEN, "data.judge=microcosm"], r"data.judge=microcosm needs the microcosm's prompts"),
        (["resources.max_reward_replicas=0"], r"max_reward_replicas=0 is below"),
    ],
)
def test_impossible_values_are_refused_by_key(overrides, message):
    with pytest.raises(ValueError, match=message):
        config(*overrides)
