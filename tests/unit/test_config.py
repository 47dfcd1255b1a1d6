"""What is refused before Ray starts, and how it is said."""

import dataclasses
import re

import pytest
from hydra import compose, initialize_config_module

from rlhf import config as types
from rlhf.config_checks import typed
from rlhf.config_numbers import RANGES
from rlhf.data.microcosm import CANNED_REFUSALS
from rlhf.sources.kinds import KINDS, source_class
from rlhf.sources.source import Source

FILES = ["data=files", "data.prompts=p.jsonl", "policy.path=p"]
GDPO = ["algorithm=gdpo", "utility=linear"]
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
        ["algorithm=gdpo", "utility=zscore", "reward_models.helpful.weight=2"],
        ["experiment=study", "arm=gdpo"],
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
        (["align.kl_coef=-0.1"], r"align.kl_coef=-0.1 must be 0 or more"),
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
        (
            ["reward_models.helpful.canned=[[0,a]]"],
            r"'reward_models.helpful.canned\[0\]' must be str, and is \[0, 'a'\]",
        ),
        (["stages='${seed}'"], r"'stages' must be list, and is 0"),
        (["rollout='${seed}'"], r"'rollout' must be a group of keys, and is 0"),
        (["resources.max_reward_replicas=1", "resources.reward.count=2"], r"max_reward_replicas=1 is below"),
        (
            ["algorithm=gdpo"],
            r"utility.combine=and: algorithm.advantage=gdpo .* set utility.combine=weighted_sum",
        ),
        ([*GDPO, "algorithm.kl=reward"], r"algorithm.kl=reward: .*advantage=gdpo .* set algorithm.kl=loss"),
        (
            [*GDPO, "algorithm.scale=batch"],
            r"algorithm.scale=batch: .*advantage=gdpo .* algorithm.scale=none",
        ),
        ([*GDPO, "align.samples_per_prompt=1"], r"align.samples_per_prompt=1: .*advantage=gdpo.* at least 2"),
    ],
)
def test_impossible_values_are_refused_by_key(overrides, message):
    with pytest.raises(ValueError, match=message):
        config(*overrides)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed=-1", r"seed=-1 must be within \[0, "),
        ("data.train_size=0", r"data.train_size=0 must be above 0"),
        ("data.train_size=-3", r"data.train_size=-3 must be above 0"),
        ("data.microcosm.pairs=0", r"data.microcosm.pairs=0 must be above 0"),
        ("data.microcosm.eval_share=1", r"data.microcosm.eval_share=1.0 must be within \(0, 1\)"),
        ("data.tolerated_share=1", r"data.tolerated_share=1 would leave no row"),
        ("policy.training.batch_size=0", r"policy.training.batch_size=0 must be above 0"),
        ("policy.training.learning_rate=-1", r"policy.training.learning_rate=-1.0 must be 0 or more"),
        ("policy.architecture.heads=0", r"policy.architecture.heads=0 must be above 0"),
        ("policy.architecture.heads=3", r"hidden_size=128 must be an even multiple of .*heads=3"),
        ("policy.architecture.max_positions=40", r"max_positions=40 leaves no room .*max_new_tokens=40"),
        ("policy.lora={rank: 0, alpha: 1, target_modules: x}", r"policy.lora.rank=0 must be above 0"),
        (
            "reward_models.harmless.training.warmup_steps=-1",
            r"harmless.training.warmup_steps=-1 must be 0 or",
        ),
        ("reward_models.helpful.weight=nan", r"reward_models.helpful.weight=nan must be a finite number"),
        (
            "reward_models.helpful.constant=inf",
            r"reward_models.helpful.constant=inf must be a finite number",
        ),
        ("align.kl_coef=nan", r"align.kl_coef=nan must be a finite number"),
        ("align.learning_rate=[[0,0.1],[5,-inf]]", r"align.learning_rate=-inf must be a finite number"),
        ("align.learning_rate=[[0,0.1],[5,-1]]", r"align.learning_rate=-1 must be 0 or more"),
        ("align.learning_rate=[[0,true]]", r"align.learning_rate must be a number or"),
        ("recovery.silence=0", r"recovery.silence=0.0 must be above 0"),
        ("algorithm.kl_horizon=inf", r"algorithm.kl_horizon=inf must be a finite number"),
        ("algorithm.clip_low=0", r"algorithm.clip_low=0.0 must be above 0"),
        ("rollout.temperature=0", r"rollout.temperature=0.0 must be above 0"),
        ("evaluate.best_of=[1]", r"evaluate.best_of=1 must be 2 or more"),
        ("deepspeed.micro_batch_tokens=0", r"deepspeed.micro_batch_tokens=0 must be above 0"),
        ("resources.learner.cpus=-1", r"resources.learner.cpus=-1.0 must be 0 or more"),
        ("resources.learner.gpus=1.5", r"resources.learner.gpus=1.5 must be a whole number, or at most 1"),
        ("resources.dashboard_port=70000", r"resources.dashboard_port=70000 must be within \[1, 65535\]"),
        ("stages=[]", r"stages is empty"),
    ],
)
def test_numbers_out_of_their_range_are_refused(override, message):
    with pytest.raises(ValueError, match=message):
        config(override)


def test_ppo_needs_a_sample():
    assert config("algorithm=ppo", "align.samples_per_prompt=1").align.samples_per_prompt == 1
    with pytest.raises(ValueError, match=r"align.samples_per_prompt=0 must be above 0"):
        config("algorithm=ppo", "align.samples_per_prompt=0")


def test_every_number_has_a_range():
    """A new field of numbers is refused its place until its range is told."""
    numbers = re.compile(r"\b(int|float|Any)\b")
    classes = [c for c in vars(types).values() if dataclasses.is_dataclass(c)]
    sources = [Source, *(source_class("key", kind) for kind in KINDS)]
    found = {c: {f.name for f in dataclasses.fields(c) if numbers.search(f.type)} for c in classes}
    found[types.Config] -= {"reward_models", "evaluators"}  # of sources
    found[types.LoggingConfig] -= {"custom"}
    found[types.RolloutConfig] -= {"options"}  # of engines
    found[types.LoraConfig] -= {"target_modules"}
    found[types.DataConfig] -= {"prompts", "eval_prompts", "demonstrations"}
    assert {c: names for c, names in found.items() if names} == {c: set(r) for c, r in RANGES.items()}
    for kind in sources:
        own = {f.name for f in dataclasses.fields(kind) if numbers.search(str(f.type))}
        assert own - {*kind.data_keys, "heads", "arguments", "extra"} == set(kind.ranges), kind
