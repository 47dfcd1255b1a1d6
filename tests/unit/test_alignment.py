"""Policy-gradient steps against direct formulas: whole gradients by autograd on single sequences."""

import copy
import itertools
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from rlhf.config import AlgorithmConfig, CriticConfig, LoraConfig
from rlhf.data.chat import ChatFormat
from rlhf.generate.transformers_engine import TransformersEngine
from rlhf.learn.advantages import ADVANTAGES
from rlhf.learn.alignment import Aligner, ReferencePolicy
from rlhf.learn.batching import Layout
from rlhf.learn.critic import ValueModel
from rlhf.learn.kl import AdaptiveKL
from rlhf.learn.logprobs import PolicyModel
from rlhf.models.classifier import Classifier
from rlhf.models.load import load_policy, load_tokenizer, new_reward_model
from rlhf.models.lora import adapter_off, merged_parameters, with_adapter
from rlhf.types import Experience, Rewards, WorkItem
from tests.tiny import save_policy
from tests.unit.test_gdpo import brute_force

PROMPTS = tuple(
    [{"role": "user", "content": text}] for text in ("what is tea ?", "how do i make bread ?", "no !")
)
TEMPERATURE = 0.7


def settings(**changes) -> AlgorithmConfig:
    values = {
        "advantage": "leave_one_out",
        "scale": "none",
        "aggregate": "response_sum",
        "epochs": 1,
        "minibatches": 1,
        "clip_low": None,
        "clip_high": None,
        "importance_cap": 2.0,
        "entropy_coef": 0.0,
        "kl": "reward",
        "kl_estimator": "k1",
        "kl_target": None,
        "kl_horizon": 1000.0,
        "critic": None,
    }
    return AlgorithmConfig(**(values | changes))


class Rank:
    """What an aligner asks of a trainer, without DeepSpeed: gradients add up in the model, no optimiser steps.

    `sums` are of the other ranks, which are run one after another.
    """

    def __init__(self, model, rank=0, world=1, budget=4096):
        self.model = PolicyModel(model) if isinstance(model, PreTrainedModel) else model
        self.rank, self.world, self.budget = rank, world, budget

    def update(self, parts, learning_rate, step):
        metrics = {"grad_norm": 0.0}
        for part in parts:
            loss, sums = part.loss(self.model)
            loss.backward()
            for key, value in sums.items():
                metrics[key] = metrics.get(key, 0.0) + value
        return metrics

    @torch.no_grad()
    def passes(self, batches, call):
        return [call(self.model, batch).float() for batch in batches]

    def over_ranks(self, sums):
        assert self.world == 1
        return sums


def step(model, reference, algorithm, experiences, kl_coef, world=1, budget=4096, packing=True, critic=None):
    """Loss, flat gradient and summed metrics of one batch, over all ranks."""
    model.zero_grad()
    held = None if reference is None else ReferencePolicy(PolicyModel(reference))
    if critic is not None:
        assert Classifier(critic.inner).packs
    totals = {}
    for rank in range(world):
        value = None if critic is None else Rank(critic, rank, world, budget)
        aligner = Aligner(Rank(model, rank, world, budget), held, value, algorithm, 8, Layout(packing))
        for key, v in aligner.step(experiences, kl_coef, 0.1, 0.1).items():
            totals[key] = totals.get(key, 0.0) + v
    return totals["loss"], torch.cat([p.grad.flatten() for p in model.parameters()]), totals


def sequence_logits(model, rollouts) -> list[torch.Tensor]:
    """Logits at each response token, one sequence at a time."""
    rows = []
    for b in range(rollouts.responses):
        prompt, own = rollouts.prompt_tokens[rollouts.group[b]], rollouts.tokens[b]
        ids = torch.as_tensor(np.concatenate([prompt, own]).astype(np.int64))[None]
        rows.append(model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float() / TEMPERATURE)
    return rows


def sequence_logprobs(model, rollouts) -> list[torch.Tensor]:
    return [
        torch.log_softmax(logits, -1).gather(
            -1, torch.as_tensor(rollouts.tokens[b].astype(np.int64))[:, None]
        )[:, 0]
        for b, logits in enumerate(sequence_logits(model, rollouts))
    ]


