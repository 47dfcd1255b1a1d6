"""Packed scoring against transformers on one conversation at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    MistralConfig,
    MistralForSequenceClassification,
)

from rlhf.models.classifier import Classifier, score_rows
from rlhf.models.conversations import split
from rlhf.models.load import load_reward_model
from rlhf.models.reward import RewardScorer
from tests.tiny import save_reward_model


@pytest.mark.parametrize("budget", [1, 40, 4096])
@torch.no_grad()
def test_packed_scores_equal_single_forward_passes(reward_folders, budget):
    model = load_reward_model(str(reward_folders["helpful"]), "key")
    rng = np.random.default_rng(0)
    prompts = [rng.integers(2, 20, size=n) for n in (6, 1, 9)]
    rows = [np.concatenate([p, rng.integers(2, 20, size=n)]) for p in prompts for n in (3, 1, 7, 7)]
    kin = np.repeat([0, 1, 2], 4).tolist()
    expected = [model(input_ids=torch.tensor(row[None])).logits.item() for row in rows]
    classifier = Classifier(model)
    assert classifier.packs
    np.testing.assert_allclose(score_rows(classifier, classifier, rows, kin, budget), expected, atol=2e-5)
    classifier.packs = False
    np.testing.assert_allclose(score_rows(classifier, classifier, rows, kin, budget), expected, atol=2e-5)


@torch.no_grad()
def test_conversations_longer_than_a_sliding_window_are_scored_plainly():
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=30,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=16,
        num_labels=1,
        pad_token_id=0,
        initializer_range=0.3,
    )
    model = MistralForSequenceClassification(config).eval()
    classifier, rng = Classifier(model), np.random.default_rng(0)
    assert classifier.packs
    for longest in (16, 30):
        start = rng.integers(2, 30, size=4)
        rows = [np.concatenate([start, rng.integers(2, 30, size=n)]) for n in (2, longest - 4, 1)]
        expected = [model(input_ids=torch.tensor(row[None])).logits.item() for row in rows]
        np.testing.assert_allclose(
            score_rows(classifier, classifier, rows, [0, 0, 0], 4096), expected, atol=2e-5
        )


def test_a_bidirectional_classifier_is_scored_plainly_and_that_is_said_once(caplog):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=30, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_labels=1
    )
    classifier = Classifier(BertForSequenceClassification(config).eval())
    assert not classifier.packs
    assert [record.getMessage() for record in caplog.records] == [
        "BertForSequenceClassification: conversations are padded, as its head does not read one token alone"
    ]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=6), min_size=1, max_size=8))
def test_split_rows_join_to_the_rows(rows):
    kin = [len(rows) // 2 > i for i in range(len(rows))]
    shared, own, group = split(rows, kin)
    assert [[*shared[g], *own[i]] for i, g in enumerate(group)] == rows
    assert (own.lengths > 0).all()


def test_scorer_renders_by_its_own_template_and_tokenizer(reward_folders):
    """Text in, reward out: the same as apply_chat_template and a forward pass by hand."""
    from transformers import AutoTokenizer

    scorer = RewardScorer("helpful", str(reward_folders["helpful"]))
    contents = [[{"role": "user", "content": "what is tea ?"}]] * 2 + ["what is"]
    rewards = scorer.score(contents, ["good .", "bad bread", " tea"])
    tokenizer = AutoTokenizer.from_pretrained(reward_folders["helpful"])
    model = AutoModelForSequenceClassification.from_pretrained(reward_folders["helpful"]).eval()
    chats = [[*contents[0], {"role": "assistant", "content": t}] for t in ("good .", "bad bread")]
    texts = [tokenizer.apply_chat_template(c, tokenize=False) for c in chats] + ["what is tea<eos>"]
    with torch.no_grad():
        ids = [tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids for text in texts]
        expected = [model(input_ids=i).logits.item() for i in ids]
    np.testing.assert_allclose(rewards, expected, atol=1e-5)


def test_two_labels_are_refused(tmp_path):
    save_reward_model(tmp_path, seed=0, labels=2)
    with pytest.raises(
        ValueError, match=r"reward model 'harmless': path=.* has 2; name those that are rewards"
    ):
        RewardScorer("harmless", str(tmp_path))


def test_no_response_no_reward(reward_folders):
    assert RewardScorer("helpful", str(reward_folders["helpful"])).score([], []).shape == (0,)


def test_too_long_a_conversation_is_refused(reward_folders):
    scorer = RewardScorer("helpful", str(reward_folders["helpful"]))
    with pytest.raises(ValueError, match="'helpful' takes 128 tokens, but prompt and response have 2"):
        scorer.score(["tea " * 200], ["yes"])


def test_responses_to_one_prompt_share_it():
    """However short the prompt, and where responses begin alike too."""
    rows = [[1, 2, 3, 9, 9, 9, 9, 9, 9], [1, 2, 3, 8], [1, 2, 3, 9, 7], [1, 2, 4]]
    shared, own, group = split(rows, [0, 0, 0, 1])
    assert group.tolist() == [0, 0, 0, 1]
    assert shared[0].tolist() == [1, 2, 3]
    assert own.lengths.tolist() == [6, 1, 2, 1]
    assert shared[1].tolist() == [1, 2]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_of_a_scorer_are_packed_for_the_processor(reward_folders, dtype):
    """All but its head, which stays float32; with rewards as of its own passes, to rounding."""
    scorer = RewardScorer("helpful", str(reward_folders["helpful"]), dtype=dtype)
    inner = scorer.classifier.inner
    assert [name for name, m in inner.named_modules() if type(m) is torch.nn.Linear] == ["score"]
    assert inner.score.weight.dtype == torch.float32
    rows = [np.arange(2, 12), np.arange(3, 9)]
    plain = load_reward_model(str(reward_folders["helpful"]), "key")
    with torch.no_grad():
        expected = [plain(input_ids=torch.tensor(row[None])).logits.item() for row in rows]
        found = score_rows(scorer.classifier, scorer.classifier, rows, [0, 1], 64)
    np.testing.assert_allclose(found, expected, atol=1e-4 if dtype == "float32" else 0.05)
