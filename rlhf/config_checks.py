"""The composed configuration as a checked `Config`: every refusal of an impossible value or combination.

Imports neither torch nor Ray, so that a bad configuration is refused at once.
"""

from __future__ import annotations

import itertools
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rlhf.config import STAGES, Config
from rlhf.config_numbers import check_numbers, check_ranges
from rlhf.config_serving import check_alone
from rlhf.config_types import check_type
from rlhf.sources.source import Source, rewards_of
from rlhf.sources.typed import typed_source
from rlhf.utility.kinds import check_utility

DTYPES = ("float32", "bfloat16", "auto")


def typed(values: DictConfig, serving: bool = False) -> Config:
    """The composed Hydra configuration as a checked `Config`; `serving`: of `rlhf serve`, which may be without prompts.

    Raises:
        ValueError: a key is unknown, missing, of the wrong type, or at odds with another; it names the key.
    """
    try:
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    except (OmegaConfBaseException, OverflowError) as error:  # a whole number beyond any float
        key = getattr(error, "full_key", None) or _misfit(values)
        raise ValueError(f"configuration key '{key}': {str(error).splitlines()[0]}") from None
    check_type("", config, Config)
    assert isinstance(config, Config)
    for group in ("reward_models", "evaluators"):
        found = {name: typed_source(f"{group}.{name}", v) for name, v in getattr(config, group).items()}
        setattr(config, group, found)
    check(config, serving)
    return config


def _misfit(values: DictConfig) -> str:
    """The first key that is none of a `Config` by itself: OmegaConf does not name one that is a list for a group."""
    for key in map(str, values):
        try:
            OmegaConf.merge(OmegaConf.structured(Config), OmegaConf.masked_copy(values, key))
        except (OmegaConfBaseException, OverflowError):
            return key
    return "?"


def check(config: Config, serving: bool = False) -> None:
    """Refuses impossible values and combinations; each message names the key."""
    _check_names(config)
    check_ranges(config)
    _check_numbers(config)
    _check_inputs(config, serving)


def _refuse(condition: bool, message: str) -> None:
    if condition:
        raise ValueError(message)


def _all_sources(config: Config) -> list[tuple[str, Source]]:
    groups = {"reward_models": config.reward_models, "evaluators": config.evaluators}
    return [(f"{group}.{name}", s) for group, sources in groups.items() for name, s in sources.items()]


def _check_names(config: Config) -> None:
    _refuse(not config.stages, f"stages is empty: give some of {', '.join(STAGES)}")
    for stage in config.stages:
        _refuse(stage not in STAGES, f"stages: '{stage}' is not one of {', '.join(STAGES)}")
    choices = {
        "baseline.estimator": (config.baseline.estimator, ("empirical", "gaussian")),
        "dtype": (config.dtype, DTYPES),
        "deepspeed.dtype": (config.deepspeed.dtype, DTYPES),
        "rollout.dtype": (config.rollout.dtype, DTYPES),
        "deepspeed.zero_stage": (config.deepspeed.zero_stage, (0, 1, 2, 3)),
        "logging.live": (config.logging.live, ("auto", "plain", "off")),
        "data.judge": (config.data.judge, (None, "microcosm")),
        "baseline.unseen": (config.baseline.unseen, ("sample", "refuse")),
        "algorithm.scale": (config.algorithm.scale, ("none", "group", "batch")),
        "algorithm.aggregate": (
            config.algorithm.aggregate,
            ("response_sum", "token_mean", "response_mean", "length_limit"),
        ),
        "serve.unseen": (config.serve.unseen, ("sample", "refuse")),
        "evaluate.policy": (config.evaluate.policy, ("best", "last")),
        "algorithm.kl": (config.algorithm.kl, ("reward", "loss")),
        "algorithm.kl_estimator": (config.algorithm.kl_estimator, ("k1", "k2", "k3")),
    }
    for key, (value, allowed) in choices.items():
        _refuse(value not in allowed, f"{key}={value} is not one of {', '.join(map(str, allowed))}")
    for key, source in _all_sources(config):
        source.check(key)
        _refuse(
            key.startswith("evaluators.") and (source.calibration or source.temperature) is not None,
            f"{key}.calibration and .temperature have no effect: an evaluator's rewards are compared with r_ref alone",
        )
        for head, own in source.names("").items():
            if own is not source:
                check_type(f"{key}.heads.{head}", own, type(own))
                check_numbers(f"{key}.heads.{head}.", own)
    for group in ("reward_models", "evaluators"):
        given: dict[str, str] = {}
        for source, settings in getattr(config, group).items():
            for name in settings.names(source):
                key = f"{group}.{source}" + (f".heads.{name}" if name != source else "")
                _refuse(not name.isidentifier(), f"{key}: a reward's name must be letters, digits and _")
                _refuse(name == "joint", f"{key}: 'joint' is taken; give the reward another name")
                _refuse(name in given, f"{key} and {given.get(name)} give rewards of one name; rename one")
                given[name] = key


