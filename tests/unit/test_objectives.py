"""Losses and their gradients against direct formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlhf.learn.logprobs import PolicyModel
from rlhf.learn.objectives import (
    BradleyTerry,
    PreferencePairs,
    Supervised,
    TokenPairs,
    balanced,
)
from rlhf.models.classifier import Classifier
from rlhf.models.load import load_policy, load_reward_model
from rlhf.types import Ragged


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


@pytest.mark.parametrize("world", [1, 3])
def test_supervised_equals_transformers_own_loss(policy_folder, world):
    """Against the loss that the model itself computes from labels, with the prompt's labels masked."""
    model = load_policy(str(policy_folder))
    rng = np.random.default_rng(0)
    prompts = Ragged.of([rng.integers(2, 20, size=n) for n in (3, 6, 2, 4)], np.int32)
    responses = Ragged.of([rng.integers(2, 20, size=n) for n in (5, 1, 7, 3)], np.int32)
    chosen = np.array([3, 0, 2])
    policy, batch = PolicyModel(model), (TokenPairs(prompts, responses), chosen)
    loss, gradient, _ = gradients(policy, Supervised(policy.lay), batch, world, 30)
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
    classifier = Classifier(model)
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


@given(st.lists(st.integers(1, 100), min_size=1, max_size=30), st.integers(1, 5))
def test_balanced_shares_hold_every_row_and_differ_by_one_row_at_most(lengths, world):
    shares = balanced(np.array(lengths), world)
    assert sorted(i for share in shares for i in share) == list(range(len(lengths)))
    loads = [sum(lengths[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(lengths)
