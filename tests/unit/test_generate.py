"""The sampler against a second forward pass, and against the probabilities of the policy."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    FalconConfig,
    Gemma2Config,
    GPT2Config,
    MistralConfig,
    Qwen3Config,
)

from rlhf.data.chat import ChatFormat
from rlhf.generate.decoding import PlainCache
from rlhf.generate.shared_cache import SharedCache
from rlhf.generate.transformers_engine import TransformersEngine, draw
from rlhf.models.load import load_policy, load_tokenizer
from rlhf.types import WorkItem
from tests.unit.test_batching import SMALL

PROMPTS = tuple(
    [{"role": "user", "content": text}]
    for text in ("what is tea ?", "how do i make good bread ?", "yes", "open a lock !")
)


def make(policy_folder, model=None, **given):
    chat = ChatFormat(load_tokenizer(str(policy_folder), "policy.path"), "policy")
    model = model or load_policy(str(policy_folder))
    return TransformersEngine(model, chat, max_new_tokens=12, temperature=0.8, **given)


def second_pass(engine, rollouts):
    """Log-probabilities of all tokens, float32 [T]."""
    found = np.full(len(rollouts.tokens.values), np.nan, np.float32)
    for places, values in engine.logprobs(rollouts):
        found[places] = values
    return found


@pytest.fixture
def engine(policy_folder):
    return make(policy_folder)


def test_logprobs_are_those_of_a_second_pass(engine):
    rollouts = engine.generate(WorkItem(0, PROMPTS, samples=6, seed=3))
    assert 0 < rollouts.finished.sum() < rollouts.responses  # rows left the batch early
    np.testing.assert_allclose(rollouts.logprobs, second_pass(engine, rollouts), atol=2e-5)


def test_draw_inverts_the_distribution_function():
    logits = torch.log(torch.tensor([[0.2, 0.3, 0.0, 0.5]])).repeat(5, 1)
    tokens, logprobs = draw(logits, torch.tensor([0.0, 0.19, 0.21, 0.51, 0.999999], dtype=torch.float64))
    assert tokens.tolist() == [0, 0, 1, 3, 3]  # token 2 has probability 0
    np.testing.assert_allclose(logprobs.exp(), [0.2, 0.2, 0.3, 0.5, 0.5], rtol=1e-6)


@pytest.mark.parametrize("slots", [1, 3, 10])
def test_refilled_slots_give_the_same_responses(engine, policy_folder, slots):
    """A response is drawn from its own random numbers, whatever stands beside it."""
    item = WorkItem(0, PROMPTS, samples=6, seed=3)
    whole, refilled = engine.generate(item), make(policy_folder, slots=slots).generate(item)
    assert refilled.texts == whole.texts
    np.testing.assert_allclose(refilled.logprobs, whole.logprobs, atol=2e-5)


def test_work_items_side_by_side_are_what_they_are_alone(engine, policy_folder):
    items = [WorkItem(i, PROMPTS[i:], samples=3, seed=i) for i in range(3)]
    alone = [engine.generate(item) for item in items]
    together = make(policy_folder, slots=7)
    tickets = [together.submit(item) for item in items[:2]]
    found = {}
    for _ in range(4):
        found |= dict(together.advance())
    tickets.append(together.submit(items[2]))  # while the others are under way
    while together.busy:
        found |= dict(together.advance())
    for ticket, item, expected in zip(tickets, items, alone, strict=True):
        assert found[ticket].item == item.id
        assert found[ticket].texts == expected.texts
        np.testing.assert_allclose(found[ticket].logprobs, expected.logprobs, atol=2e-5)


def test_an_item_does_not_depend_on_those_before_it(engine, policy_folder):
    """To the bit: which generator gets an item must not change it."""
    item = WorkItem(1, PROMPTS[2:3], samples=5, seed=4)
    fresh = make(policy_folder).generate(item)
    engine.generate(WorkItem(0, PROMPTS, samples=6, seed=3))  # more prompts, and longer ones
    cache = engine._cache
    assert (cache._prompts, cache._lengths) == ({}, [])
    after = engine.generate(item)
    assert after.texts == fresh.texts
    np.testing.assert_array_equal(after.logprobs, fresh.logprobs)


OTHERS = [
    Qwen3Config(**SMALL),
    MistralConfig(**SMALL, sliding_window=12),
    Gemma2Config(**SMALL, sliding_window=12, attn_implementation="eager", attn_logit_softcapping=1.0),
    GPT2Config(vocab_size=30, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3),
    FalconConfig(vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, alibi=False),
    DeepseekV2Config(  # keys and values are made from what the cache keeps
        **SMALL | {"num_key_value_heads": SMALL["num_attention_heads"]},
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        moe_intermediate_size=16,
        n_routed_experts=2,
        num_experts_per_tok=1,
    ),
]


@pytest.mark.parametrize("model_config", OTHERS, ids=lambda c: c.model_type)
@pytest.mark.parametrize("slots", [5, 64])
def test_logprobs_are_those_of_single_sequences_on_other_architectures(policy_folder, model_config, slots):
    """Beyond a sliding window too; and where attention is the model's own, without refilling."""
    torch.manual_seed(0)
    model_config.eos_token_id = 1
    plain = AutoModelForCausalLM.from_config(model_config).eval()
    model = AutoModelForCausalLM.from_config(model_config).eval()
    model.load_state_dict(plain.state_dict())
    engine = make(policy_folder, model, slots=slots)
    kind = PlainCache if model_config.model_type in ("falcon", "deepseek_v2") else SharedCache
    assert isinstance(engine._cache, kind)
    rollouts = engine.generate(WorkItem(0, PROMPTS, samples=3, seed=3))
    for b in range(rollouts.responses):
        prompt, own = rollouts.prompt_tokens[rollouts.group[b]], rollouts.tokens[b]
        ids = torch.from_numpy(np.concatenate([prompt, own]).astype(np.int64))[None]
        with torch.no_grad():
            every = torch.log_softmax(plain(input_ids=ids).logits[0].float() / 0.8, -1)
        expected = every[torch.arange(len(prompt) - 1, len(ids[0]) - 1), ids[0, len(prompt) :]]
        start, end = rollouts.tokens.offsets[b : b + 2]
        np.testing.assert_allclose(rollouts.logprobs[start:end], expected, atol=1e-4)
