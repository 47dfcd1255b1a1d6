"""A classifier as a source: several labels for one forward pass, and the keys of heads."""

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.config_checks import typed
from rlhf.sources.classifier import ClassifierSource
from rlhf.sources.source import Batch, Place, as_columns, rewards_of
from rlhf.types import Prompt
from tests.tiny import save_reward_model

GIVEN = ["data=files", "data.prompts=p.jsonl", "policy.path=p", "reward_models=none"]
NAMED = {"id2label": {0: "helpful", 1: "curt", 2: "safe"}, "label2id": {"helpful": 0, "curt": 1, "safe": 2}}


def sources(*overrides: str):
    with initialize_config_module("conf", version_base=None):
        return typed(compose("config", overrides=[*GIVEN, *overrides])).reward_models


def armo(folder, heads: str, *more: str) -> ClassifierSource:
    given = (
        "+source@reward_models.armo=classifier",
        f"reward_models.armo.path={folder}",
        f"+reward_models.armo.heads={heads}",
    )
    return sources(*given, *more)["armo"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_reward_model(tmp_path_factory.mktemp("labels"), seed=3, labels=3, **NAMED))


PROMPTS = ["what is tea ?", "what is tea ?", [{"role": "user", "content": "how do i make bread ?"}], "a"]
RESPONSES = ["good bread .", "yes", "no bad tea", "the lock is good"]


def by_transformers(folder: str) -> np.ndarray:
    """The logits of each conversation alone, float32 [B, 3]."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    rows = []
    for prompt, response in zip(PROMPTS, RESPONSES, strict=True):
        if isinstance(prompt, str):
            ids = [*tokenizer(f"{prompt}{response}")["input_ids"], tokenizer.eos_token_id]
        else:
            talk = [*prompt, {"role": "assistant", "content": response}]
            ids = tokenizer.apply_chat_template(talk, return_dict=False)
        with torch.no_grad():
            rows.append(model(input_ids=torch.tensor([ids])).logits[0].numpy())
    return np.stack(rows)


def test_all_heads_come_of_one_forward_pass_and_are_those_of_transformers(folder):
    opened = armo(folder, "{kind: safe, brief: 1}").open("armo", Place())
    passes = []
    body = opened._scorer.classifier.inner.base_model
    body.register_forward_hook(lambda *_: passes.append(1))
    found = as_columns(opened.score(Batch(PROMPTS, RESPONSES)))
    assert len(passes) == 1
    expected = by_transformers(folder)[:, [2, 1]]
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=0)
    assert np.abs(expected).max() > 0.1


def test_a_classifier_without_heads_must_have_one_label(folder):
    given = ("+source@reward_models.armo=classifier", f"reward_models.armo.path={folder}")
    with pytest.raises(ValueError, match=r"armo.path=.* has 3; name those that are rewards \(heads: "):
        sources(*given)["armo"].preflight("reward_models.armo", [Prompt("a")])


def test_heads_are_rewards_of_their_own(folder):
    found = armo(folder, "{kind: safe, brief: {label: 1, weight: 2.0, reference: mean}}", "utility=linear")
    rewards = rewards_of({"armo": found})
    assert list(rewards) == ["kind", "brief"]
    assert [own.label for own in rewards.values()] == ["safe", 1]
    assert [own.weight for own in rewards.values()] == [1.0, 2.0]
    assert [own.rule(0.85, "empirical").kind for own in rewards.values()] == ["quantile", "mean"]
    assert rewards["kind"].identity() != rewards["brief"].identity()


@pytest.mark.parametrize(
    ("heads", "line"),
    [
        (
            "{kind: 3}",
            r"reward_models.armo.heads.kind=3 is no label of .*, which has 0 \(helpful\), 1 \(curt\)",
        ),
        ("{kind: nice}", r"reward_models.armo.heads.kind=nice is no label of "),
        ("{kind: -1}", r"reward_models.armo.heads.kind=-1 is no label of "),
    ],
)
def test_a_label_that_is_not_there_is_refused(folder, heads, line):
    with pytest.raises(ValueError, match=line):
        armo(folder, heads).preflight("reward_models.armo", [Prompt("a")])


@pytest.mark.parametrize(
    ("heads", "line"),
    [
        ("{}", "reward_models.armo.heads is empty"),
        ("{kind: 1.5}", r"reward_models.armo.heads.kind=1.5 must be a label of the classifier"),
        ("{kind: true}", r"reward_models.armo.heads.kind=True must be a label"),
        ("{kind: {weight: 2}}", r"reward_models.armo.heads.kind=\{'weight': 2\} must be a label"),
        (
            "{kind: {label: 1, size: 2}}",
            r"reward_models.armo.heads.kind.size is unknown; a head takes label, ",
        ),
        ("{joint: 1}", r"reward_models.armo.heads.joint: 'joint' is taken"),
        ("{kind: {label: 1, scale: verdict}}", r"heads.kind.error_rate=0: a verdict that is never wrong"),
    ],
)
def test_heads_that_cannot_be_are_refused(heads, line):
    with pytest.raises(ValueError, match=line):
        armo("x", heads)


def test_two_rewards_of_one_name_are_refused():
    with pytest.raises(
        ValueError, match=r"reward_models.kind and reward_models.armo.heads.kind give rewards of one"
    ):
        armo("x", "{kind: 1}", "+source@reward_models.kind=classifier", "reward_models.kind.path=y")
