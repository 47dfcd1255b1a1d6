"""What is checked before Ray starts, so that a mistake costs seconds."""

from __future__ import annotations

from pathlib import Path

from actors.resources import check_machine
from rlhf.config import Config
from rlhf.data.prepare import RunData, check_lengths, prepare
from rlhf.store import Store


def preflight(config: Config, store: Store) -> RunData:
    """Loads and checks the data, the given models' configurations and tokenizers, and the machine.

    Raises:
        ValueError: names the key, file, row or model, and what to do.
    """
    check_machine(config)
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
    from rlhf.models.load import load_config, load_tokenizer
    from rlhf.models.reach import Reach

    policy = config.policy
    if policy.path is None and config.data.demonstrations is not None:
        load_demonstrations(config.data.demonstrations)
    path, key = (policy.path, "policy.path") if policy.path else (policy.init_from, "policy.init_from")
    if path is None:
        return
    found = load_config(path, key)
    reach = Reach.of(found)
    chat = ChatFormat(load_tokenizer(path, key), "policy", policy.chat_template)
    prompts = [*data.prompts, *data.eval_prompts]
    lengths = []
    for prompt in prompts:
        with at(prompt.source):
            lengths.append(len(chat.prompt_tokens(prompt.content)))
    check_lengths(prompts, lengths, config.rollout.max_new_tokens, reach)
    chat.check_table(found, [p.content for p in prompts])


def _check_reward_models(config: Config, data: RunData) -> None:
    from rlhf.data.chat import ChatFormat
    from rlhf.data.preferences import load_preferences
    from rlhf.models.load import check_reward_config, load_config, load_tokenizer

    groups = {"reward_models": config.reward_models, "evaluators": config.evaluators}
    for group, name, model in [(g, n, m) for g, models in groups.items() for n, m in models.items()]:
        path, key = (model.path, "path") if model.path else (model.init_from, "init_from")
        if path is not None:
            key = f"{group}.{name}.{key}"
            found = load_config(path, key)
            if model.path is not None:
                check_reward_config(found, key)
            chat = ChatFormat(load_tokenizer(path, key), f"reward model '{name}'", model.chat_template)
            chat.conversation_tokens(data.prompts[0].content, "A response.")
            prompts = [*data.prompts, *data.eval_prompts]
            chat.check_table(found, [p.content for p in prompts])
        if model.path is None and model.preferences is not None:
            load_preferences(model.preferences, config.data.tolerated_share)
