"""What a learner is asked to train: the model to start from and the objective."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from rlhf.config import AlgorithmConfig, ArchitectureConfig, LoraConfig
from rlhf.learn.alignment import Aligner, ReferencePolicy
from rlhf.learn.batching import Layout
from rlhf.learn.critic import ValueModel
from rlhf.learn.logprobs import PolicyModel
from rlhf.learn.objectives import BradleyTerry, Objective, Supervised
from rlhf.learn.trainer import Trainer
from rlhf.models.classifier import Classifier
from rlhf.models.load import load_policy, load_tokenizer, new_policy, new_reward_model
from rlhf.models.lora import adapter_off, with_adapter
from rlhf.models.packed import pack
from rlhf.models.precision import cast, dtype_of


class Task(Protocol):
    def build(self, device: str) -> tuple[PolicyModel | Classifier, Objective]:
        """The model to train, on `device`, and its objective."""


@dataclass(frozen=True)
class SupervisedTask:
    init_from: str | None  # null: `architecture`, with random weights
    architecture: ArchitectureConfig
    tokenizer: str  # folder
    seed: int

    def build(self, device: str) -> tuple[PolicyModel | Classifier, Objective]:
        tokenizer = load_tokenizer(self.tokenizer, "policy.init_from")
        if self.init_from is None:
            model = new_policy(self.architecture, tokenizer, self.seed)
        else:
            model = load_policy(self.init_from, "policy.init_from")
        policy = PolicyModel(model.to(device))
        return policy, Supervised(policy.lay)


@dataclass(frozen=True)
class BradleyTerryTask:
    key: str  # of the reward model in the configuration
    init_from: str
    seed: int

    def build(self, device: str) -> tuple[PolicyModel | Classifier, Objective]:
        key = f"{self.key}.init_from"
        pad_token = load_tokenizer(self.init_from, key).pad_token_id
        model = new_reward_model(self.init_from, key, self.seed, pad_token).to(device)
        classifier = Classifier(model)
        if not (classifier.apart or classifier.pads):
            raise ValueError(
                f"{key}={self.init_from}: {type(model).__name__} takes one conversation at a time, so it cannot be "
                "trained here; give another model, or a trained one by path"
            )
        return classifier, BradleyTerry(classifier)


@dataclass(frozen=True)
class AlignTask:
    policy: str
    settings: AlgorithmConfig
    lora: LoraConfig | None
    penalise: bool  # whether the KL coefficient is ever above 0: else there is no reference
    max_new_tokens: int
    dtype: str  # of the reference policy
    seed: int

    def start(self, device: str, trainer: Callable[[torch.nn.Module], Trainer]) -> Aligner:
        """The policy, what it is compared with and its critic, ready; `trainer` puts an engine around a model."""
        model: Any = load_policy(self.policy).to(device)
        if self.lora is not None:
            model = with_adapter(model, self.lora, self.seed)
        policy = PolicyModel(model)
        lay, notes = policy.lay, list(policy.notes)
        reference = None
        if self.penalise and self.lora is not None:
            reference = ReferencePolicy(None, lambda: adapter_off(model))
        elif self.penalise:
            frozen = PolicyModel(load_policy(self.policy).to(device).requires_grad_(False))
            cast(frozen, dtype_of(self.dtype, device))
            pack(frozen, rows=1024)
            reference = ReferencePolicy(frozen)
        critic = None
        if self.settings.critic is not None:
            start = self.settings.critic.init_from or self.policy
            key = "algorithm.critic.init_from"
            pad = load_tokenizer(start, key).pad_token_id
            value = ValueModel(new_reward_model(start, key, self.seed, pad).to(device))
            tried = Classifier(value.inner)
            if not tried.apart:
                raise ValueError(
                    f"{key}={start}: {type(value.inner).__name__} has no head that reads one token, so it cannot "
                    "tell the value of each; give a causal model"
                )
            lay = lay.both(Layout(tried.packs, tried.reach))
            notes += [f"critic: {note}" for note in tried.notes]
            critic = trainer(value)
        return Aligner(trainer(policy), reference, critic, self.settings, self.max_new_tokens, lay, notes)


def batch_indices(examples: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Which examples a step trains on: an endless shuffle without replacement within an epoch. int64 [batch_size]

    >>> sorted(np.concatenate([batch_indices(6, 2, step, seed=1) for step in range(3)]).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    places = np.arange(step * batch_size, (step + 1) * batch_size)
    epochs = {
        e: np.random.default_rng([seed, e]).permutation(examples) for e in set((places // examples).tolist())
    }
    return np.array([epochs[int(p // examples)][p % examples] for p in places])


def save_tokenizer(source: str, target: Path) -> None:
    load_tokenizer(source, "policy.init_from").save_pretrained(target)