def _check_numbers(config: Config) -> None:
    align, resources = config.align, config.resources
    _check_algorithm(config)
    _check_baseline(config)
    _check_evaluate(config)
    _refuse(
        align.prompts_per_step % config.rollout.prompts_per_item != 0,
        f"align.prompts_per_step={align.prompts_per_step} must be a multiple of "
        f"rollout.prompts_per_item={config.rollout.prompts_per_item}",
    )
    _refuse(
        (config.plan.response_tokens or 0) > config.rollout.max_new_tokens,
        f"plan.response_tokens={config.plan.response_tokens} is more than "
        f"rollout.max_new_tokens={config.rollout.max_new_tokens}",
    )
    _refuse(config.data.tolerated_share == 1, "data.tolerated_share=1 would leave no row: it must be below 1")
    for key in ("kl_coef", "learning_rate"):
        _check_schedule(f"align.{key}", getattr(align, key))
    _refuse(
        config.deepspeed.offload_optimizer and config.deepspeed.zero_stage == 0,
        "deepspeed.offload_optimizer=true needs a ZeRO stage of 1 to 3 (deepspeed=zero1): without ZeRO nothing of the "
        "optimiser is offloaded",
    )
    policy, shape = config.policy, config.policy.architecture
    if policy.path is None and policy.init_from is None:
        _refuse(
            shape.hidden_size % (2 * shape.heads) != 0,
            f"policy.architecture.hidden_size={shape.hidden_size} must be an even multiple of "
            f"policy.architecture.heads={shape.heads}",
        )
        _refuse(
            shape.max_positions <= config.rollout.max_new_tokens,
            f"policy.architecture.max_positions={shape.max_positions} leaves no room for a prompt beside "
            f"rollout.max_new_tokens={config.rollout.max_new_tokens}",
        )
    _check_gpus(config)
    _refuse(
        resources.max_reward_replicas is not None and resources.max_reward_replicas < resources.reward.count,
        f"resources.max_reward_replicas={resources.max_reward_replicas} is below "
        f"resources.reward.count={resources.reward.count}",
    )


def _check_gpus(config: Config) -> None:
    for name in ("learner", "reward"):
        gpus = getattr(config.resources, name).gpus
        _refuse(
            gpus > 1,
            f"resources.{name}.gpus={gpus:g}: each of its processes computes on one GPU; raise "
            f"resources.{name}.count instead",
        )
    learner = config.resources.learner
    _refuse(
        learner.count > 1 and 0 < learner.gpus <= 0.5,
        f"resources.learner.gpus={learner.gpus:g} may put two of the {learner.count} ranks on one GPU, which NCCL "
        "refuses; set it above 0.5, or resources.learner.count=1",
    )


def _check_algorithm(config: Config) -> None:
    align, algorithm, critic = config.align, config.algorithm, config.algorithm.critic
    grouped = algorithm.advantage in ("leave_one_out", "group_mean", "gdpo") or algorithm.scale == "group"
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
    _refuse(
        algorithm.kl == "loss" and algorithm.kl_estimator == "k1",
        "algorithm.kl_estimator=k1 has no effect with algorithm.kl=loss (the expectation of its gradient is 0); "
        "use k2 or k3, or algorithm.kl=reward",
    )
    _refuse(
        algorithm.kl_target is not None and align.kl_coef == 0,
        "algorithm.kl_target needs an align.kl_coef above 0 to start from",
    )
    if algorithm.advantage == "gdpo":
        _check_gdpo(config)
    gae = algorithm.advantage == "gae"
    _refuse(gae and critic is None, "algorithm.advantage=gae needs algorithm.critic, as in algorithm=ppo")
    _refuse(
        not gae and critic is not None,
        f"algorithm.critic is for algorithm.advantage=gae, not {algorithm.advantage}; set it to null",
    )
    if critic is not None:
        _check_schedule("algorithm.critic.learning_rate", critic.learning_rate)


def _check_gdpo(config: Config) -> None:
    algorithm, combine = config.algorithm, config.utility.combine
    _refuse(
        combine != "weighted_sum",
        f"utility.combine={combine}: algorithm.advantage=gdpo normalises each reward model's utility and adds them by "
        "their weights; set utility.combine=weighted_sum, as in utility=linear",
    )
    _refuse(
        algorithm.kl != "loss",
        f"algorithm.kl={algorithm.kl}: with algorithm.advantage=gdpo rewards are normalised apart, and a KL penalty "
        "among them would be lost; set algorithm.kl=loss, with algorithm.kl_estimator=k2 or k3",
    )
    _refuse(
        algorithm.scale != "none",
        f"algorithm.scale={algorithm.scale}: algorithm.advantage=gdpo divides by the batch's deviation itself; set "
        "algorithm.scale=none",
    )


