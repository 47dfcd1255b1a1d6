"""What a learner is given to learn in the self-test, and the loss that it must begin with."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rlhf.config import ArchitectureConfig
from rlhf.data.chat import ChatFormat
from rlhf.learn.objectives import TokenPairs
from rlhf.learn.tasks import SupervisedTask
from rlhf.models.load import load_policy, load_tokenizer
from rlhf.selftest.models import PROMPTS
from rlhf.types import Ragged

STEPS = 3
LIMIT = 1e-4
"""Nats a token that the loss may be from the plain pass's."""


def task(policy: str, architecture: ArchitectureConfig) -> SupervisedTask:
    return SupervisedTask(policy, architecture, policy, seed=0)


def examples(policy: str) -> TokenPairs:
    """Each prompt, with another of them as its response."""
    chat = ChatFormat(load_tokenizer(policy, "policy.path"), "policy", None)
    pairs = list(zip(PROMPTS, (*PROMPTS[1:], PROMPTS[0]), strict=True))
    return TokenPairs(
        Ragged.of([chat.prompt_tokens(prompt) for prompt, _ in pairs], np.int32),
        Ragged.of([chat.response_tokens(prompt, response) for prompt, response in pairs], np.int32),
    )


@torch.no_grad()
def plain_loss(policy: str, data: TokenPairs) -> float:
    """transformers' own cross-entropy of the responses, mean over tokens, nats; each example by itself, on the CPU."""
    model: Any = load_policy(policy)
    total = 0.0
    for i in range(len(data)):
        prompt, own = data.prompts[i], data.responses[i]
        ids = torch.from_numpy(np.concatenate([prompt, own]).astype(np.int64))[None]
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
        total += float(torch.nn.functional.cross_entropy(logits, ids[0, len(prompt) :], reduction="sum"))
    return total / len(data.responses.values)
