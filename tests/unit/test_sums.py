"""Gradients in bfloat16 against those in float32 of the same weights, where thousands of tokens add up."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, GPT2Config, LlamaConfig

from rlhf.learn.batching import pad
from rlhf.learn.chunks import in_chunks
from rlhf.learn.logprobs import PolicyModel, token_logprobs
from rlhf.learn.sums import sum_in_float32
from rlhf.types import Ragged

SMALL = {"vocab_size": 12, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS = [
    LlamaConfig(**SMALL, intermediate_size=64),
    GPT2Config(vocab_size=12, n_embd=32, n_layer=1, n_head=2, n_positions=64),
    Gemma3TextConfig(**SMALL, intermediate_size=64, num_key_value_heads=1, head_dim=16, sliding_window=64),
]


@pytest.mark.parametrize("model_config", CONFIGS, ids=lambda c: c.model_type)
def test_gradients_in_bfloat16_are_those_of_float32(model_config):
    """Of each parameter: 128 rows of 33 tokens of a vocabulary of 12, and a head in 17 chunks."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config).eval().bfloat16()
    rng = np.random.default_rng(0)
    prompts = Ragged.of([[1]] * 128, np.int32)
    responses = Ragged.of([rng.integers(2, 12, size=32) for _ in range(128)], np.int32)
    (batch,) = pad(prompts, responses, np.arange(128), range(128), 10**6)
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        policy = PolicyModel(copy.deepcopy(model).to(dtype), chunk=256 * 12)
        sum_in_float32(policy)
        token_logprobs(policy, batch).sum().backward()
        found.append({n: p.grad.double() for n, p in policy.inner.named_parameters()})
    for name, truth in found[1].items():
        assert (found[0][name] - truth).norm() <= 0.06 * truth.norm(), name


def test_chunks_add_up_in_float32():
    """One chunk has a gradient of 1, 31 have one of 2^-9: bfloat16 would keep the 1."""
    weight = torch.zeros(8, dtype=torch.bfloat16, requires_grad=True)
    states = torch.full((32, 8), 2.0**-9, dtype=torch.bfloat16)
    states[0] = 1.0

    def part(states, targets):
        return (states * weight).sum(-1)[None]

    targets = torch.zeros(32, dtype=torch.long)
    in_chunks(part, states, targets, 1, [weight]).sum().backward()
    assert weight.grad.tolist() == [torch.tensor(1 + 31 / 512).bfloat16().item()] * 8
