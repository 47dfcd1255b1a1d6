"""Types and cross-field checks of the configuration. The values, and so every default, are in `conf/`.

Imports neither torch nor Ray, so that a bad configuration is refused at once.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf.utility.kinds import check_utility

STAGES = ("sft", "reward_models", "baseline", "align", "evaluate", "report")


@dataclass
class MicrocosmConfig:
    """Size of the embedded data set (`rlhf/data/microcosm.py`)."""

    demonstrations: int
    pairs: int
    eval_share: float  # share of the prompts held out for evaluation
    seed: int


@dataclass
class DataConfig:
    """Either the microcosm, or the user's own files and hub data sets."""

    microcosm: MicrocosmConfig | None
    prompts: str | None  # a file, a folder or a hub name (see rlhf/data/rows.py)
    eval_prompts: str | None  # null: eval_size prompts are held out of `prompts`
    eval_size: int  # evaluation prompts used, at most
    train_size: int | None  # training prompts used, at most; null: all
    demonstrations: str | None  # for the sft stage
    tolerated_share: float  # of preference rows that are no pair: left out and counted; more is an error
    judge: str | None  # "microcosm", or null: the reward models judge


@dataclass
class TrainingConfig:
    """Supervised or Bradley-Terry training of one model."""

    steps: int
    batch_size: int  # examples (or pairs) a step, over all ranks
    learning_rate: float
    warmup_steps: int
    weight_decay: float


@dataclass
class ArchitectureConfig:
    """A Llama-style model made from nothing; used when neither path nor init_from is given."""

    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    max_positions: int
    activation: str  # transformers' name: relu, silu, ...
    initializer_range: float


@dataclass
class LoraConfig:
    """Low-rank adapters, by peft. The reference policy is then the policy with its adapter off."""

    rank: int
    alpha: int  # the adapter's product is scaled by alpha / rank
    target_modules: Any  # names of modules, or "all-linear"


@dataclass
class PolicyConfig:
    path: str | None  # a finished base policy: the sft stage is skipped
    init_from: str | None  # the model that sft starts from; null: `architecture`, with random weights
    chat_template: str | None  # Jinja text, a file, or "hh"; null: the tokenizer's own
    architecture: ArchitectureConfig
    training: TrainingConfig
    lora: LoraConfig | None  # align adapters and not the policy's own weights; null: all weights


@dataclass
class RewardModelConfig:
    path: str | None  # a finished sequence classifier with one label: not trained
    init_from: str | None  # the model that training starts from; null: the base policy
    preferences: str | None  # pairs to train on; null: the microcosm's, by the model's name
    chat_template: str | None
    training: TrainingConfig | None  # null only where path is given
    weight: float  # of its utility in the combination
    reference: str  # r_ref: quantile | canned | mean | constant | column
    canned: list[str]  # responses whose mean reward is r_ref, for reference=canned
    constant: float  # r_ref, for reference=constant
    column: str | None  # of the prompts' data set, which holds r_ref, for reference=column


@dataclass
class UtilityConfig:
    transform: str  # a name in rlhf.utility.kinds
    combine: str  # a name in rlhf.utility.kinds, or an expression: "helpful & ~(verbose | sycophantic)"
    parameters: dict[str, float]  # of the transform and the combination


@dataclass
class BaselineConfig:
    samples: int  # base-policy responses for each prompt; with a tolerance, of each round
    level: float  # of the quantile
    estimator: str  # empirical | gaussian
    tolerance: (
        float | None
    )  # sample on until r_ref's standard error is at most this, in reward units; null: one round
    max_samples: int  # responses for each prompt, at most, with a tolerance
    exact: int  # samples of a prompt kept as they are; beyond, a quantile sketch
    known: str | None  # statistics.npz of an earlier run with the same policy and reward models; null: none
    unseen: str  # prompts that `known` does not have: sample | refuse


@dataclass
class CriticConfig:
    init_from: str | None  # a causal model or sequence classifier; null: the base policy
    learning_rate: Any  # a number, or a schedule
    trace: float  # lambda of GAE: 1: no bootstrapping, 0: one step
    clip: float | None  # how far a value may move from the old one before its error stops counting; null: any


@dataclass
class AlgorithmConfig:
    """How a policy learns from the utilities of its responses (`rlhf/learn/alignment.py`)."""

    advantage: str  # a name in rlhf.learn.advantages.ADVANTAGES
    scale: str  # what divides advantages: none | group | batch
    aggregate: (
        str  # the weight of a token in the loss: response_sum | token_mean | response_mean | length_limit
    )
    epochs: int  # passes over a batch
    minibatches: int  # optimiser steps of one pass
    clip_low: float | None  # limits of the probability ratio, 1 - clip_low and 1 + clip_high; null: none
    clip_high: float | None
    importance_cap: float  # truncation of the importance weight of a stale token
    entropy_coef: float  # nats of utility for one nat of entropy
    kl: str  # where the KL penalty is: reward | loss
    kl_estimator: str  # k1 | k2 | k3
    kl_target: float | None  # nats a response; the KL coefficient is adapted to reach it; null: it is not
    kl_horizon: float  # responses over which it is adapted
    critic: CriticConfig | None  # for advantage=gae


