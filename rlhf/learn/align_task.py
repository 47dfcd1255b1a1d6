"""What a learner is asked to align: the policy, what it is compared with, and its critic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from rlhf.config import AlgorithmConfig, LoraConfig
from rlhf.learn.alignment import Aligner, ReferencePolicy
from rlhf.learn.batching import Layout
from rlhf.learn.critic import ValueModel
from rlhf.learn.logprobs import PolicyModel
from rlhf.learn.trainer import Trainer
from rlhf.models.classifier import Classifier
from rlhf.models.load import load_policy, load_tokenizer, new_reward_model
from rlhf.models.lora import adapter_off, with_adapter
from rlhf.models.packed import pack
from rlhf.models.precision import cast, dtype_of


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