def _check_baseline(config: Config) -> None:
    baseline = config.baseline
    if baseline.tolerance is not None:
        _refuse(
            baseline.max_samples < baseline.samples,
            f"baseline.max_samples={baseline.max_samples} is below baseline.samples={baseline.samples}",
        )
        _refuse(
            baseline.max_samples % baseline.samples != 0,
            f"baseline.max_samples={baseline.max_samples} must be a multiple of baseline.samples={baseline.samples}, "
            "the responses of each round",
        )
    _refuse(
        baseline.unseen == "refuse" and baseline.known is None,
        "baseline.unseen=refuse needs baseline.known, the statistics that have all prompts",
    )


def _check_evaluate(config: Config) -> None:
    evaluate = config.evaluate
    for n in evaluate.best_of:
        _refuse(
            n > evaluate.samples,
            f"evaluate.best_of has {n}, which must be at most evaluate.samples={evaluate.samples}; "
            "set it to [] for none",
        )
    for key in ("max_kl", "patience"):
        value = getattr(evaluate, key)
        _refuse(
            value is not None and evaluate.every is None,
            f"evaluate.{key}={value} needs evaluate.every: without it the policy is evaluated at its end only",
        )
    _refuse(
        evaluate.max_kl is not None and evaluate.policy == "last",
        f"evaluate.max_kl={evaluate.max_kl} has no effect with evaluate.policy=last: it bounds which step is the best",
    )
    _refuse(
        evaluate.patience is not None and not config.evaluators,
        f"evaluate.patience={evaluate.patience} needs evaluators: align ends early when their win rate falls",
    )


def _check_schedule(key: str, schedule: Any) -> None:
    """Of its form; its values are in the table of ranges."""

    def number(value: Any) -> bool:
        return isinstance(value, int | float) and not isinstance(value, bool)

    if number(schedule):
        return
    pairs = isinstance(schedule, list) and all(
        isinstance(p, list) and len(p) == 2 and all(number(v) for v in p) for p in schedule
    )
    _refuse(not pairs or not schedule, f"{key} must be a number or [[step, value], ...], not {schedule}")
    steps = [p[0] for p in schedule]
    ordered = steps[0] == 0 and all(a < b for a, b in itertools.pairwise(steps))
    _refuse(not ordered, f"{key}: the steps of a schedule begin at 0 and rise, not {steps}")


def _check_sources(config: Config) -> None:
    data = config.data
    given = {f"data.{key}": getattr(data, key) for key in ("prompts", "eval_prompts", "demonstrations")}
    for key, source in _all_sources(config):
        given |= {f"{key}.{name}": getattr(source, name) for name in source.data_keys}
        for head, own in source.names("").items():
            given[f"{key}.heads.{head}.calibration" if head else f"{key}.calibration"] = own.calibration
    for key, value in given.items():
        parts = value if isinstance(value, list) else [value]
        _refuse(
            value is not None
            and not (parts and all(isinstance(part, str) and part.strip() for part in parts)),
            f"{key}={value!r} must be a file, a folder, a hub name or a pattern, or a list of these",
        )


def _check_inputs(config: Config, serving: bool) -> None:
    data, policy, models = config.data, config.policy, config.reward_models
    _refuse(not models, "reward_models is empty: give at least one")
    _check_sources(config)
    if data.microcosm is None:
        alone = serving and data.prompts is None
        if alone:
            check_alone(config)
        _refuse(
            data.prompts is None and not serving,
            "data.prompts is missing: give a JSONL, CSV or Parquet file, or a hub name",
        )
        _refuse(
            data.judge is not None, f"data.judge={data.judge} needs the microcosm's prompts (data=microcosm)"
        )
        _refuse(
            not alone and policy.path is None and (data.demonstrations is None or policy.init_from is None),
            "give policy.path (a finished policy), or policy.init_from and data.demonstrations (to train one)",
        )
        for name, model in models.items():
            _refuse(
                model.trains() and model.preferences is None,
                f"give reward_models.{name}.path (a finished model) or reward_models.{name}.preferences",
            )
    else:
        _refuse(
            data.prompts is not None, "data.prompts needs data=files: data=microcosm brings its own prompts"
        )
        for name, model in models.items():
            _refuse(
                model.trains() and model.preferences is None and name not in ("helpful", "harmless"),
                f"give reward_models.{name}.path or .preferences: the microcosm has pairs for helpful and harmless",
            )
    rewards = rewards_of(models)
    for name in rewards_of(config.evaluators):
        _refuse(
            name not in rewards,
            f"evaluators.{name} judges what reward_models.{name} rewards, which is not there",
        )
    check_utility(
        config.utility.transform,
        config.utility.combine,
        config.utility.parameters,
        {name: own.weight for name, own in rewards.items()},
        {name: str(own.scale) for name, own in rewards.items()},
    )
