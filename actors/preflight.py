"""What is checked before Ray starts, so that a mistake costs seconds."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from actors.resources import check_machine
from rlhf.config import Config, RewardModelConfig
from rlhf.data.prepare import RunData, check_lengths, prepare
from rlhf.models.source import trust_remote_code
from rlhf.store import Store

log = logging.getLogger(__name__)


def preflight(config: Config, store: Store) -> RunData:
    """Loads and checks the data, the given models' configurations and tokenizers, and the machine.

    Raises:
        ValueError: names the key, file, row or model, and what to do.
    """
    check_machine(config)
    trust_remote_code(config.trust_remote_code)
    if config.trust_remote_code:
        log.warning("trust_remote_code=true: code that comes with the given models and tokenizers is run")
    data = prepare(config, store)
    _check_names(config, data)
    _check_policy(config, data)
    _check_reward_models(config, data)
    return data


def _check_names(config: Config, data: RunData) -> None:
    from rlhf.learn.advantages import ADVANTAGES

    name = config.algorithm.advantage
    if name not in ADVANTAGES:
        raise ValueError(f"algorithm.advantage={name} is not one of {', '.join(sorted(ADVANTAGES))}")
    for model in config.reward_models.values():
        if model.reference == "column":
            data.column(model.column)
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


def _check_reward_models(config: Config, data: RunData) -> None:
    from rlhf.data.preferences import load_preferences
    from rlhf.models.load import reward_config, start_config

    policy = config.policy
    base, base_key = (policy.path, "policy.path") if policy.path else (policy.init_from, "policy.init_from")
    groups = {"reward_models": config.reward_models, "evaluators": config.evaluators}
    for group, name, model in [(g, n, m) for g, models in groups.items() for n, m in models.items()]:
        path, key = (model.path, "path") if model.path else (model.init_from, "init_from")
        if path is not None:
            key = f"{group}.{name}.{key}"
            found = (reward_config if model.path is not None else start_config)(path, key)
            _tell(path, key)
            _check_conversations(name, model, path, key, found, data)
        elif base is not None:
            start_config(base, base_key)
        if model.path is None and model.preferences is not None:
            load_preferences(model.preferences, config.data.tolerated_share)


def _check_conversations(
    name: str, model: RewardModelConfig, path: str, key: str, found: Any, data: RunData
) -> None:
    """Every prompt must leave the model room for a response, of one word at least."""
    from rlhf.data.chat import ChatFormat
    from rlhf.data.rows import at
    from rlhf.models.load import load_tokenizer
    from rlhf.models.reach import max_positions

    chat = ChatFormat(load_tokenizer(path, key), f"reward model '{name}'", model.chat_template)
    limit, prompts = max_positions(found), [*data.prompts, *data.eval_prompts]
    for prompt in prompts:
        with at(prompt.source):
            tokens = len(chat.conversation_tokens(prompt.content, "A"))
        if limit is not None and tokens > limit:
            raise ValueError(
                f"{prompt.source}: the prompt and a response of one word are {tokens} tokens, but the reward model "
                f"{key}={path} takes {limit}; shorten or remove the row, or give another model"
            )
    chat.check_table(found, [p.content for p in prompts])


def _tell(path: str, key: str) -> None:
    from rlhf.models.source import find_source

    source = find_source(path, key)
    if source.adapter is not None:
        log.warning("%s=%s is an adapter: it is merged into %s", key, path, source.model)