@dataclass
class RolloutConfig:
    max_new_tokens: int
    temperature: float
    prompts_per_item: int  # prompts in one work item: what one generator samples at a time


@dataclass
class AlignConfig:
    steps: int
    prompts_per_step: int
    samples_per_prompt: int
    kl_coef: Any  # a number, or a schedule [[step, value], ...] interpolated linearly
    learning_rate: Any  # likewise
    weight_decay: float
    max_grad_norm: float
    staleness: int  # versions a trained sample may be behind the policy; 0: on-policy, reproducible
    item_timeout: float  # seconds after which a silent generator's work is run elsewhere


@dataclass
class EvaluateConfig:
    samples: int  # responses of each policy to each evaluation prompt
    judge_samples: int  # base responses from which the judge and the evaluators take their reference
    best_of: list[int]  # best-of-n of base responses as a further policy to compare with


@dataclass
class DeepSpeedConfig:
    zero_stage: int
    dtype: str  # float32 | bfloat16
    micro_batch_tokens: int  # tokens a rank puts through the model at once
    offload_optimizer: bool


@dataclass
class RoleConfig:
    count: int  # processes: generators, learner ranks, replicas of each reward model
    cpus: float  # of each
    gpus: float  # of each


@dataclass
class ResourcesConfig:
    address: str | None  # of a Ray cluster; null: the job's own, or a new one on this machine
    autoscaling: bool  # the cluster may grow to what is asked
    generators: RoleConfig
    learner: RoleConfig
    reward: RoleConfig
    max_reward_replicas: int | None  # Serve adds replicas of a model up to this under load; null: never
    master_port: int | None  # of the learner's process group; null: any free one
    dashboard_port: int | None  # of Ray's dashboard; null: none


@dataclass
class LoggingConfig:
    live: str  # auto | plain | off
    tensorboard: bool


@dataclass
class StudyConfig:
    """A cell of a sweep that is compared with its other cells (`rlhf/evaluate/comparison.py`)."""

    arm: str  # what is compared: a name in conf/arm
    point: str  # which of kl_coefs
    kl_coefs: dict[str, float]


@dataclass
class Config:
    stages: list[str]
    seed: int
    output_dir: str
    data: DataConfig
    policy: PolicyConfig
    reward_models: dict[str, RewardModelConfig]
    evaluators: dict[
        str, RewardModelConfig
    ]  # trained apart, never optimised: they judge by the model of the same name
    utility: UtilityConfig
    baseline: BaselineConfig
    algorithm: AlgorithmConfig
    rollout: RolloutConfig
    align: AlignConfig
    evaluate: EvaluateConfig
    deepspeed: DeepSpeedConfig
    resources: ResourcesConfig
    logging: LoggingConfig
    study: StudyConfig | None


