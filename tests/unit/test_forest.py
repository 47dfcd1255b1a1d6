"""The way of attention for GPUs, on the CPU: against masked attention over whole sequences, and of whole models against
the plain, padded pass."""

import copy
import itertools

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Qwen3Config,
)

from rlhf.generate.shared_cache import SharedCache
from rlhf.learn.batching import Layout, pad
from rlhf.learn.logprobs import PolicyModel, token_logprobs
from rlhf.models import forest
from rlhf.models.attention import MASKED, TREES, attention, is_ours, way_for
from rlhf.models.classifier import Classifier, score_rows
from rlhf.models.forest import spans
from rlhf.models.trees import Tree
from tests.unit.test_batching import ragged
from tests.unit.test_logprobs import examples

FOREST = (
    Tree(5, (3, 1, 9, 70)), Tree(0, (4,)), Tree(200, (30, 2, 40)), Tree(1),  # one call
    Tree(900, (60, 0, 80)), Tree(1030), Tree(3, (4, 5)),
    Tree(1000, (40,)), Tree(20, (700, 300, 500)), Tree(0, (600, 600)), Tree(2, (2,)),
)  # fmt: skip
HEADS, WIDTH = 2, 4
SMALL = {
    "vocab_size": 30,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
CONFIGS = {
    "full": LlamaConfig(**SMALL),
    "no groups": LlamaConfig(**{**SMALL, "num_key_value_heads": 4}),
    "one key head": Qwen3Config(**{**SMALL, "num_key_value_heads": 1}),
    "window": MistralConfig(**SMALL, sliding_window=16),
    "window in every other layer, capped": Gemma2Config(
        **SMALL, sliding_window=16, attn_implementation="eager", attn_logit_softcapping=1.0
    ),
    "learnt positions": GPT2Config(
        vocab_size=30, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.1
    ),
}


def visible(trees) -> torch.Tensor:
    """What each token sees, bool [T, T]."""
    labels = [(t, r, n) for t, tree in enumerate(trees) for r, n in enumerate((tree.prompt, *tree.responses))]
    tree, branch = (torch.tensor([x for one in labels for x in [one[i]] * one[2]]) for i in (0, 1))
    seen = (tree[:, None] == tree) & ((branch == 0) | (branch[:, None] == branch))
    return seen.tril()


@pytest.mark.parametrize("key_heads", [HEADS, 1])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_values_and_gradients_are_those_of_masked_attention(dtype, tolerance, key_heads):
    torch.manual_seed(0)
    seen = visible(FOREST)
    shapes = [(1, heads, len(seen), WIDTH) for heads in (HEADS, key_heads, key_heads)]
    given = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    out, _ = attention(torch.nn.Module(), *given, None, trees=FOREST, scaling=0.3, masked=True)
    upper = torch.randn(out.shape).to(dtype)
    out.backward(upper)
    found = [out.detach(), *(x.grad for x in given)]
    exact = [x.detach().double().requires_grad_() for x in given]
    q, k, v = exact[0], *(x.repeat_interleave(HEADS // key_heads, 1) for x in exact[1:])
    scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~seen, -torch.inf)
    truth = (torch.softmax(scores, -1) @ v).transpose(1, 2)
    truth.backward(upper.double())
    for ours, theirs in zip(found, [truth.detach(), *(x.grad for x in exact)], strict=True):
        assert (ours.double() - theirs).norm() <= tolerance * theirs.norm()


def test_every_token_is_in_one_span_and_masks_are_bounded():
    found = spans(FOREST, torch.device("cpu"), torch.float32)
    assert [span.start for span in found][1:] == [span.stop for span in found][:-1]
    assert (found[0].start, found[-1].stop) == (0, sum(tree.length for tree in FOREST))
    assert len(found) < len(FOREST) + 3
    seen = visible(FOREST)
    for span in found:
        keys = torch.cat([torch.arange(*one) for one in span.keys])
        mine = torch.zeros(span.stop - span.start, len(seen), dtype=torch.bool)
        own = torch.ones(len(mine), len(keys)).tril().bool() if span.mask is None else span.mask[0, 0] == 0
        mine[:, keys] = own
        assert torch.equal(mine, seen[span.start : span.stop])
        assert span.mask is None or span.stop - span.start <= forest.MOST
    many = tuple(Tree(10, (6,) * 8) for _ in range(100))
    assert len(spans(many, torch.device("cpu"), torch.float32)) == -(-100 // (forest.MOST // 58))
    assert spans(many, torch.device("cpu"), torch.float32) is spans(many, torch.device("cpu"), torch.float32)


def test_a_pass_with_gradients_may_follow_one_in_inference_mode():
    trees, given = (Tree(3, (2, 2)), Tree(2)), torch.randn(1, 1, 9, 4)
    with torch.inference_mode():
        attention(torch.nn.Module(), given, given, given, None, trees=trees, masked=True)
    query = given.clone().requires_grad_()
    out, _ = attention(torch.nn.Module(), query, given, given, None, trees=trees, masked=True)
    out.sum().backward()
    assert query.grad.isfinite().all()


def learnt(policy: PolicyModel, lay, lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """Log-probabilities of responses to shared prompts, the gradient of their weighted sum, and whether any was
    packed."""
    prompts, _, group = examples()
    responses = ragged(np.random.default_rng(1), lengths, 30)
    flat = torch.zeros(len(responses.values))
    weights = torch.linspace(-1, 2, len(flat))
    policy.zero_grad()
    batches = lay(prompts, responses, group, range(6), 80)
    for batch in batches:
        logprobs = token_logprobs(policy, batch, 0.7)
        (logprobs * weights[batch.index]).sum().backward()
        flat[batch.index] = logprobs.detach()
    gradient = torch.cat([p.grad.flatten() for p in policy.inner.parameters()])
    return flat, gradient, any(batch.trees is not None for batch in batches)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("lengths", [[3, 1, 9, 5, 12, 6], [20, 9, 25, 30, 2, 11]], ids=["short", "long"])
def test_a_policy_is_that_of_the_padded_pass(kind, lengths):
    """Several responses share a prompt; of models with a window, sequences within and beyond it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    plain = PolicyModel(copy.deepcopy(model))
    plain.inner.set_attn_implementation("eager")
    found, gradient, packed = learnt(policy := PolicyModel(model, way=MASKED), policy.lay, lengths)
    assert policy.inner.config._attn_implementation == MASKED
    assert packed
    expected, truth, _ = learnt(plain, pad, lengths)
    assert (found - expected).abs().max() <= 1e-5
    assert (gradient - truth).norm() <= 1e-5 * truth.norm()
    assert (gradient - truth).abs().max() <= 1e-5 * max(1.0, float(truth.abs().max()))


@torch.no_grad()
def test_rewards_are_those_of_the_models_own_pass():
    torch.manual_seed(0)
    config = LlamaConfig(**SMALL, num_labels=1, pad_token_id=0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    rng = np.random.default_rng(0)
    shared = [rng.integers(1, 30, size=n) for n in (6, 3)]
    rows = [np.concatenate([p, rng.integers(1, 30, size=n)]) for p, n in itertools.product(shared, (4, 1, 9))]
    own = torch.cat([model(input_ids=torch.tensor(row)[None]).logits[0] for row in rows])
    classifier = Classifier(model, way=MASKED)
    assert classifier.packs
    assert model.config._attn_implementation == MASKED
    found = score_rows(classifier, classifier, rows, [0, 0, 0, 1, 1, 1], 64)
    torch.testing.assert_close(found, own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", ["full", "window"])
@torch.no_grad()
def test_sampling_gives_the_models_own_logits(kind):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIGS[kind]).eval()
    rng = np.random.default_rng(0)
    prompts = [rng.integers(30, size=n).tolist() for n in (5, 12)]
    tokens = torch.from_numpy(rng.integers(30, size=(9, 4)))
    rows = [torch.tensor([*prompts[i // 2], *tokens[:, i].tolist()])[None] for i in range(4)]
    exact = [model(input_ids=row).logits[0, -9:] for row in rows]
    PolicyModel(model, way=MASKED)
    assert is_ours(model)
    cache = SharedCache(model, 12, 64)
    handles, _ = cache.prefill(prompts)
    cache.join([handles[0], handles[0], handles[1], handles[1]])
    for step in range(9):
        logits = cache.step(tokens[step])
        torch.testing.assert_close(logits, torch.stack([x[step] for x in exact]), atol=1e-5, rtol=1e-5)


def test_a_models_device_decides_its_way():
    assert (way_for("cpu"), way_for("cuda"), way_for("cuda:3")) == (TREES, MASKED, MASKED)
    model = AutoModelForCausalLM.from_config(CONFIGS["full"]).eval()
    assert isinstance(PolicyModel(model).lay, Layout)
    assert model.config._attn_implementation == TREES