def by_response(rollouts) -> list[torch.Tensor]:
    offsets = rollouts.tokens.offsets
    return [torch.tensor(rollouts.logprobs[a:b]) for a, b in itertools.pairwise(offsets)]


@pytest.fixture
def experiences(policy_folder):
    chat = ChatFormat(load_tokenizer(str(policy_folder), "policy.path"), "policy")
    engine = TransformersEngine(load_policy(str(policy_folder)), chat, 8, TEMPERATURE)
    rng, made = np.random.default_rng(0), []
    for item, prompts in enumerate((PROMPTS[:2], PROMPTS[2:])):
        rollouts = engine.generate(WorkItem(item, prompts, samples=3, seed=item))
        shape = (rollouts.responses, 2)
        names = ("raw", "reference", "utility", "p_good", "slope")
        columns = {k: rng.normal(size=shape).astype(np.float32) for k in names}
        combined = rng.normal(size=shape[0]).astype(np.float32)
        made.append(
            Experience(rollouts, Rewards(item, 0, ("a", "b"), (1.0, 0.5), combined=combined, **columns))
        )
    return made


@pytest.fixture
def models(policy_folder):
    """A policy that has moved on since the rollouts, and a reference."""
    torch.manual_seed(1)
    found = load_policy(str(policy_folder)), load_policy(str(policy_folder))
    with torch.no_grad():
        for model in found:
            for p in model.parameters():
                p.add_(torch.randn_like(p) * 0.05)
    return found


def responses(experiences, model, reference):
    """(logprobs with gradient, behaviour, reference, utility, group) of every response."""
    found, first = [], 0
    for e in experiences:
        with torch.no_grad():
            fixed = sequence_logprobs(reference, e.rollouts)
        own = sequence_logprobs(model, e.rollouts)
        utility = e.rewards.combined.tolist()
        groups = [first + int(g) for g in e.rollouts.group]
        found += list(zip(own, by_response(e.rollouts), fixed, utility, groups, strict=True))
        first += len(e.rollouts.prompts)
    return found


def compare(loss, gradient, expected, model):
    expected.backward()
    assert loss == pytest.approx(expected.item(), abs=1e-4)
    torch.testing.assert_close(
        gradient, torch.cat([p.grad.flatten() for p in model.parameters()]), atol=2e-4, rtol=1e-3
    )


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize(("world", "budget"), [(1, 4096), (2, 4096), (2, 20)])
def test_rloo_equals_the_formula(models, experiences, packing, world, budget):
    """-1/B sum_b A_b sum_t min(ratio, cap) log pi, A leave-one-out of u - beta log(pi/ref)."""
    model, reference = models
    plain = copy.deepcopy(model)
    algorithm = settings(importance_cap=1.1)
    _, gradient, totals = step(model, reference, algorithm, experiences, 0.3, world, budget, packing)
    rows = responses(experiences, plain, reference)
    kl = [(b - r).sum().item() for _, b, r, _, _ in rows]
    reward = [u - 0.3 * k for (_, _, _, u, _), k in zip(rows, kl, strict=True)]
    pieces = []
    for i, (own, behaviour, _, _, group) in enumerate(rows):
        others = [reward[j] for j in range(len(rows)) if rows[j][4] == group and j != i]
        weight = (own.detach() - behaviour).exp().clamp_max(1.1)
        pieces.append(-(reward[i] - sum(others) / len(others)) * (weight * own).sum())
    expected = sum(pieces) / len(pieces)
    expected.backward()
    assert totals["kl"] == pytest.approx(np.mean(kl), abs=1e-4)
    torch.testing.assert_close(
        gradient, torch.cat([p.grad.flatten() for p in plain.parameters()]), atol=2e-4, rtol=1e-3
    )


def test_on_policy_importance_weights_are_one(policy_folder, experiences):
    model = load_policy(str(policy_folder))
    _, _, totals = step(model, None, settings(), experiences, 0.0)
    assert totals["sum/importance_weight"] / totals["sum/tokens"] == pytest.approx(1, abs=1e-4)
    assert totals["sum/sampler_gap"] / totals["sum/tokens"] < 1e-5
    assert totals["sum/importance_capped"] == 0
    assert "kl" not in totals  # without a reference nothing is known of it