def typed(values: DictConfig) -> Config:
    """The composed Hydra configuration as a checked `Config`.

    Raises:
        ValueError: a key is unknown, missing, of the wrong type, or at odds with another; it names the key.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None) or "?"
        raise ValueError(f"configuration key '{key}': {str(error).splitlines()[0]}") from None
    assert isinstance(config, Config)
    check(config)
    return config


def check(config: Config) -> None:
    """Refuses impossible values and combinations; each message names the key."""
    _check_names(config)
    _check_numbers(config)
    _check_inputs(config)


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ValueError(message)


def _all_models(config: Config) -> list[tuple[str, RewardModelConfig]]:
    groups = {"reward_models": config.reward_models, "evaluators": config.evaluators}
    return [(f"{group}.{name}", m) for group, models in groups.items() for name, m in models.items()]


def _check_names(config: Config) -> None:
    for stage in config.stages:
        _refuse(stage not in STAGES, f"stages: '{stage}' is not one of {', '.join(STAGES)}")
    choices = {
        "baseline.estimator": (config.baseline.estimator, ("empirical", "gaussian")),
        "deepspeed.dtype": (config.deepspeed.dtype, ("float32", "bfloat16")),
        "deepspeed.zero_stage": (config.deepspeed.zero_stage, (0, 1, 2, 3)),
        "logging.live": (config.logging.live, ("auto", "plain", "off")),
        "data.judge": (config.data.judge, (None, "microcosm")),
        "baseline.unseen": (config.baseline.unseen, ("sample", "refuse")),
        "algorithm.scale": (config.algorithm.scale, ("none", "group", "batch")),
        "algorithm.aggregate": (
            config.algorithm.aggregate,
            ("response_sum", "token_mean", "response_mean", "length_limit"),
        ),
        "algorithm.kl": (config.algorithm.kl, ("reward", "loss")),
        "algorithm.kl_estimator": (config.algorithm.kl_estimator, ("k1", "k2", "k3")),
    }
    for key, model in _all_models(config):
        name = key.rsplit(".", 1)[1]
        _refuse(not name.isidentifier(), f"{key}: a reward model's name must be letters, digits and _")
        _refuse(name == "joint", f"{key}: 'joint' is taken; give the model another name")
        choices[f"{key}.reference"] = (
            model.reference,
            ("quantile", "canned", "mean", "constant", "column"),
        )
    for key, (value, allowed) in choices.items():
        _refuse(value not in allowed, f"{key}={value} is not one of {', '.join(map(str, allowed))}")


def _check_numbers(config: Config) -> None:
    align, resources = config.align, config.resources
    positive = {
        "align.steps": align.steps,
        "align.prompts_per_step": align.prompts_per_step,
        "align.item_timeout": align.item_timeout,
        "baseline.samples": config.baseline.samples,
        "baseline.exact": config.baseline.exact,
        "evaluate.samples": config.evaluate.samples,
        "evaluate.judge_samples": config.evaluate.judge_samples,
        "rollout.max_new_tokens": config.rollout.max_new_tokens,
        "rollout.temperature": config.rollout.temperature,
        "rollout.prompts_per_item": config.rollout.prompts_per_item,
        "data.eval_size": config.data.eval_size,
        "deepspeed.micro_batch_tokens": config.deepspeed.micro_batch_tokens,
        "algorithm.importance_cap": config.algorithm.importance_cap,
        "algorithm.epochs": config.algorithm.epochs,
        "algorithm.minibatches": config.algorithm.minibatches,
        "algorithm.kl_horizon": config.algorithm.kl_horizon,
        "resources.generators.count": resources.generators.count,
        "resources.learner.count": resources.learner.count,
        "resources.reward.count": resources.reward.count,
    }
    for key, number in positive.items():
        _refuse(not number > 0, f"{key}={number} must be above 0")
    _refuse(align.staleness < 0, f"align.staleness={align.staleness} must be 0 or more")
    _check_algorithm(config)
    _check_baseline(config)
    _refuse(
        align.prompts_per_step % config.rollout.prompts_per_item != 0,
        f"align.prompts_per_step={align.prompts_per_step} must be a multiple of "
        f"rollout.prompts_per_item={config.rollout.prompts_per_item}",
    )
    share = config.data.tolerated_share
    _refuse(not 0 <= share < 1, f"data.tolerated_share={share} must be within [0, 1)")
    for key in ("kl_coef", "learning_rate"):
        schedule_values = _schedule_values(f"align.{key}", getattr(align, key))
        _refuse(min(schedule_values) < 0, f"align.{key} must not be negative")
    _refuse(
        resources.max_reward_replicas is not None and resources.max_reward_replicas < resources.reward.count,
        f"resources.max_reward_replicas={resources.max_reward_replicas} is below "
        f"resources.reward.count={resources.reward.count}",
    )


def _check_algorithm(config: Config) -> None:
    align, algorithm, critic = config.align, config.algorithm, config.algorithm.critic
    grouped = algorithm.advantage in ("leave_one_out", "group_mean") or algorithm.scale == "group"
    _refuse(
        grouped and align.samples_per_prompt < 2,
        f"align.samples_per_prompt={align.samples_per_prompt}: a baseline made of the prompt's other responses "
        f"(algorithm.advantage={algorithm.advantage}) needs at least 2",
    )
    share = max(1, align.prompts_per_step // config.resources.learner.count)
    _refuse(
        algorithm.minibatches > share,
        f"algorithm.minibatches={algorithm.minibatches} is more than the {share} prompts of each learner rank "
        "(align.prompts_per_step / resources.learner.count)",
    )
    for key in ("clip_low", "clip_high", "kl_target"):
        value = getattr(algorithm, key)
        _refuse(value is not None and not value > 0, f"algorithm.{key}={value} must be above 0, or null")
    _refuse(
        algorithm.entropy_coef < 0, f"algorithm.entropy_coef={algorithm.entropy_coef} must not be negative"
    )
    _refuse(
        algorithm.kl == "loss" and algorithm.kl_estimator == "k1",
        "algorithm.kl_estimator=k1 has no effect with algorithm.kl=loss (the expectation of its gradient is 0); "
        "use k2 or k3, or algorithm.kl=reward",
    )
    _refuse(
        algorithm.kl_target is not None and align.kl_coef == 0,
        "algorithm.kl_target needs an align.kl_coef above 0 to start from",
    )
    gae = algorithm.advantage == "gae"
    _refuse(gae and critic is None, "algorithm.advantage=gae needs algorithm.critic, as in algorithm=ppo")
    _refuse(
        not gae and critic is not None,
        f"algorithm.critic is for algorithm.advantage=gae, not {algorithm.advantage}; set it to null",
    )
    if critic is not None:
        _refuse(not 0 <= critic.trace <= 1, f"algorithm.critic.trace={critic.trace} must be within [0, 1]")
        _refuse(
            critic.clip is not None and not critic.clip > 0,
            f"algorithm.critic.clip={critic.clip} must be above 0, or null",
        )
        rates = _schedule_values("algorithm.critic.learning_rate", critic.learning_rate)
        _refuse(min(rates) < 0, "algorithm.critic.learning_rate must not be negative")
    lora = config.policy.lora
    if lora is not None:
        _refuse(lora.rank < 1, f"policy.lora.rank={lora.rank} must be 1 or more")


def _check_baseline(config: Config) -> None:
    baseline = config.baseline
    _refuse(not 0 < baseline.level < 1, f"baseline.level={baseline.level} must be within (0, 1)")
    if baseline.tolerance is not None:
        _refuse(
            not baseline.tolerance > 0, f"baseline.tolerance={baseline.tolerance} must be above 0, or null"
        )
        _refuse(
            baseline.max_samples < baseline.samples,
            f"baseline.max_samples={baseline.max_samples} is below baseline.samples={baseline.samples}",
        )
    _refuse(
        baseline.unseen == "refuse" and baseline.known is None,
        "baseline.unseen=refuse needs baseline.known, the statistics that have all prompts",
    )
    for n in config.evaluate.best_of:
        _refuse(
            not 2 <= n <= config.evaluate.samples,
            f"evaluate.best_of has {n}: it must be within 2 and evaluate.samples={config.evaluate.samples}",
        )


def _schedule_values(key: str, schedule: Any) -> list[float]:
    number = (int, float)
    if isinstance(schedule, number) and not isinstance(schedule, bool):
        return [float(schedule)]
    pairs = isinstance(schedule, list) and all(
        isinstance(p, list) and len(p) == 2 and all(isinstance(v, number) for v in p) for p in schedule
    )
    _refuse(not pairs or not schedule, f"{key} must be a number or [[step, value], ...], not {schedule}")
    steps = [p[0] for p in schedule]
    ordered = steps[0] == 0 and all(a < b for a, b in itertools.pairwise(steps))
    _refuse(not ordered, f"{key}: the steps of a schedule begin at 0 and rise, not {steps}")
    return [float(p[1]) for p in schedule]


def _check_inputs(config: Config) -> None:
    data, policy, models = config.data, config.policy, config.reward_models
    _refuse(not models, "reward_models is empty: give at least one")
    if data.microcosm is None:
        _refuse(data.prompts is None, "data.prompts is missing: give a JSONL or Parquet file, or a hub name")
        _refuse(
            data.judge is not None, f"data.judge={data.judge} needs the microcosm's prompts (data=microcosm)"
        )
        _refuse(
            policy.path is None and (data.demonstrations is None or policy.init_from is None),
            "give policy.path (a finished policy), or policy.init_from and data.demonstrations (to train one)",
        )
        for name, model in models.items():
            _refuse(
                model.path is None and model.preferences is None,
                f"give reward_models.{name}.path (a finished model) or reward_models.{name}.preferences",
            )
    else:
        _refuse(
            data.prompts is not None, "data.prompts needs data=files: data=microcosm brings its own prompts"
        )
        for name, model in models.items():
            _refuse(
                model.path is None and model.preferences is None and name not in ("helpful", "harmless"),
                f"give reward_models.{name}.path or .preferences: the microcosm has pairs for helpful and harmless",
            )
    for key, model in _all_models(config):
        _refuse(
            model.path is None and model.training is None,
            f"give {key}.path (a finished model) or {key}.training",
        )
        _refuse(
            model.reference == "canned" and not model.canned,
            f"{key}.reference=canned needs {key}.canned, a list of responses",
        )
        _refuse(
            model.reference == "column" and model.column is None,
            f"{key}.reference=column needs {key}.column, a column of the prompts' data set",
        )
    for name in config.evaluators:
        _refuse(
            name not in models,
            f"evaluators.{name} judges what reward_models.{name} rewards, which is not there",
        )
    check_utility(
        config.utility.transform,
        config.utility.combine,
        config.utility.parameters,
        {name: model.weight for name, model in models.items()},
    )
