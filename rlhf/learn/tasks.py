"""What a learner is asked to train: the model to start from and the objective."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.config import ArchitectureConfig
from rlhf.learn.batching import takes_packing
from rlhf.learn.objectives import BradleyTerry, Objective, PolicyGradient, Supervised
from rlhf.models.load import load_policy, load_tokenizer, new_policy, new_reward_model
from rlhf.models.reward import Classifier


class Task(Protocol):
    def build(self, device: str) -> tuple[torch.nn.Module, Objective]:
        """The model to train, on `device`, and its objective."""


@dataclass(frozen=True)
class SupervisedTask:
    init_from: str | None  # null: `architecture`, with random weights
    architecture: ArchitectureConfig
    tokenizer: str  # folder
    seed: int

    def build(self, device: str) -> tuple[torch.nn.Module, Objective]:
        tokenizer = load_tokenizer(self.tokenizer, "policy.init_from")
        if self.init_from is None:
            model = new_policy(self.architecture, tokenizer, self.seed)
        else:
            model = load_policy(self.init_from, "policy.init_from")
        return model.to(device), Supervised(packs(model.to(device)))


@dataclass(frozen=True)
class BradleyTerryTask:
    name: str
    init_from: str
    seed: int

    def build(self, device: str) -> tuple[torch.nn.Module, Objective]:
        key = f"reward_models.{self.name}.init_from"
        pad_token = load_tokenizer(self.init_from, key).pad_token_id
        model = new_reward_model(self.init_from, key, self.seed, pad_token).to(device)
        classifier = Classifier(model, model.config.pad_token_id)
        return classifier, BradleyTerry(classifier)


@dataclass(frozen=True)
class AlignTask:
    policy: str
    advantage: str
    importance_cap: float
    penalise: bool  # whether the KL coefficient is ever above 0: else no reference is loaded

    def build(self, device: str) -> tuple[torch.nn.Module, Objective]:
        model = load_policy(self.policy).to(device)
        reference = load_policy(self.policy).to(device).requires_grad_(False) if self.penalise else None
        return model, PolicyGradient(reference, self.advantage, self.importance_cap, packs(model))


def packs(model: PreTrainedModel) -> bool:
    return takes_packing(model, model.config.get_text_config().vocab_size)


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
