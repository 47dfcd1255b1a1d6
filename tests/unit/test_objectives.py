"""Losses and their gradients against direct formulas."""

import copy

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.chat import ChatFormat
from rlhf.generate.transformers_engine import TransformersEngine
from rlhf.learn.advantages import leave_one_out
from rlhf.learn.objectives import (
    BradleyTerry,
    PolicyGradient,
    PreferencePairs,
    Supervised,
    TokenPairs,
    balanced,
)
from rlhf.models.load import load_policy, load_reward_model, load_tokenizer
from rlhf.models.reward import Classifier
from rlhf.types import Experience, Ragged, Rewards, WorkItem

PROMPTS = tuple(
    [{"role": "user", "content": text}] for text in ("what is tea ?", "how do i make bread ?", "no !")
)


def gradients(
    model, objective, batch, world: int, budget: int
) -> tuple[float, torch.Tensor, dict[str, float]]:
    """Loss, flat gradient and summed metrics of a batch, over all ranks and micro-batches."""
    model.zero_grad()
    total, sums = 0.0, {}
    for rank in range(world):
        for part in objective.micro_batches(batch, rank, world, budget):
            loss, metrics = part.loss(model)
            loss.backward()
            total += loss.item()
            for key, value in metrics.items():
                sums[key] = sums.get(key, 0.0) + value
    return total, torch.cat([p.grad.flatten() for p in model.parameters()]), sums


def sequence_logprobs(model, rollouts, temperature: float) -> list[torch.Tensor]:
    """Token log-probabilities of each response, one sequence at a time."""
    rows = []
    for b in range(rollouts.responses):
        prompt, own = rollouts.prompt_tokens[rollouts.group[b]], rollouts.tokens[b]
        ids = torch.as_tensor(np.concatenate([prompt, own]).astype(np.int64))[None]
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / temperature
        rows.append(torch.log_softmax(logits, -1).gather(-1, ids[0, len(prompt) :, None])[:, 0])
    return rows


@pytest.fixture
def experiences(policy_folder):
    chat = ChatFormat(load_tokenizer(str(policy_folder), "policy.path"), "policy")
    engine = TransformersEngine(load_policy(str(policy_folder)), chat, max_new_tokens=8, temperature=0.7)
    rng, made = np.random.default_rng(0), []
    for item, prompts in enumerate((PROMPTS[:2], PROMPTS[2:])):
        rollouts = engine.generate(WorkItem(item, prompts, samples=3, seed=item))
        shape = (rollouts.responses, 2)
        columns = {
            k: rng.normal(size=shape).astype(np.float32) for k in ("raw", "reference", "utility", "p_good")
        }
        combined = rng.normal(size=shape[0]).astype(np.float32)
        made.append(Experience(rollouts, Rewards(item, 0, ("a", "b"), combined=combined, **columns)))
    return made


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world", "budget"), [(1, 4096), (2, 4096), (2, 20)])
def test_policy_gradient_equals_the_formula(policy_folder, experiences, packing, world, budget):
    """sum_b A_b sum_t min(ratio, cap) grad log pi, by autograd on single sequences."""
    model, reference = load_policy(str(policy_folder)), load_policy(str(policy_folder))
    torch.manual_seed(1)
    with torch.no_grad():
        for p, q in zip(model.parameters(), reference.parameters(), strict=True):
            p.add_(torch.randn_like(p) * 0.05)  # the learner has moved on since the rollouts
            q.add_(torch.randn_like(q) * 0.05)
    objective = PolicyGradient(reference, "rloo", importance_cap=1.1, packing=packing)
    loss, gradient, sums = gradients(model, objective, (experiences, 0.3), world, budget)

    expected_model, pieces, kls = copy.deepcopy(model), [], []
    for experience in experiences:
        rollouts = experience.rollouts
        behaviour = [
            torch.tensor(rollouts.logprobs[a:b])
            for a, b in zip(rollouts.tokens.offsets, rollouts.tokens.offsets[1:], strict=False)
        ]
        with torch.no_grad():
            kl = [
                (b.sum() - r.sum()).item()
                for b, r in zip(behaviour, sequence_logprobs(reference, rollouts, 0.7), strict=True)
            ]
        kls += kl
        reward = [u - 0.3 * k for u, k in zip(experience.rewards.combined.tolist(), kl, strict=True)]
        for b, logprobs in enumerate(sequence_logprobs(expected_model, rollouts, 0.7)):
            others = [
                reward[j] for j in range(len(reward)) if rollouts.group[j] == rollouts.group[b] and j != b
            ]
            ratio = (logprobs.detach() - behaviour[b]).exp().clamp_max(1.1)
            pieces.append(-(reward[b] - sum(others) / len(others)) * (ratio * logprobs).sum())
    expected = sum(pieces) / len(pieces)
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-4)
    assert sums["kl"] == pytest.approx(np.mean(kls), abs=1e-4)
    torch.testing.assert_close(
        gradient, torch.cat([p.grad.flatten() for p in expected_model.parameters()]), atol=2e-4, rtol=1e-3
    )


