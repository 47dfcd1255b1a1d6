"""The rows of a last layer that are asked for are those of the whole; the others are not computed."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, FalconConfig, GemmaConfig, GPT2Config, LlamaConfig

from rlhf.models.last_layer import LastLayer
from tests.unit.test_batching import SMALL

CONFIGS = [
    LlamaConfig(**SMALL),
    GemmaConfig(**SMALL),
    GPT2Config(vocab_size=30, n_positions=64, n_embd=32, n_layer=2, n_head=2),
    FalconConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, alibi=False),
]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: c.model_type)
def test_states_and_gradients_are_those_of_the_whole(config):
    torch.manual_seed(0)
    body = AutoModelForCausalLM.from_config(config).eval().base_model
    last = LastLayer(body)
    ids, rows = torch.randint(30, (1, 20)), torch.tensor([3, 7, 8, 19])
    results = []
    for needed in (None, rows):
        body.zero_grad()
        with last.only(needed), FlopCounterMode(display=False) as flops:
            states = body(input_ids=ids, use_cache=False).last_hidden_state[0, rows]
        (states**3).sum().backward()
        gradient = torch.cat([p.grad.flatten() for p in body.parameters() if p.grad is not None])
        results.append((states, gradient, flops.get_total_flops()))
    for whole, part in zip(results[0][:2], results[1][:2], strict=True):
        torch.testing.assert_close(part, whole, atol=1e-4, rtol=1e-4)
    assert results[1][2] < results[0][2]
    again = body(input_ids=ids, use_cache=False).last_hidden_state[0, rows]  # all rows again
    torch.testing.assert_close(again, results[0][0], atol=1e-5, rtol=1e-4)


class Mixing(torch.nn.Module):
    """An MLP that looks at other tokens too."""

    def forward(self, x):
        return x.cumsum(1)


def test_a_last_layer_that_mixes_tokens_is_found_out():
    torch.manual_seed(0)
    body = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL)).eval().base_model
    body.layers[-1].mlp = Mixing()
    ids = torch.randint(30, (1, 6))
    whole = body(input_ids=ids).last_hidden_state
    with LastLayer(body).only(torch.tensor([4])):
        assert body(input_ids=ids).last_hidden_state.equal(whole)
