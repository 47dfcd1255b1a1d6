"""Rewards of every family of sequence classifiers, against transformers on one conversation at a time."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification

from rlhf.models.classifier import Classifier, one_batch, score_rows
from rlhf.models.load import head_of, new_reward_model, usable_positions
from rlhf.models.precision import cast
from tests.classifiers import FAMILIES, VOCABULARY, classifier
from tests.tiny import save_policy

END = 1


@torch.no_grad()
def plain(model, rows):
    """The model's own rewards, each of its conversation alone."""
    ids = [torch.as_tensor(np.asarray(row)[None]) for row in rows]
    return np.array([model(input_ids=i, attention_mask=torch.ones_like(i)).logits.item() for i in ids])


def conversations(longest, end=(END,), seed=0):
    """Two prompts with three responses each; they end with `end`, and have no such token elsewhere."""
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, VOCABULARY, size=n) for n in (6, longest // 2)]
    rows = [
        np.concatenate([prompt, rng.integers(3, VOCABULARY, size=n), end])
        for prompt in prompts
        for n in (3, 7, longest // 2 - len(end))
    ]
    return rows, [0, 0, 0, 1, 1, 1]


@torch.no_grad()
def check(model, rows, kin, atol=1e-4):
    expected = plain(model, rows)
    made = Classifier(model)
    atol *= max(1.0, np.abs(expected).max())
    np.testing.assert_allclose(score_rows(made, made, rows, kin, 50), expected, atol=atol)
    if made.apart or made.pads:
        np.testing.assert_allclose(
            one_batch(made, rows, kin).scores(made, next(model.parameters())), expected, atol=atol
        )
    return made


@pytest.mark.parametrize("family", FAMILIES)
def test_rewards_are_the_models_own(family):
    """The padding token is the end token: what most users of causal models give. Encoders have one of their own."""
    model = classifier(family, pad=END)
    if isinstance(getattr(model, "score", None), torch.nn.Linear):
        rows, kin = conversations(20, end=(END, END))
        rows[1][-2] = END + 3  # one of them once, and
        rows[4][:] = END  # one of nothing else
        rows[5][5] = END
        assert check(model, rows, kin).apart
    else:
        check(classifier(family, pad=0), *conversations(20))


DECODERS = [
    "llama",
    "gpt2",
    "opt",
    "gpt_neox",
    "bloom",
    "mpt",
    "gemma2",
    "qwen3",
    "ctrl",
    "falcon",
]


@pytest.mark.parametrize("pad", [None, 0, END, 57])
@pytest.mark.parametrize("family", DECODERS)
def test_rewards_under_any_padding_token(family, pad):
    rows, kin = conversations(20)
    if pad is not None:
        rows[0][-3:], rows[2][-1:] = pad, pad
    made = check(classifier(family, pad), rows, kin)
    assert made.packs == (family in ("llama", "gpt2", "opt", "gpt_neox", "gemma2", "qwen3"))


@pytest.mark.parametrize("pad", [None, END])
@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 12}),
        ("gemma2", {"sliding_window": 12}),
        ("qwen3", {}),
        ("gpt_neox", {}),
        ("opt", {}),
    ],
)
@torch.no_grad()
def test_bfloat16_rewards_are_as_near_as_the_models_own(family, changes, pad):
    """Also beyond the window, and with some conversations within it in the same batch."""
    model = classifier(family, pad, **changes)
    several = [conversations(30, seed=seed) for seed in range(8)]
    rows = [row for part, _ in several for row in part]
    kin = [10 * seed + k for seed, (_, part) in enumerate(several) for k in part]
    exact, rounded = plain(model, rows), copy.deepcopy(model)
    cast(rounded, torch.bfloat16)
    theirs = np.abs(plain(rounded, rows) - exact).mean()
    made = Classifier(model)
    made.compute_in(torch.bfloat16)
    ours = np.abs(score_rows(made, made, rows, kin, 4096).numpy() - exact).mean()
    assert head_of(model).weight.dtype == torch.float32
    assert 0 < ours <= 1.5 * theirs


def test_longrope_conversations_share_no_call_across_the_switch():
    """Frequencies of a call are chosen by its longest row."""
    factors = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 24}
    model = classifier("phi3", END, rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, **factors})
    rows, kin = conversations(40)
    assert {len(row) > 24 for row in rows} == {True, False}
    assert check(model, rows, kin).packs


@pytest.mark.parametrize("pad", [None, END])
def test_a_new_reward_model_scores_elsewhere_as_here(tmp_path, pad):
    """What is trained on is what plain transformers reads after save_pretrained."""
    start = save_policy(tmp_path / "policy", pad_token_id=None, vocab_size=VOCABULARY)
    made = Classifier(new_reward_model(str(start), "reward_models.helpful.init_from", 0, pad))
    rows, kin = conversations(20)
    torch.nn.init.normal_(made.inner.score.weight)
    made.inner.save_pretrained(tmp_path / "made")
    elsewhere = AutoModelForSequenceClassification.from_pretrained(tmp_path / "made").eval()
    assert elsewhere.config.pad_token_id == pad
    with torch.no_grad():
        np.testing.assert_allclose(score_rows(made, made, rows, kin, 4096), plain(elsewhere, rows), atol=1e-4)


def test_positions_that_a_model_cannot_use_are_not_offered():
    """RoBERTa's first position is the one after its padding token's id."""
    model, ids = classifier("roberta", pad=1), torch.full((1, 129), 5)
    longest = usable_positions(model)
    assert longest == 126
    model(input_ids=ids[:, :longest])
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(input_ids=ids[:, : longest + 1])
    assert usable_positions(classifier("xlnet", pad=0)) is None
