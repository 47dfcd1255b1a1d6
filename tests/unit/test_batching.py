"""Packed batches against the plain way and against a model called on one sequence at a time."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GemmaConfig,
    GPT2Config,
    LlamaForCausalLM,
    MistralConfig,
    Qwen3Config,
)

from rlhf.learn.batching import by_length, pack, packing_fault, pad
from rlhf.learn.logprobs import PolicyModel, token_logprobs
from rlhf.models.load import load_policy
from rlhf.models.reach import attention_window
from rlhf.models.trees import places
from rlhf.types import Ragged
from tests.tiny import config

SMALL = {
    "vocab_size": 30,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}


def ragged(rng: np.random.Generator, lengths: list[int], vocabulary: int = 20) -> Ragged:
    return Ragged.of([rng.integers(vocabulary, size=n) for n in lengths], np.int32)


def one_by_one(
    model, prompts: Ragged, responses: Ragged, group: np.ndarray, temperature: float
) -> np.ndarray:
    rows = []
    for b in range(len(responses)):
        prompt, own = prompts[group[b]], responses[b]
        ids = torch.as_tensor(np.concatenate([prompt, own]).astype(np.int64))[None]
        logprobs = torch.log_softmax(model(input_ids=ids).logits[0].float() / temperature, -1)
        rows.append([logprobs[len(prompt) - 1 + t, token].item() for t, token in enumerate(own)])
    return np.concatenate(rows)


@pytest.mark.parametrize("way", [pack, pad])
@pytest.mark.parametrize("budget", [1, 40, 4096])
@torch.no_grad()
def test_equals_the_model_on_single_sequences(policy_folder, way, budget):
    model = PolicyModel(load_policy(str(policy_folder)))
    rng = np.random.default_rng(0)
    prompts, group = ragged(rng, [4, 1, 7]), np.array([0, 0, 0, 1, 1, 2])
    responses = ragged(rng, [3, 1, 9, 5, 2, 6])
    flat = np.full(len(responses.values), np.nan, np.float32)
    for batch in way(prompts, responses, group, range(6), budget):
        flat[batch.index.numpy()] = token_logprobs(model, batch, 0.7).numpy()
    np.testing.assert_allclose(flat, one_by_one(model.inner, prompts, responses, group, 0.7), atol=2e-5)


def seen_from(batch, position: int) -> torch.Tensor:
    """Places of the flat sequence that a token attends to, by the parts of the batch's trees."""
    everywhere = torch.arange(batch.input_ids.shape[1])[None]
    for start, tree in places(batch.trees):
        for part in tree.parts(torch.zeros(1)):
            row = position - start - part.start
            if 0 <= row < part.stop - part.start:
                return part.keys(everywhere, start)[0][part.mask[row] == 0]
    raise AssertionError(position)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.integers(1, 9), st.lists(st.integers(1, 9), min_size=1, max_size=5)),
        min_size=1,
        max_size=6,
    ),
    st.integers(1, 60),
)
def test_every_response_token_is_predicted_once_from_its_own_past(shape, budget):
    """The layout alone: what each predicting position sees is the prompt and the response so far."""
    rng = np.random.default_rng(1)
    prompts = ragged(rng, [p for p, _ in shape])
    responses = ragged(rng, [n for _, own in shape for n in own])
    group = np.repeat(np.arange(len(shape)), [len(own) for _, own in shape])
    seen = np.zeros(len(responses.values), int)
    for batch in pack(prompts, responses, group, range(len(group)), budget):
        for n, position in enumerate(batch.predict.tolist()):
            visible = seen_from(batch, position)
            b = int(batch.response[n])
            t = int(batch.index[n]) - int(responses.offsets[b])
            past = np.concatenate([prompts[group[b]], responses[b][:t]])
            order = batch.position_ids[0][visible].argsort()
            assert batch.input_ids[0][visible][order].tolist() == past.tolist()
            assert batch.targets[n] == responses[b][t]
            seen[int(batch.index[n])] += 1
    assert (seen == 1).all()


