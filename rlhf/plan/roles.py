"""What the roles of a configuration need, from the configurations of its models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rlhf.config import Config
from rlhf.data.chat import ChatFormat
from rlhf.data.prepare import RunData
from rlhf.models.load import load_tokenizer, new_config, policy_config, reward_config, start_config
from rlhf.models.precision import dtype_of
from rlhf.models.source import find_source
from rlhf.plan.memory import Need, generator, learner, object_store, reward_model, services
from rlhf.plan.models import Outline
from rlhf.plan.work import Work
from rlhf.store import Store

NEW = "made here"


@dataclass(frozen=True)
class Model:
    """Where a model comes from."""

    config: Any  # transformers'
    path: str
    mapped: bool  # whether its file has float32 weights, which are used where they lie


@dataclass(frozen=True)
class Plan:
    work: Work
    needs: list[Need]
    store: int  # bytes, of the object store
    parameters: dict[str, int]  # of each model
    trained: int  # of the policy
    notes: list[str]

    @property
    def own(self) -> int:
        """Bytes of all processes."""
        return sum(need.total * need.count for need in self.needs)

    @property
    def files(self) -> int:
        """Bytes of the distinct files that are computed with where they lie."""
        every = {path: size for need in self.needs for path, size in need.files.items()}
        return sum(every.values())

    @property
    def total(self) -> int:
        return self.own + self.store + self.files


def plan(config: Config, data: RunData, store: Store) -> Plan:
    """
    Raises:
        ValueError: a model cannot be planned; it names its key.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    policy, chat = _policy(config, data, store)
    work = _work(config, data, chat)
    settings, resources, notes = config.deepspeed, config.resources, _notes(config)
    trained = Outline(policy.config, AutoModelForCausalLM, _dtype(settings.dtype), config.policy.lora)
    penalise = config.align.kl_coef != 0 or config.evaluate.every is not None
    critic = _critic(config, policy, trained.dtype)
    needs = [learner(trained, policy.path, policy.mapped, work, settings, penalise, critic)]
    if config.rollout.engine == "embedded":
        sampled = Outline(policy.config, AutoModelForCausalLM, _dtype(config.rollout.dtype))
        needs.append(generator(sampled, policy.path, policy.mapped, work, resources.generators.count))
    parameters = {"policy": trained.sizes.every}
    replicas = resources.max_reward_replicas or resources.reward.count
    for group in ("reward_models", "evaluators"):
        for name, source in getattr(config, group).items():
            if not source.uses_device:
                continue
            model = _classifier(config, f"{group}.{name}", source, policy)
            outline = Outline(model.config, AutoModelForSequenceClassification, _dtype(config.dtype))
            budget = 2 * settings.micro_batch_tokens
            parameters[f"{group}.{name}"] = outline.sizes.every
            needs.append(
                reward_model(f"{group}.{name}", outline, model.path, model.mapped, work, budget, replicas)
            )
    return Plan(work, [*needs, *services()], object_store(trained), parameters, trained.trained, notes)


def _dtype(name: str) -> torch.dtype:
    return dtype_of(name, "cpu")


def _policy(config: Config, data: RunData, store: Store) -> tuple[Model, ChatFormat]:
    policy = config.policy
    path = policy.path or policy.init_from
    if path is not None:
        key = "policy.path" if policy.path else "policy.init_from"
        model = _given(policy_config(path, key), path, key)
        return model, ChatFormat(load_tokenizer(path, key), "policy", policy.chat_template)
    from rlhf.learn.tokenise import tokenizer_folder

    tokenizer = load_tokenizer(str(tokenizer_folder(config, data, store)), "policy.init_from")
    float32 = _dtype(config.deepspeed.dtype) == torch.float32
    model = Model(new_config(policy.architecture, tokenizer), f"policy, {NEW}", float32)
    return model, ChatFormat(tokenizer, "policy", policy.chat_template)


def _given(config: Any, path: str, key: str) -> Model:
    stored = getattr(config, "dtype", None) or torch.float32
    plain = find_source(path, key).adapter is None  # an adapter is merged, into memory of its own
    return Model(config, str(Path(path).expanduser()), plain and stored == torch.float32)


def _critic(config: Config, policy: Model, dtype: torch.dtype) -> Outline | None:
    from transformers import AutoModelForSequenceClassification

    critic = config.algorithm.critic
    if critic is None:
        return None
    own = policy.config
    if critic.init_from is not None:
        own = start_config(critic.init_from, "algorithm.critic.init_from")
    return Outline(_with_a_label(own), AutoModelForSequenceClassification, dtype)


def _with_a_label(config: Any) -> Any:
    return type(config).from_dict({**config.to_dict(), "num_labels": 1})


def _classifier(config: Config, key: str, source: Any, policy: Model) -> Model:
    if source.path is not None:
        return _given(reward_config(source.path, f"{key}.path", single=not source.heads), source.path, key)
    own = policy.config
    if source.init_from is not None:
        own = start_config(source.init_from, f"{key}.init_from")
    float32 = _dtype(config.deepspeed.dtype) == torch.float32
    return Model(_with_a_label(own), f"{key}, {NEW}", float32)


def _work(config: Config, data: RunData, chat: ChatFormat) -> Work:
    align, c = config.align, config
    samples = [align.samples_per_prompt]
    if "baseline" in c.stages:
        samples.append(c.baseline.samples)
    if "evaluate" in c.stages:
        samples += [c.evaluate.samples, c.evaluate.judge_samples]
    return Work(
        tuple(len(chat.prompt_tokens(prompt.content)) for prompt in data.prompts),
        c.plan.response_tokens or c.rollout.max_new_tokens,
        align.prompts_per_step,
        align.samples_per_prompt,
        c.rollout.prompts_per_item,
        max(samples),
        c.resources.learner.count,
        c.deepspeed.micro_batch_tokens,
        c.rollout.slots,
        align.staleness,
    )


def _notes(config: Config) -> list[str]:
    """What is left out."""
    notes, r = [], config.resources
    if config.rollout.engine != "embedded":
        notes.append(
            f"rollout.engine={config.rollout.engine}: generators are not planned, their engine sets their memory"
        )
    for name in ("learner", "generators", "reward"):
        if getattr(r, name).gpus:
            notes.append(f"resources.{name}.gpus: planned as on a CPU, which no GPU was compared with")
    return notes
