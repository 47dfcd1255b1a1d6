"""What is checked before Ray starts, so that a mistake costs seconds."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from actors.resources import check_machine
from actors.stages.stage import Stages
from rlhf.config import Config
from rlhf.data.prepare import RunData, check_lengths, prepare
from rlhf.generate.engines import engine_class
from rlhf.loggers.loggers import check_loggers
from rlhf.models.source import trust_remote_code
from rlhf.publish.hub import check_hub
from rlhf.sources.source import rewards_of
from rlhf.store import Store

log = logging.getLogger(__name__)


def preflight(config: Config, store: Store, serving: bool = False, here: bool = True) -> RunData:
    """Loads and checks the data, the given models' configurations and tokenizers, and the machine.

    Args:
        here: it is to run, from this machine. Otherwise the machine is not looked at: a run may be planned elsewhere.

    Raises:
        ValueError: names the key, file, row or model, and what to do.
    """
    if here:
        check_machine(config)
    trust_remote_code(config.trust_remote_code)
    if config.trust_remote_code:
        log.warning("trust_remote_code=true: code that comes with the given models and tokenizers is run")
    data = prepare(config, store)
    _check_names(config, data)
    engine_class(config.rollout).check(config.rollout, config.resources.generators.gpus)
    _check_policy(config, data)
    _check_sources(config, data, serving)
    return data


def check_outlets(stages: Stages, say: Callable[[str], None]) -> None:
    """The loggers, and the hub that the policy is pushed to.

    Raises:
        ValueError: names the key and says what to do.
    """
    from actors.stages.align import Align

    config = stages.config
    if {"align", "report"} & {*config.stages}:
        check_loggers(config.logging, stages.store.root.parent, stages.of(Align).begun, say)
    if config.hub.repo is not None:
        check_hub(config.hub, config.stages)


def _check_names(config: Config, data: RunData) -> None:
    from rlhf.learn.advantages import ADVANTAGES

    name = config.algorithm.advantage
    if name not in ADVANTAGES:
        raise ValueError(f"algorithm.advantage={name} is not one of {', '.join(sorted(ADVANTAGES))}")
    for reward, own in rewards_of(config.reward_models).items():
        if own.reference == "column":
            data.column(own.column)
        if own.temperature is not None and not config.utility.calibrated:
            log.warning(
                "reward_models.%s.temperature has no effect: utility.calibrated=false leaves rewards as they are",
                reward,
            )
    known = config.baseline.known
    if known is not None and not Path(known).is_file():
        raise ValueError(f"baseline.known={known} is not a file; give the statistics.npz of an earlier run")


def _check_policy(config: Config, data: RunData) -> None:
    from rlhf.data.chat import ChatFormat
    from rlhf.data.demonstrations import load_demonstrations
    from rlhf.data.rows import at
    from rlhf.models.families import fault_of_policy
    from rlhf.models.load import load_tokenizer, policy_config, start_config
    from rlhf.models.reach import Reach

    policy, critic = config.policy, config.algorithm.critic
    if policy.path is None and config.data.demonstrations is not None:
        load_demonstrations(config.data.demonstrations)
    path, key = (policy.path, "policy.path") if policy.path else (policy.init_from, "policy.init_from")
    if critic is not None and critic.init_from is not None:
        found = start_config(critic.init_from, "algorithm.critic.init_from")
        if (fault := fault_of_policy(found)) is not None:
            raise ValueError(f"algorithm.critic.init_from={critic.init_from} cannot be a critic: {fault}")
        _tell(critic.init_from, "algorithm.critic.init_from")
    if path is None:
        return
    found = policy_config(path, key)
    reach = Reach.of(found)
    _tell(path, key)
    if critic is not None and critic.init_from is None:
        start_config(path, key)
    chat = ChatFormat(load_tokenizer(path, key), "policy", policy.chat_template)
    prompts = [*data.prompts, *data.eval_prompts]
    lengths = []
    for prompt in prompts:
        with at(prompt.source):
            lengths.append(len(chat.prompt_tokens(prompt.content)))
    check_lengths(prompts, lengths, config.rollout.max_new_tokens, reach)
    chat.check_table(found, [p.content for p in prompts], answers=policy.path is None)


def _check_sources(config: Config, data: RunData, serving: bool) -> None:
    from rlhf.data.preferences import load_preferences
    from rlhf.models.load import start_config

    policy = config.policy
    base, base_key = (policy.path, "policy.path") if policy.path else (policy.init_from, "policy.init_from")
    prompts = [*data.prompts, *data.eval_prompts]
    groups = {"reward_models": config.reward_models, "evaluators": config.evaluators}
    for key, source in [(f"{g}.{n}", s) for g, sources in groups.items() for n, s in sources.items()]:
        source.preflight(key, prompts)
        own = source.own
        for name in ("path", "init_from"):
            if source.uses_device and own.get(name) is not None:
                _tell(own[name], f"{key}.{name}")
        if source.trains() and own["init_from"] is None and base is not None:
            start_config(base, base_key)
        if source.trains() and own["preferences"] is not None:
            load_preferences(own["preferences"], config.data.tolerated_share)
        if serving:
            source.check_texts(key, pairs=False)
        for reward in source.names(key.rsplit(".", 1)[1]).values():
            if reward.reference == "canned":
                source.check_texts(key, pairs=False)
            if reward.calibration is not None:
                source.check_texts(key, pairs=True)
                load_preferences(reward.calibration, config.data.tolerated_share)


def _tell(path: str, key: str) -> None:
    from rlhf.models.source import find_source

    source = find_source(path, key)
    if source.adapter is not None:
        log.warning("%s=%s is an adapter: it is merged into %s", key, path, source.model)
