"""What every generation engine promises. vLLM is tried where it is installed (make test-vllm)."""

from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rlhf.config import RolloutConfig
from rlhf.data.chat import ChatFormat
from rlhf.generate.engines import ENGINES, engine_class
from rlhf.models.load import load_tokenizer
from rlhf.types import WorkItem
from tests.tiny import WORDS, config, tokenizer

TEMPERATURE, NEW, DRAWS = 0.8, 12, 600
PROMPTS = tuple(
    [{"role": "user", "content": text}]
    for text in ("what is tea ?", "how do i make good bread ?", "yes", "open a lock !")
)
KINDS = [
    pytest.param(
        name, marks=pytest.mark.skipif(name == "vllm" and find_spec("vllm") is None, reason="no vLLM here")
    )
    for name in ENGINES
]
POLICIES = {  # as vLLM has no kernel for heads of less than 32 numbers
    "untied": {"tie_word_embeddings": False},
    "tied": {"tie_word_embeddings": True},
    "large": {"tie_word_embeddings": True, "pad_token_id": 1, "initializer_range": 0.1},  # pad == eos
}


def rollout_of(kind: str, **options) -> RolloutConfig:
    return RolloutConfig(kind, options, "float32", NEW, TEMPERATURE, 64, 1)


@pytest.fixture(scope="module", params=POLICIES)
def policy(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    words = WORDS + [f"word{i}" for i in range(50_000 if request.param == "large" else 0)]
    made = tokenizer(words)
    torch.manual_seed(0)
    settings = {
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        **POLICIES[request.param],
    }
    LlamaForCausalLM(config(len(made), **settings)).save_pretrained(folder)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(params=KINDS)
def opened(request, policy):
    """Opens an engine of a kind; one at a time, as vLLM has it."""

    @contextmanager
    def open_(slots: int = 64, **options):
        rollout = replace(rollout_of(request.param, **options), slots=slots)
        chat = ChatFormat(load_tokenizer(str(policy), "policy.path"), "policy")
        engine = engine_class(rollout).open(str(policy), chat, rollout, "cpu")
        try:
            yield engine
        finally:
            engine.close()

    return open_


def weights_of(policy, noise: float = 0.0) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(policy)
    generator = torch.Generator().manual_seed(1)
    return {
        name: (parameter.detach() + noise * torch.randn(parameter.shape, generator=generator)).flatten()
        for name, parameter in model.named_parameters()
    }


def expected_logprobs(policy, rollouts, weights=None) -> np.ndarray:
    """By transformers, one sequence at a time, float32 [T]."""
    model = AutoModelForCausalLM.from_pretrained(policy).eval()
    if weights is not None:
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name].view(parameter.shape))
    found = []
    for b in range(rollouts.responses):
        prompt, own = rollouts.prompt_tokens[rollouts.group[b]], rollouts.tokens[b]
        ids = torch.from_numpy(np.concatenate([prompt, own]).astype(np.int64))[None]
        with torch.no_grad():
            every = torch.log_softmax(model(input_ids=ids).logits[0] / TEMPERATURE, -1)
        found.append(every[torch.arange(len(prompt) - 1, len(ids[0]) - 1), ids[0, len(prompt) :]].numpy())
    return np.concatenate(found)


def second_pass(engine, rollouts) -> np.ndarray:
    found = np.full(len(rollouts.tokens.values), np.nan, np.float32)
    for places, values in engine.logprobs(rollouts):
        found[places] = values
    return found


def finish(engine) -> dict:
    found = {}
    while engine.busy:
        found |= dict(engine.advance())
    return found


def test_logprobs_are_those_of_the_distribution_sampled_from(opened, policy):
    item = WorkItem(0, PROMPTS, samples=6, seed=3)
    with opened() as engine:
        rollouts = engine.generate(item)
        np.testing.assert_allclose(rollouts.logprobs, expected_logprobs(policy, rollouts), atol=1e-4)
        np.testing.assert_allclose(second_pass(engine, rollouts), rollouts.logprobs, atol=1e-4)
        assert set(rollouts.versions.tolist()) == {0}

        weights = weights_of(policy, noise=0.05)
        engine.set_weights(weights, 3)
        after = engine.generate(item)  # from the first token on, whatever of the prompts was kept
        np.testing.assert_allclose(after.logprobs, expected_logprobs(policy, after, weights), atol=1e-4)
        np.testing.assert_allclose(second_pass(engine, after), after.logprobs, atol=1e-4)
        assert (after.version, set(after.versions.tolist())) == (3, {3})


