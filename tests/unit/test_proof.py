"""Which cache serves a model, and that what it gives is what the model's own pass gives, across boundaries."""

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    Llama4TextConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    Phi3Config,
    PhimoeConfig,
    RwkvConfig,
    SmolLM3Config,
)

from rlhf.data.chat import ChatFormat
from rlhf.generate.decoding import NoCache, PlainCache
from rlhf.generate.native_cache import NativeCache
from rlhf.generate.proof import Proof
from rlhf.generate.shared_cache import SharedCache
from rlhf.generate.transformers_engine import TransformersEngine
from rlhf.learn.batching import Layout
from rlhf.learn.logprobs import PolicyModel, token_logprobs
from rlhf.models.load import load_tokenizer
from rlhf.models.precision import cast
from rlhf.models.reach import Reach
from rlhf.native import library
from rlhf.types import WorkItem
from tests.unit.test_batching import one_by_one, ragged
from tests.unit.test_generate import second_pass
from tests.unit.test_reach import LONGROPE

SMALL = {
    "vocab_size": 60,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.15,
    "bos_token_id": None,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
PHI = Phi3Config(**SMALL, rope_parameters=LONGROPE, original_max_position_embeddings=32)


class Numbers:
    """Prompts are written as token ids."""

    def __init__(self, folder):
        self.tokenizer = load_tokenizer(str(folder), "policy.path")

    def prompt_tokens(self, content):
        return [int(t) for t in content.split()]

    def end_tokens(self):
        return [1]

    def __getattr__(self, name):
        return getattr(ChatFormat(self.tokenizer, "policy"), name)


def model_of(config, seed=0):
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def engine_of(folder, config, dtype="float32", slots=7, new=20):
    return TransformersEngine(model_of(config), Numbers(folder), new, 0.8, slots=slots, dtype=dtype)


def item_of(lengths, vocabulary=60, samples=3):
    rng = np.random.default_rng(0)
    prompts = tuple(" ".join(map(str, rng.integers(2, vocabulary, size=n))) for n in lengths)
    return WorkItem(0, prompts, samples, 3)


def plainly(config, rollouts, temperature=0.8):
    """The log-probabilities of a model of its own, each sequence alone."""
    return one_by_one(model_of(config), rollouts.prompt_tokens, rollouts.tokens, rollouts.group, temperature)


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (MistralConfig(**SMALL, sliding_window=12), SharedCache),
        (PhimoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=12), PlainCache),
        (
            Llama4TextConfig(
                **SMALL, head_dim=32, intermediate_size_mlp=96, num_local_experts=2, attention_chunk_size=12,
                floor_scale=8,
            ),
            PlainCache,
        ),
        (
            RwkvConfig(vocab_size=60, hidden_size=64, num_hidden_layers=2, context_length=128, eos_token_id=1),
            NoCache,
        ),
        (PHI, SharedCache),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)  # fmt: skip
def test_sampling_and_learning_are_exact_across_boundaries(policy_folder, config, kind):
    """Prompts on both sides of windows, chunks and switches of rotary frequencies, side by side."""
    engine = engine_of(policy_folder, config, new=8)
    assert type(engine._cache) is kind
    rollouts = engine.generate(item_of([5, 40, 13, 12, 2, 21]))
    expected = plainly(config, rollouts)
    np.testing.assert_allclose(rollouts.logprobs, expected, atol=1e-4)
    np.testing.assert_allclose(second_pass(engine, rollouts), expected, atol=1e-4)


def test_a_fallback_names_model_part_and_reason(policy_folder):
    config = PhimoeConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2, sliding_window=12)
    (note,) = engine_of(policy_folder, config).notes
    assert "PhimoeForCausalLM" in note
    assert "share prompts" in note
    assert "nats off after 14 tokens" in note


def test_a_response_across_a_switch_of_frequencies_is_refused(policy_folder):
    with pytest.raises(ValueError, match="cross 32 tokens"):
        engine_of(policy_folder, PHI).generate(item_of([20]))


@pytest.mark.skipif(library() is None, reason="no compiled code here")
@pytest.mark.parametrize(
    ("config", "decoded"),
    [
        (LlamaConfig(**SMALL, head_dim=32), True),
        (LlamaConfig(**{**SMALL, "num_hidden_layers": 24}, head_dim=32), True),
        (SmolLM3Config(**{**SMALL, "num_hidden_layers": 4}, head_dim=32), False),
        (
            Ministral3Config(
                **SMALL,
                head_dim=32,
                rope_parameters={
                    "rope_type": "yarn", "rope_theta": 10000.0, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
                    "original_max_position_embeddings": 64, "llama_4_scaling_beta": 0.5, "beta_fast": 32.0,
                    "beta_slow": 1.0,
                },
            ),
            False,
        ),
    ],
    ids=["llama", "a deep llama", "smollm3", "ministral3"],
)  # fmt: skip
def test_compiled_layers_serve_what_they_compute(policy_folder, config, decoded):
    """Not layers without rotary positions, nor queries scaled beyond a position that no short prompt reaches."""
    engine = engine_of(policy_folder, config, "bfloat16")
    assert isinstance(engine._cache, NativeCache)
    assert (engine._cache._decoder is not None) == decoded
    rollouts = engine.generate(item_of([30, 5, 62, 70]))
    rounded = model_of(config)
    cast(rounded, torch.bfloat16)
    exact = plainly(config, rollouts)
    own = one_by_one(rounded, rollouts.prompt_tokens, rollouts.tokens, rollouts.group, 0.8)
    off, theirs = (float(np.sqrt(np.mean((x - exact) ** 2))) for x in (rollouts.logprobs, own))
    assert off <= 1.5 * theirs