@pytest.mark.parametrize("ends", [False, True])
def test_a_response_without_tokens_leaves_the_others_alone(ends):
    prompts, responses = Ragged.of([[5, 6]], np.int32), Ragged.of([[7, 8], [], [9, 10]], np.int32)
    (batch,) = pack(prompts, responses, np.zeros(3, int), range(3), 64, ends=ends)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10] if ends else [5, 6, 7, 9]]
    assert batch.predict.tolist() == ([1, 2, 1, 4] if ends else [1, 2, 1, 3])
    assert batch.last is None or batch.last.tolist() == [3, 1, 5]


def test_prompts_are_shared_and_rows_filled():
    prompts, responses = Ragged.of([range(50)], np.int32), Ragged.of([range(5)] * 8, np.int32)
    (batch,) = pack(prompts, responses, np.zeros(8, int), range(8), 4096)
    assert batch.input_ids.numel() == 50 + 8 * 4  # the plain way: 8 * 55
    assert batch.last is None
    (whole,) = pack(prompts, responses, np.zeros(8, int), range(8), 4096, ends=True)
    assert whole.input_ids.numel() == 50 + 8 * 5
    assert whole.input_ids[0, whole.last].tolist() == [4] * 8


@pytest.mark.parametrize(
    "model_config",
    [
        MistralConfig(**SMALL),
        Qwen3Config(**SMALL),
        GemmaConfig(**SMALL),
        Gemma2Config(**SMALL, attn_implementation="eager"),
        GPT2Config(vocab_size=30, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.3),
    ],
    ids=lambda c: c.model_type,
)
@torch.no_grad()
def test_packing_is_exact_on_other_architectures(model_config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config).eval()
    assert packing_fault(model) is None


@pytest.mark.parametrize(
    ("model_config", "window"),
    [
        (MistralConfig(**SMALL, sliding_window=16), 16),
        (Gemma2Config(**SMALL, sliding_window=16, attn_implementation="eager"), 16),
        (MistralConfig(**SMALL, sliding_window=None), None),
        (Qwen3Config(**SMALL), None),
    ],
    ids=["mistral", "gemma2", "mistral without a window", "qwen3"],
)
@torch.no_grad()
def test_layout_is_exact_within_and_beyond_a_sliding_window(model_config, window):
    """Trees know no window, so longer sequences, and only they, are not packed."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config).eval()
    assert attention_window(model.config) == window
    plain = copy.deepcopy(model)
    policy = PolicyModel(model)
    lay, rng, group = policy.lay, np.random.default_rng(0), np.array([0, 0, 1])
    for lengths in ([3, 2, 4], [20, 9, 25]):
        prompts, responses = ragged(rng, [4, 2], 30), ragged(rng, lengths, 30)
        flat = np.full(len(responses.values), np.nan, np.float32)
        batches = lay(prompts, responses, group, range(3), 4096)
        for batch in batches:
            flat[batch.index.numpy()] = token_logprobs(policy, batch).numpy()
        np.testing.assert_allclose(flat, one_by_one(plain, prompts, responses, group, 1.0), atol=1e-4)
        packed = {int(row) for batch in batches if batch.trees is not None for row in batch.rows}
        whole = [int(prompts.lengths[g]) + n for g, n in zip(group, lengths, strict=True)]
        assert packed == {row for row, n in enumerate(whole) if window is None or n <= window}


class Deaf(LlamaForCausalLM):
    """A model that sees all that is before a token, whatever it is told."""

    def forward(self, input_ids, **_):
        return super().forward(input_ids=input_ids)


def test_a_model_that_ignores_the_trees_is_found_out():
    torch.manual_seed(0)
    model = Deaf(config(30)).eval()
    assert "nats off" in packing_fault(model)
    assert model.config._attn_implementation == "sdpa"  # as it was


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40), st.integers(1, 200))
def test_by_length_keeps_every_row_within_the_budget(lengths, budget):
    batches = by_length(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