def test_rollouts_are_well_formed(opened, policy):
    eos = load_tokenizer(str(policy), "policy.path").eos_token_id
    with opened() as engine:
        rollouts = engine.generate(WorkItem(5, PROMPTS, samples=3, seed=3))
        chat = engine.dialogue.chat
        assert (rollouts.item, rollouts.seed, rollouts.temperature) == (5, 3, TEMPERATURE)
        assert rollouts.group.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
        for b, text in enumerate(rollouts.texts):
            tokens = rollouts.tokens[b]
            assert (tokens[-1] == eos) == rollouts.finished[b]
            assert eos not in tokens[:-1]
            assert rollouts.finished[b] or len(tokens) == NEW
            assert chat.tokenizer.decode(tokens[:-1] if rollouts.finished[b] else tokens) == text
        assert rollouts.prompt_tokens[1].tolist() == chat.prompt_tokens(PROMPTS[1])


def test_a_work_item_gives_the_same_whatever_is_beside_or_before_it(opened):
    items = [WorkItem(i, PROMPTS[i:], samples=3, seed=i) for i in range(3)]
    with opened() as engine:
        alone = [engine.generate(item) for item in items]
        assert engine.generate(replace(items[0], seed=12)).texts != alone[0].texts
        again = engine.generate(items[0])
        assert again.texts == alone[0].texts
        np.testing.assert_allclose(again.logprobs, alone[0].logprobs, atol=2e-5)
        assert len({again.tokens[b].tobytes() for b in range(3)}) > 1  # a prompt's samples are not alike
    with opened(slots=4) as engine:
        tickets = [engine.submit(item) for item in items[:2]]
        found = {}
        for _ in range(4):
            found |= dict(engine.advance())
        tickets.append(engine.submit(items[2]))
        found |= finish(engine)
    for ticket, expected in zip(tickets, alone, strict=True):
        assert found[ticket].texts == expected.texts
        np.testing.assert_allclose(found[ticket].logprobs, expected.logprobs, atol=2e-5)


def test_first_tokens_follow_the_policy(opened, policy):
    """Frequencies of first tokens, in bins of a few or many tokens, against the softmax at the temperature, by a
    chi-square test."""
    with opened() as engine:
        rollouts = engine.generate(WorkItem(0, PROMPTS[:1], samples=DRAWS, seed=5))
        prompt = torch.tensor([engine.dialogue.chat.prompt_tokens(PROMPTS[0])])
    drawn = np.array([rollouts.tokens[b][0] for b in range(DRAWS)])
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(policy)(input_ids=prompt).logits[0, -1]
    p = torch.softmax(logits.double() / TEMPERATURE, -1).numpy()
    bins = np.random.default_rng(0).permutation(len(p)) % 12
    expected = np.bincount(bins, p, minlength=12) * DRAWS
    bins[expected[bins] < 5] = 12  # the test needs a few expected counts in each bin
    expected = np.bincount(bins, p, minlength=13) * DRAWS
    kept = expected > 0
    assert kept.sum() > 4
    assert chisquare(np.bincount(bins[drawn], minlength=13)[kept], expected[kept]).pvalue > 1e-4


def test_new_weights_in_the_middle_of_a_response(opened, policy):
    """Each token is told the weights that its probability is of: an engine may let the next one be of the old."""
    weights = weights_of(policy, noise=0.05)
    with opened() as engine:
        ticket = engine.submit(WorkItem(0, PROMPTS, samples=2, seed=1))
        for _ in range(3):
            assert not engine.advance()
        engine.set_weights(weights, 7)
        later = engine.submit(WorkItem(1, PROMPTS, samples=2, seed=1))
        found = finish(engine)
    spans, after = found[ticket], found[later]
    assert (spans.version, after.version) == (0, 7)
    assert set(after.versions.tolist()) == {7}
    before = np.concatenate([np.arange(length) < 3 for length in spans.tokens.lengths])
    assert (spans.versions[before] == 0).all()
    old = spans.versions == 0
    assert set(spans.versions.tolist()) == {0, 7}
    for b in range(spans.responses):
        own = spans.versions[spans.tokens.offsets[b] : spans.tokens.offsets[b + 1]]
        assert (np.diff(own) >= 0).all()
    np.testing.assert_allclose(spans.logprobs[old], expected_logprobs(policy, spans)[old], atol=1e-4)
    np.testing.assert_allclose(after.logprobs, expected_logprobs(policy, after, weights), atol=1e-4)


