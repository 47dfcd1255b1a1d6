"""What plain `transformers` gives: the truth that the sampler, the learner and reward models are held to."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.families.configurations import END, VOCABULARY
from rlhf.models.precision import cast
from rlhf.types import Rollouts

TOLERANCE = 1e-4
"""Nats between two ways of float32 that are the same."""


def build(config: Any, auto: Any = AutoModelForCausalLM, seed: int = 0) -> PreTrainedModel:
    """A model in float32 with random weights: biases and gains too, which are trivial in a new model."""
    torch.manual_seed(seed)
    model = auto.from_config(copy.deepcopy(config), dtype=torch.float32).eval().requires_grad_(False)
    random = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=random)
        if parameter.ndim >= 2:
            parameter.copy_(0.15 * noise)
        else:
            parameter.add_(0.1 * noise)
    return model


def as_bfloat16(model: PreTrainedModel) -> PreTrainedModel:
    copied = copy.deepcopy(model)
    cast(copied, torch.bfloat16)
    return copied


def logits(model: PreTrainedModel, tokens: Sequence[int] | np.ndarray) -> torch.Tensor:
    """Of the whole sequence in one pass, float32 [T, V]."""
    ids = torch.as_tensor(np.asarray(tokens, np.int64))[None]
    return model(input_ids=ids, use_cache=False).logits[0].float()


@torch.inference_mode()
def logprobs(model: PreTrainedModel, rollouts: Rollouts) -> np.ndarray:
    """Of the rollouts' response tokens, each sequence in a pass of its own, float32 [T]."""
    found = []
    for row, group in enumerate(rollouts.group):
        prompt, own = rollouts.prompt_tokens[group], rollouts.tokens[row]
        every = logits(model, np.concatenate([prompt, own]))[len(prompt) - 1 : -1]
        every = torch.log_softmax(every / rollouts.temperature, -1)
        found.append(every.gather(-1, torch.from_numpy(own.astype(np.int64))[:, None])[:, 0])
    return torch.cat(found).numpy()


@torch.inference_mode()
def unfit(model: PreTrainedModel, prompts: Sequence[Sequence[int]], new: int = 12) -> str | None:
    """Why `transformers` itself does not sample text from the model by its probabilities; None: it does.

    Logits must not depend on later tokens, and `generate` must find the logits of the whole pass.
    """
    whole = logits(model, prompts[-1])
    if whole.shape != (len(prompts[-1]), VOCABULARY):
        return f"its logits of {len(prompts[-1])} tokens are {list(whole.shape)}"
    half = len(prompts[-1]) // 2
    other = [*prompts[-1][:half], *reversed(prompts[-1][half:])]
    if _apart(logits(model, other)[:half], whole[:half]) > TOLERANCE:
        return "its logits depend on later tokens"
    for prompt in prompts:
        ids = torch.tensor([list(prompt)])
        found = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            eos_token_id=END,
        )
        expected = logits(model, found.sequences[0])[len(prompt) - 1 : -1]
        apart = _apart(torch.cat(found.logits).float(), expected)
        if apart > TOLERANCE:
            return f"its generate and its forward pass differ by {apart:.2g} nats ({len(prompt)} tokens and {new})"
    return None


def _apart(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((torch.log_softmax(found, -1) - torch.log_softmax(expected, -1)).abs().max())