@pytest.mark.parametrize("estimator", ["k2", "k3"])
@pytest.mark.parametrize("aggregate", ["response_sum", "token_mean", "response_mean", "length_limit"])
def test_kl_in_the_loss_entropy_and_token_weights(models, experiences, estimator, aggregate):
    """sum_n share_n [-A_n w_n ratio_n + beta KL_n - entropy_coef H_n], transcribed."""
    model, reference = models
    plain = copy.deepcopy(model)
    algorithm = settings(
        advantage="group_mean", kl="loss", kl_estimator=estimator, entropy_coef=0.05, aggregate=aggregate
    )
    loss, gradient, _ = step(model, reference, algorithm, experiences, 0.3)
    rows = responses(experiences, plain, reference)
    logits = [row for e in experiences for row in sequence_logits(plain, e.rollouts)]
    tokens = sum(len(own) for own, *_ in rows)
    expected = torch.zeros(())
    for i, (own, behaviour, fixed, utility, group) in enumerate(rows):
        share = {
            "response_sum": 1 / len(rows),
            "token_mean": 1 / tokens,
            "response_mean": 1 / (len(rows) * len(own)),
            "length_limit": 1 / (len(rows) * 8),
        }[aggregate]
        advantage = utility - np.mean([r[3] for r in rows if r[4] == group])
        weight = (own.detach() - behaviour).exp().clamp_max(2.0)
        difference = own - fixed
        kl = difference**2 / 2 if estimator == "k2" else torch.exp(-difference) - 1 + difference
        p = torch.softmax(logits[i], -1)
        entropy = -(p * p.log()).sum(-1)
        gain = weight * (own - own.detach()).exp() * advantage
        expected = expected + share * (-gain + 0.3 * kl - 0.05 * entropy).sum()
    compare(loss, gradient, expected, plain)


def test_gdpo_learns_from_the_utilities_of_each_model(models, experiences):
    """The combined utility is not read: a step on it is the same once it is GDPO's advantage, which the group's mean,
    0, leaves as it is."""
    model, reference = models
    algorithm = {"kl": "loss", "kl_estimator": "k3", "entropy_coef": 0.05, "aggregate": "response_mean"}
    found = step(model, reference, settings(advantage="gdpo", **algorithm), experiences, 0.3)
    utilities = np.concatenate([e.rewards.utility for e in experiences]).astype(float)
    combined = brute_force(utilities, (1.0, 0.5), 3).astype(np.float32)
    assert np.abs(combined - np.concatenate([e.rewards.combined for e in experiences])).max() > 0.5
    first = len(experiences[0].rewards.combined)
    given = [
        replace(e, rewards=replace(e.rewards, combined=part))
        for e, part in zip(experiences, (combined[:first], combined[first:]), strict=True)
    ]
    expected = step(model, reference, settings(advantage="group_mean", **algorithm), given, 0.3)
    assert found[0] == pytest.approx(expected[0], abs=1e-5)
    torch.testing.assert_close(found[1], expected[1], atol=1e-5, rtol=1e-4)


def test_clipping_and_the_proximal_policy(models, experiences):
    """Two epochs without an optimiser step between: the ratio is 1, so nothing is clipped, and the gradient doubles."""
    model, reference = models
    one = step(model, reference, settings(), experiences, 0.3)
    two = step(model, reference, settings(epochs=2, clip_low=0.2, clip_high=0.3), experiences, 0.3)
    torch.testing.assert_close(two[1], 2 * one[1], atol=1e-4, rtol=1e-3)
    assert two[2]["sum/clipped"] == 0
    assert two[0] == pytest.approx(one[0], abs=1e-5)


