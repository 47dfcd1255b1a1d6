"""Log-probabilities by chunks, and packed gradients, against single sequences, on several architectures."""

import copy

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from rlhf.learn.batching import pack
from rlhf.learn.logprobs import PolicyModel, token_logprobs, token_logprobs_and_entropy
from rlhf.models.load import load_policy
from rlhf.models.packed import PackedLinear
from rlhf.models.packed import pack as pack_layers
from rlhf.models.precision import cast, dtype_of
from tests.unit.test_batching import SMALL, one_by_one, ragged

CONFIGS = [
    LlamaConfig(**SMALL),
    Qwen3Config(**SMALL),
    MistralConfig(**SMALL),
    GemmaConfig(**SMALL),
    Gemma2Config(
        **SMALL, attn_implementation="eager", final_logit_softcapping=2.0, attn_logit_softcapping=1.0
    ),
    GPT2Config(vocab_size=30, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3),
]


def examples(vocabulary: int = 30):
    """Three prompts with 3, 2 and 1 responses; one prompt is longer than a block of responses."""
    rng = np.random.default_rng(0)
    prompts, group = ragged(rng, [4, 1, 30], vocabulary), np.array([0, 0, 0, 1, 1, 2])
    return prompts, ragged(rng, [3, 1, 9, 5, 12, 6], vocabulary), group


@pytest.mark.parametrize("model_config", CONFIGS, ids=lambda c: c.model_type)
@pytest.mark.parametrize("block", [8, 128])
def test_packed_logprobs_and_gradients_equal_single_sequences(model_config, block, monkeypatch):
    monkeypatch.setattr("rlhf.models.trees.BLOCK", block)
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(model_config).eval()
    policy = PolicyModel(copy.deepcopy(plain))
    prompts, responses, group = examples()
    assert policy.lay.packs
    assert policy.by_chunks
    batches = policy.lay(prompts, responses, group, range(6), 40)
    assert len(batches) > 1
    assert all(b.trees is not None for b in batches)
    flat = torch.zeros(len(responses.values))
    weights = torch.linspace(-1, 2, len(flat))
    for batch in batches:
        logprobs = token_logprobs(policy, batch, 0.7)
        (logprobs * weights[batch.index]).sum().backward()
        flat[batch.index] = logprobs.detach()
    with torch.no_grad():
        expected = one_by_one(plain, prompts, responses, group, 0.7)
    np.testing.assert_allclose(flat, expected, atol=1e-4)
    for b in range(6):
        ids = torch.tensor([*prompts[group[b]].tolist(), *responses[b].tolist()])[None]
        every = torch.log_softmax(plain(input_ids=ids).logits[0].float() / 0.7, -1)
        start, n = len(prompts[group[b]]), len(responses[b])
        own = every[torch.arange(start - 1, start - 1 + n), ids[0, start:]]
        (own * weights[responses.offsets[b] : responses.offsets[b + 1]]).sum().backward()
    found = torch.cat([p.grad.flatten() for p in policy.inner.parameters()])
    truth = torch.cat([p.grad.flatten() for p in plain.parameters()])
    assert (found - truth).norm() <= 1e-3 * truth.norm()


class Sizes(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation makes."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for value in out if isinstance(out, tuple | list) else [out]:
            if isinstance(value, torch.Tensor):
                self.largest = max(self.largest, value.numel())
        return out


def test_chunks_give_the_same_and_hold_no_more_than_a_chunk_of_logits(policy_folder):
    model = load_policy(str(policy_folder))
    prompts, responses, group = examples(20)
    (batch,) = pack(prompts, responses, group, range(6), 4096)
    whole, parts = PolicyModel(copy.deepcopy(model)), PolicyModel(copy.deepcopy(model), chunk=100)
    results = []
    for policy in (whole, parts):
        logprobs, entropy = token_logprobs_and_entropy(policy, batch, 0.7)
        (logprobs.sum() + (entropy**2).sum()).backward()
        gradient = torch.cat([p.grad.flatten() for p in policy.parameters()])
        results.append((logprobs, entropy, gradient))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    vocabulary = model.config.vocab_size
    wide = model.resize_token_embeddings(50 * vocabulary)
    assert wide.weight.shape[0] == 50 * vocabulary
    policy = PolicyModel(model, chunk=4 * 50 * vocabulary)
    with Sizes() as sizes:
        (-token_logprobs(policy, batch).sum()).backward()
    parameters = max(p.numel() for p in model.parameters())
    assert sizes.largest <= max(parameters, policy.chunk) < len(responses.values) * 50 * vocabulary


def test_a_head_that_does_not_make_the_logits_is_found_out(policy_folder):
    model = load_policy(str(policy_folder))
    plain = copy.deepcopy(model)
    forward = model.forward

    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 3
        return output

    model.forward = scaled
    policy = PolicyModel(model)
    assert not policy.by_chunks
    prompts, responses, group = examples(20)
    (batch,) = pack(prompts, responses, group, range(6), 4096)
    with torch.no_grad():
        found, expected = token_logprobs(policy, batch), token_logprobs(PolicyModel(plain), batch, 1 / 3)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_packed_layers_compute_the_same(policy_folder, dtype):
    model = load_policy(str(policy_folder))
    frequencies = model.model.rotary_emb.inv_freq.clone()
    cast(model, dtype)
    assert model.model.rotary_emb.inv_freq.equal(frequencies)
    packed = copy.deepcopy(model)
    pack_layers(packed, 16)
    changed = [m for m in packed.modules() if isinstance(m, PackedLinear)]
    if not changed:
        pytest.skip("this PyTorch has no packed layers")
    ids = torch.arange(15)[None] % 20
    found, expected = packed(input_ids=ids).logits.float(), model(input_ids=ids).logits.float()
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


def test_auto_is_a_type_of_this_machine():
    assert dtype_of("float32", "cpu") == torch.float32
    assert dtype_of("bfloat16", "cpu") == torch.bfloat16
    assert dtype_of("auto", "cpu") in (torch.float32, torch.bfloat16)


def test_weights_travel_in_the_format_they_compute_in():
    from rlhf.learn.trainer import Weights

    named = {"a": torch.randn(3, 5), "b": torch.randn(2)}
    for dtype in (torch.float32, torch.bfloat16):
        weights = Weights.of(named, dtype)
        assert weights.buffer.dtype == (np.float32 if dtype == torch.float32 else np.int16)
        for name, value in weights.tensors().items():
            assert value.dtype == dtype
            assert value.view(named[name].shape).equal(named[name].to(dtype))


def test_weights_take_the_memory_of_earlier_ones():
    from rlhf.learn.trainer import Weights

    for dtype in (torch.float32, torch.bfloat16):
        earlier = Weights.of({"a": torch.randn(3, 5)}, dtype)
        value = torch.randn(3, 5)
        later = Weights.of({"a": value}, dtype, over=earlier)
        assert later.buffer.ctypes.data == earlier.buffer.ctypes.data
        assert later.tensors()["a"].view(3, 5).equal(value.to(dtype))