def test_on_policy_importance_weights_are_one(policy_folder, experiences):
    model = load_policy(str(policy_folder))
    _, _, sums = gradients(model, PolicyGradient(None, "rloo", 2.0), (experiences, 0.0), 1, 4096)
    assert sums["sum/importance_weight"] / sums["sum/tokens"] == pytest.approx(1, abs=1e-4)
    assert sums["sum/sampler_gap"] / sums["sum/tokens"] < 1e-5
    assert sums["sum/importance_capped"] == 0


@pytest.mark.parametrize("world", [1, 3])
def test_supervised_equals_transformers_own_loss(policy_folder, world):
    """Against the loss that the model itself computes from labels, with the prompt's labels masked."""
    model = load_policy(str(policy_folder))
    rng = np.random.default_rng(0)
    prompts = Ragged.of([rng.integers(2, 20, size=n) for n in (3, 6, 2, 4)], np.int32)
    responses = Ragged.of([rng.integers(2, 20, size=n) for n in (5, 1, 7, 3)], np.int32)
    chosen = np.array([3, 0, 2])
    loss, gradient, _ = gradients(model, Supervised(), (TokenPairs(prompts, responses), chosen), world, 30)
    model.zero_grad()
    tokens = responses.lengths[chosen].sum()
    expected = 0.0
    for i in chosen:
        ids = torch.as_tensor(np.concatenate([prompts[i], responses[i]]).astype(np.int64))[None]
        labels = ids.clone()
        labels[:, : len(prompts[i])] = -100
        part = model(input_ids=ids, labels=labels).loss * (len(responses[i]) / tokens)
        part.backward()
        expected += part.item()
    assert loss == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(
        gradient, torch.cat([p.grad.flatten() for p in model.parameters()]), atol=1e-5, rtol=1e-4
    )


@pytest.mark.parametrize("packing", [True, False])
def test_bradley_terry_equals_the_formula(reward_folders, packing):
    model = load_reward_model(str(reward_folders["helpful"]), "k")
    classifier = Classifier(model, 0)
    assert classifier.packs
    classifier.packs = packing
    rng = np.random.default_rng(0)
    chosen = Ragged.of([rng.integers(2, 20, size=n) for n in (3, 6, 9)], np.int32)
    rejected = Ragged.of([rng.integers(2, 20, size=n) for n in (5, 4, 1)], np.int32)
    loss, _, sums = gradients(
        classifier, BradleyTerry(classifier), (PreferencePairs(chosen, rejected), np.arange(3)), 2, 16
    )
    with torch.no_grad():
        score = lambda row: model(input_ids=torch.tensor(row[None].astype(np.int64))).logits.item()  # noqa: E731
        margins = np.array(
            [
                score(c) - score(r)
                for c, r in zip(
                    map(chosen.__getitem__, range(3)), map(rejected.__getitem__, range(3)), strict=True
                )
            ]
        )
    assert loss == pytest.approx(np.log1p(np.exp(-margins)).mean(), abs=1e-5)
    assert sums["accuracy"] == pytest.approx((margins > 0).mean())


@given(st.lists(st.lists(st.floats(-100, 100), min_size=4, max_size=4), min_size=1, max_size=5))
def test_leave_one_out_by_brute_force(rewards):
    expected = [[r[i] - sum(r[j] for j in range(4) if j != i) / 3 for i in range(4)] for r in rewards]
    found = leave_one_out(torch.tensor(rewards, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 5))
def test_balanced_shares_hold_every_row_and_differ_by_one_row_at_most(lengths, world):
    shares = balanced(np.array(lengths), world)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)