class Narrow(SharedCache):
    """Takes the window for a token narrower than it is."""

    def _mask(self, window):
        return super()._mask(window - 1 if window else window)


class Shifted(SharedCache):
    """Puts the tokens of a response one position too far."""

    def _call(self, ids, positions, **given):
        return super()._call(ids, positions + (0 if "trees" in given else 1), **given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("kind", "config", "right"),
    [
        (SharedCache, MistralConfig(**SMALL, sliding_window=12), True),
        (Narrow, MistralConfig(**SMALL, sliding_window=12), False),
        (SharedCache, LlamaConfig(**SMALL), True),
        (Shifted, LlamaConfig(**SMALL), False),
    ],
)
def test_a_wrong_cache_is_found_out(kind, config, right, dtype):
    model = model_of(config)
    proof = Proof(model, 20)
    PolicyModel(model)
    cast(model, dtype)
    proof.measure(model)
    fault = proof.fault(kind(model, 20, 4096))
    assert (fault is None) == right, fault


def test_a_model_that_looks_ahead_is_refused():
    bert = BertConfig(
        vocab_size=60,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=96,
        initializer_range=0.2,
    )
    with pytest.raises(ValueError, match=r"BertLMHeadModel.*depends on later tokens.*is_decoder=true"):
        Proof(model_of(bert), 8)


def test_weights_that_are_no_numbers_are_refused(policy_folder):
    broken = model_of(LlamaConfig(**SMALL))
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"policy \(LlamaForCausalLM\).*not numbers.*check its weights"):
        TransformersEngine(broken, Numbers(policy_folder), 8, 1.0)


def test_weights_that_diverge_end_sampling_with_an_error(policy_folder):
    engine = engine_of(policy_folder, LlamaConfig(**SMALL))
    weights = {
        n: torch.full((p.numel(),), float("nan"))
        for n, p in model_of(LlamaConfig(**SMALL)).named_parameters()
    }
    engine.set_weights(weights, 7)
    with pytest.raises(ValueError, match=r"version 7.*not numbers.*work item 0.*learning_rate"):
        engine.generate(item_of([5]))


@torch.no_grad()
def test_a_batch_of_two_models_is_one_that_both_compute_alike():
    """A critic with a narrower window than the policy's: what is beyond it is not packed."""
    config = MistralConfig(**SMALL, sliding_window=10)
    narrow, wide = PolicyModel(model_of(config)), PolicyModel(model_of(LlamaConfig(**SMALL)))
    lay = wide.lay.both(narrow.lay)
    assert lay == Layout(True, Reach(10, None, 128))
    rng, group = np.random.default_rng(0), np.array([0, 0, 1])
    prompts, responses = ragged(rng, [4, 2], 60), ragged(rng, [5, 9, 12], 60)
    for policy, kind in ((narrow, config), (wide, LlamaConfig(**SMALL))):
        flat = np.full(len(responses.values), np.nan, np.float32)
        for batch in lay(prompts, responses, group, range(3), 4096):
            flat[batch.index.numpy()] = token_logprobs(policy, batch).numpy()
        expected = one_by_one(model_of(kind), prompts, responses, group, 1.0)
        np.testing.assert_allclose(flat, expected, atol=1e-4)


@torch.no_grad()
def test_long_and_short_sequences_of_one_batch_keep_their_frequencies():
    """Of longrope: the longest sequence of a call decides for all."""
    policy = PolicyModel(model_of(PHI))
    rng, group = np.random.default_rng(0), np.array([0, 0, 1, 2])
    prompts, responses = ragged(rng, [4, 40, 30], 60), ragged(rng, [5, 9, 12, 20], 60)
    batches = policy.lay(prompts, responses, group, range(4), 4096)
    assert [batch.rows.tolist() for batch in batches] == [[0, 1], [2, 3]]
    flat = np.concatenate([token_logprobs(policy, batch).numpy() for batch in batches])
    np.testing.assert_allclose(flat, one_by_one(model_of(PHI), prompts, responses, group, 1.0), atol=1e-4)