def test_a_prompt_without_room_is_refused(opened):
    long = [{"role": "user", "content": "tea " * 120}]
    with (
        opened() as engine,
        pytest.raises(
            ValueError, match=r"rollout.max_new_tokens=12 exceed the policy's 128 positions: .*tea tea"
        ),
    ):
        engine.submit(WorkItem(0, (long,), samples=1, seed=0))


def test_weights_that_do_not_fit_or_are_no_numbers_are_refused(opened, policy):
    weights = weights_of(policy)
    name = "model.norm.weight"
    with opened() as engine:
        for wrong in ({n: w for n, w in weights.items() if n != name}, weights | {"extra": weights[name]}):
            with pytest.raises(
                ValueError, match=r"weights of version 2 do not fit the policy: .*(norm|extra)"
            ):
                engine.set_weights(wrong, 2)
        engine.set_weights(weights | {name: weights[name] * float("nan")}, 3)
        engine.submit(WorkItem(0, PROMPTS, samples=2, seed=1))
        with pytest.raises(ValueError, match=r"policy of version 3: .*not numbers"):
            finish(engine)


def test_rest_changes_nothing_of_what_comes_after(opened, policy):
    items = [WorkItem(n, PROMPTS, samples=2, seed=n) for n in range(3)]
    with opened() as engine:
        engine.set_weights(weights_of(policy, noise=0.1), 1)
        expected = [engine.generate(item) for item in items]
    with opened() as engine:
        engine.rest()
        engine.rest()
        engine.set_weights(weights_of(policy, noise=0.1), 1)
        found = []
        for item in items:
            engine.rest()
            found.append(engine.generate(item))
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens.values.tolist() == theirs.tokens.values.tolist()
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=1e-6)


def test_settings_that_no_engine_has_are_refused(opened, request):
    kind = request.node.callspec.params["opened"]
    rollout = rollout_of(kind, no_such_setting=1)
    with pytest.raises(ValueError, match=r"rollout.options.*no_such_setting"):
        engine_class(rollout).check(rollout, 0)


def test_an_engine_that_is_none_is_refused():
    with pytest.raises(
        ValueError, match=r"rollout.engine=llm is not one of embedded, vllm, nor package.module:Class"
    ):
        engine_class(rollout_of("llm"))
    with pytest.raises(
        ValueError, match=r"rollout.engine=json:dumps is no subclass of rlhf.generate.engine.Engine"
    ):
        engine_class(rollout_of("json:dumps"))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is here")
def test_vllm_that_is_not_installed_is_told_before_the_run():
    rollout = rollout_of("vllm")
    with pytest.raises(ValueError, match=r"rollout.engine=vllm: vLLM cannot be imported .*README"):
        engine_class(rollout).check(rollout, 0)


@pytest.mark.skipif(find_spec("vllm") is None, reason="no vLLM here")
def test_settings_of_vllm_are_checked_before_the_run(monkeypatch):
    from rlhf.generate import vllm_engine

    for options, gpus, line in (
        ({"seed": 3}, 0, r"rollout.options.seed is set by other keys"),
        (
            {"tensor_parallel_size": 2},
            1,
            r"tensor_parallel_size=2 needs as many GPUs .* resources.generators.gpus=1",
        ),
        ({}, 0.25, r"generators.gpus=0.25: .* give rollout.options.gpu_memory_utilization"),
    ):
        rollout = rollout_of("vllm", **options)
        with pytest.raises(ValueError, match=line):
            engine_class(rollout).check(rollout, gpus)
    version = vllm_engine.importlib.metadata.version
    monkeypatch.setattr(
        vllm_engine.importlib.metadata, "version", lambda n: "5.23.0" if n == "transformers" else version(n)
    )
    with pytest.raises(ValueError, match=r"goes with transformers .*, and 5.23.0 is installed"):
        engine_class(rollout_of("vllm")).check(rollout_of("vllm"), 0)
