"""What a learner is asked to fit: the model to start from and the objective (`align_task.py`: to align)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from rlhf.config import ArchitectureConfig
from rlhf.learn.logprobs import PolicyModel
from rlhf.learn.objectives import BradleyTerry, Objective, Supervised
from rlhf.models.classifier import Classifier
from rlhf.models.load import load_policy, load_tokenizer, new_policy, new_reward_model


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
