"""The configuration of `rlhf serve`: what it makes first, and what it may be without. Imports no torch."""

from __future__ import annotations

from dataclasses import replace

from rlhf.config import Config
from rlhf.sources.source import rewards_of
from rlhf.utility.kinds import TRANSFORM_KINDS


def to_serve(config: Config) -> Config:
    """The configuration of a server: with the stages that make what is not given, and without learners that do not
    train."""
    config = replace(config, evaluators={})
    stages, learner = _stages_to_serve(config), config.resources.learner
    trains = any(s.trains() for s in config.reward_models.values()) or (
        "sft" in stages and config.policy.path is None
    )
    if not trains:
        learner = replace(learner, cpus=0.0, gpus=0.0)
    return replace(config, stages=stages, resources=replace(config.resources, learner=learner))


def _stages_to_serve(config: Config) -> list[str]:
    """Models that are not given, and the references of prompts that are."""
    prompts = config.data.microcosm is not None or config.data.prompts is not None
    trained = any(source.trains() for source in config.reward_models.values())
    policy = prompts or any(s.trains() and s.own["init_from"] is None for s in config.reward_models.values())
    chosen = {"sft": policy, "reward_models": trained or prompts, "baseline": prompts}
    calibrated = any(own.calibration is not None for own in rewards_of(config.reward_models).values())
    chosen["reward_models"] |= calibrated
    return [stage for stage, wanted in chosen.items() if wanted]


def check_alone(config: Config) -> None:
    """Of a server without prompts of its own: what it may have to sample, and what it cannot know.

    Raises:
        ValueError: names the key.
    """
    transform = config.utility.transform
    kind = TRANSFORM_KINDS.get(transform)
    rules = [own.rule(0.5, "empirical") for own in rewards_of(config.reward_models).values()]
    sampled = any(rule.sampled for rule in rules) or (kind is not None and kind.needs_base)
    if sampled and config.serve.unseen == "sample" and config.policy.path is None:
        raise ValueError(
            "give policy.path: references of prompts that clients bring are made of its samples (or set "
            "serve.unseen=refuse, and other references)"
        )
    if transform == "zscore_global":
        raise ValueError(
            "utility.transform=zscore_global compares with all prompts of a data set: give data.prompts, or another "
            "transform"
        )