def test_clipped_tokens_have_no_gradient():
    """Against PPO's table: the four cases of the sign of A and the side of the ratio, with limits 0.2 and 0.4."""
    from rlhf.learn.policy_loss import Tokens, policy_loss

    ratio = torch.tensor([1.5, 1.5, 0.7, 0.7, 1.3])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    logprobs = ratio.log().requires_grad_()
    zeros = torch.zeros(5)
    tokens = Tokens(zeros, zeros, None, advantage, torch.ones(5))
    loss, sums = policy_loss(logprobs, None, tokens, settings(clip_low=0.2, clip_high=0.4), 0.0)
    loss.backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 1.5, -0.7, 0.0, -1.3]))
    assert loss.item() == pytest.approx(-(1.4 - 1.5 + 0.7 - 0.8 + 1.3), abs=1e-5)
    assert sums["sum/clipped"] == 2


def test_minibatches_cover_every_response_once(models, experiences):
    """Three steps of one prompt each, without an optimiser: weighted by size they add up to the whole batch's."""
    model, reference = models
    whole = step(model, reference, settings(), experiences, 0.3)[1]
    parts = step(model, reference, settings(minibatches=3), experiences, 0.3)[1]
    torch.testing.assert_close(parts / 3, whole, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("trace", [0.0, 0.9, 1.0])
def test_gae_by_its_definition(trace):
    from rlhf.learn.advantages import Outcome

    rng = np.random.default_rng(0)
    lengths = [3, 1, 5]
    values, penalty = rng.normal(size=9).astype(np.float32), rng.normal(size=9).astype(np.float32)
    utility = rng.normal(size=3).astype(np.float32)
    outcome = Outcome(
        torch.tensor(utility), torch.tensor(penalty), torch.tensor(lengths), 1, torch.tensor(values), trace
    )
    expected, start = [], 0
    for b, n in enumerate(lengths):
        r, v = -penalty[start : start + n].astype(float), [*values[start : start + n].astype(float), 0.0]
        r[-1] += utility[b]
        for t in range(n):
            expected.append(sum(trace ** (s - t) * (r[s] + v[s + 1] - v[s]) for s in range(t, n)))
        start += n
    found = ADVANTAGES["gae"](outcome)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


def test_group_and_batch_advantages_by_brute_force():
    from rlhf.learn.advantages import Outcome, scaled

    rng = np.random.default_rng(1)
    lengths = np.array([2, 1, 3, 1, 2, 2])
    utility, penalty = rng.normal(size=6), rng.normal(size=11)
    outcome = Outcome(
        torch.tensor(utility, dtype=torch.float32),
        torch.tensor(penalty, dtype=torch.float32),
        torch.tensor(lengths),
        3,
    )
    ends = np.cumsum(lengths)
    total = np.array([u - penalty[e - n : e].sum() for u, e, n in zip(utility, ends, lengths, strict=True)])
    groups = total.reshape(2, 3)
    loo = (groups - (groups.sum(1, keepdims=True) - groups) / 2).ravel().repeat(lengths)
    np.testing.assert_allclose(ADVANTAGES["leave_one_out"](outcome), loo, atol=1e-5)
    mean = (groups - groups.mean(1, keepdims=True)).ravel().repeat(lengths)
    group_mean = ADVANTAGES["group_mean"](outcome)
    np.testing.assert_allclose(group_mean, mean, atol=1e-5)
    by_group = mean / groups.std(1, ddof=1).repeat(3).repeat(lengths)
    np.testing.assert_allclose(scaled(group_mean, outcome, "group"), by_group, rtol=1e-4)
    to_go = np.concatenate(
        [
            [u - penalty[e - k : e].sum() for k in range(n, 0, -1)]
            for u, e, n in zip(utility, ends, lengths, strict=True)
        ]
    )
    batch = ADVANTAGES["batch_mean"](outcome)
    np.testing.assert_allclose(batch, to_go - to_go.mean(), atol=1e-5)
    np.testing.assert_allclose(
        scaled(batch, outcome, "batch"), (to_go - to_go.mean()) / to_go.std(), rtol=1e-4, atol=1e-5
    )


def test_critic_learns_the_returns(models, experiences, policy_folder):
    """The critic's loss and gradient against a pass over single sequences, at the positions before each token."""
    model, reference = models
    critic = ValueModel(new_reward_model(str(policy_folder), "k", 0, 0))
    torch.nn.init.normal_(critic.inner.score.weight, generator=torch.Generator().manual_seed(0))
    plain = copy.deepcopy(critic)
    algorithm = settings(advantage="gae", critic=CriticConfig(None, 0.1, 1.0, None))
    _, _, totals = step(model, reference, algorithm, experiences, 0.3, critic=critic)
    rows = responses(experiences, copy.deepcopy(model), reference)
    errors, i = [], 0
    for e in experiences:
        for b in range(e.rollouts.responses):
            prompt, own = e.rollouts.prompt_tokens[e.rollouts.group[b]], e.rollouts.tokens[b]
            ids = torch.as_tensor(np.concatenate([prompt, own]).astype(np.int64))[None]
            states = plain.inner.base_model(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
            values = plain.inner.score(states)[:, 0]
            _, behaviour, fixed, utility, _ = rows[i]
            penalty = 0.3 * (behaviour - fixed)
            returns = utility - penalty.flip(0).cumsum(0).flip(0)  # lambda 1: all rewards to come
            errors.append((values - returns) ** 2)
            i += 1
    expected = torch.cat(errors).mean() / 2
    expected.backward()
    assert totals["critic/loss"] == pytest.approx(expected.item(), rel=1e-3)
    torch.testing.assert_close(
        critic.inner.score.weight.grad, plain.inner.score.weight.grad, atol=1e-3, rtol=1e-3
    )


def test_lora_starts_as_the_base_merges_exactly_and_is_its_own_reference(policy_folder):
    import peft

    ids = torch.tensor([[2, 5, 7, 9]])
    base = load_policy(str(policy_folder))
    lora = LoraConfig(rank=4, alpha=8, target_modules="all-linear")
    adapted = with_adapter(load_policy(str(policy_folder)), lora, seed=0)
    with torch.no_grad():
        before = base(input_ids=ids).logits
        torch.testing.assert_close(adapted(input_ids=ids).logits, before)
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(0))
        after = adapted(input_ids=ids).logits
        assert (after - before).abs().max() > 0.1
        with adapter_off(adapted):
            torch.testing.assert_close(adapted(input_ids=ids).logits, before)
        merged = merged_parameters(adapted, {n: p.detach() for n, p in adapted.named_parameters()})
        assert merged.keys() == dict(base.named_parameters()).keys()
        base.load_state_dict(merged, strict=False)
        torch.testing.assert_close(base(input_ids=ids).logits, after, atol=1e-4, rtol=1e-4)
    assert isinstance(adapted, peft.PeftModel)
    assert all(".lora_" in n for n, p in adapted.named_parameters() if p.requires_grad)
    with pytest.raises(ValueError, match=r"policy.lora.target_modules=\['nowhere'\].*q_proj"):
        with_adapter(load_policy(str(policy_folder)), LoraConfig(4, 8, target_modules=["nowhere"]), seed=0)


@pytest.mark.parametrize(
    ("module", "why"), [("lm_head", "shares its weight with another"), ("embed_tokens", "is an embedding")]
)
def test_an_adapter_that_cannot_be_merged_is_refused(tmp_path, module, why):
    model = load_policy(str(save_policy(tmp_path, tie_word_embeddings=True)))
    with pytest.raises(ValueError, match=rf"policy.lora.target_modules=.*{module} {why}"):
        with_adapter(model, LoraConfig(4, 8, target_modules=["q_proj", module]), seed=0)


def test_a_step_larger_than_the_horizon_keeps_the_kl_coefficient_positive():
    control = AdaptiveKL(target=3.0, horizon=50)
    control.update(kl=0.0, responses=256)
    assert control.factor == pytest.approx(0.8)


def test_a_reference_within_a_context(models, experiences):
    """The policy itself, within a context, gives the same step as a model of its own with the same weights."""
    model, _ = models
    own = step(model, copy.deepcopy(model).requires_grad_(False), settings(), experiences, 0.3)[1]
    model.zero_grad()
    aligner = Aligner(Rank(model), ReferencePolicy(None, nullcontext), None, settings(), 8, Layout(True))
    aligner.step(experiences, 0.3, 0.1, 0.1)
    torch.testing.assert_close(torch.cat([p.grad.flatten() for p in model.parameters()]), own)
