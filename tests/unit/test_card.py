"""The model card: true for every configuration, without a path of the machine, read by huggingface_hub."""

from __future__ import annotations

import pytest
from huggingface_hub import ModelCard

from rlhf.evaluate.report import write_report
from rlhf.learn.advantages import ADVANTAGES
from rlhf.publish import method
from rlhf.publish.card import write_card
from rlhf.sources.source import rewards_of
from rlhf.utility.kinds import COMBINATION_KINDS, TRANSFORM_KINDS
from tests.tiny import save_policy
from tests.unit.test_config import GDPO, GIVEN, config
from tests.unit.test_report import record

CHOICES = {
    "the default": [],
    **{
        name: [f"utility={name}"]
        for name in (
            "linear", "centered_linear", "log_sigmoid", "sigmoid", "par", "quantile_rank", "zscore", "zscore_global",
            "min_max", "clip", "tanh", "inada", "product", "softmin", "worst_case",
        )
    },
    **{name: [f"algorithm={name}"] for name in ("ppo", "grpo", "dr_grpo", "reinforce_pp")},
    "gdpo": GDPO,
    "gaussian": ["baseline=gaussian", "baseline.tolerance=0.1"],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_policy(tmp_path_factory.mktemp("here") / "policy")


def written(folder, tmp_path, *overrides: str, **changes: object) -> ModelCard:
    found = config(*overrides)
    scales = {name: own.unit for name, own in rewards_of(found.reward_models).items()}
    summary = write_report(record(), tmp_path) | changes
    write_card(folder, found, summary, scales, steps=20)
    return ModelCard.load(folder / "README.md")


def test_every_choice_has_words():
    assert method.TRANSFORMS.keys() == TRANSFORM_KINDS.keys()
    assert method.COMBINATIONS.keys() == COMBINATION_KINDS.keys()
    assert method.ADVANTAGES.keys() == ADVANTAGES.keys()


@pytest.mark.parametrize("overrides", CHOICES.values(), ids=CHOICES)
def test_a_card_of_every_choice(folder, tmp_path, overrides):
    text = written(folder, tmp_path, *GIVEN, *overrides).content
    for place in (str(folder.parent), str(tmp_path), "None", "{", "nan"):
        assert place not in text.partition("```")[0], place
    assert "20 steps of 32 prompts with 8 responses each" in text


def test_the_default(folder, tmp_path):
    card = written(folder, tmp_path)
    data = card.data.to_dict()
    assert data == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["rlhf"]}
    for said in (
        "# Aligned policy",
        "aligned to `helpful` and `harmless`",
        "- Each reward `r` becomes a utility: `u = log sigmoid(r - r_ref)`, the log-probability that",
        "- What is maximised is the logical AND: good in every property (of helpful, harmless).",
        "was subtracted from the reward, with the coefficient 0.3.",
        "REINFORCE with the mean of the prompt's other responses as baseline",
        "| helpful | classifier, trained with this policy | bradley_terry | 85 % quantile of ",
        "| harmless | classifier, trained with this policy | bradley_terry | mean reward of canned responses | 1 |",
        "Judged by the reward models that it was trained on, on 2 held-out prompts with 2 responses each.",
        "can be over-optimisation",
        "| joint | 25 % | 50 % |",
        "KL divergence from the base policy: 2.50 nats a response (standard error 1.00).",
        "tokenizer.apply_chat_template(",
        'name = "."',
    ):
        assert said in card.content, said
    assert "adapter" not in card.content


def test_what_is_given_by_the_hub_is_named_and_what_is_a_path_is_not(folder, tmp_path):
    data = tmp_path / "prompts.jsonl"
    data.write_text('{"prompt": "a"}\n')
    given = [
        "data=files", f"data.prompts=[{data},owner/prompts@main:train]", "policy.path=owner/model",
        f"reward_models.helpful.path={folder}", "reward_models.harmless.path=owner/rm",
        "reward_models.helpful.calibration=owner/pairs", "hub={repo: me/aligned, license: apache-2.0}",
        "policy.lora={rank: 4, alpha: 8, target_modules: all-linear}", "policy.chat_template=hh",
        "align.kl_coef=[[0,0.4],[9,0.1]]", "algorithm.kl_target=3", "utility.combine='helpful & ~harmless'",
    ]  # fmt: skip
    card = written(folder, tmp_path, *given)
    assert card.data.base_model == "owner/model"
    assert card.data.datasets == ["owner/prompts", "owner/pairs"]
    assert card.data.license == "apache-2.0"
    assert str(tmp_path) not in card.content
    for said in (
        "# aligned",
        "This is [owner/model](https://huggingface.co/owner/model), aligned to",
        "the expression `helpful & ~harmless` of the properties",
        "a coefficient that goes, by steps, through [[0, 0.4], [9, 0.1]] to begin with, adapted to reach 3 nats",
        "They are merged into the weights here; `adapter/` has them apart.",
        "that of hh-rlhf's transcripts",
        'name = "me/aligned"',
    ):
        assert said in card.content, said
    kept = written(folder, tmp_path, *given, f"policy.path={folder}")
    assert kept.data.base_model is None
    assert "This is a language model, aligned to" in kept.content


def test_other_rewards_no_penalty_and_a_step_that_was_chosen(folder, tmp_path):
    given = [
        *GIVEN, "reward_models=none", "+source@reward_models.right=function", "reward_models.right.path=json:dumps",
        "reward_models.right.scale=verdict", "align.kl_coef=0",
    ]  # fmt: skip
    given = [one for one in given if not one.startswith(("reward_models.helpful", "reward_models.harmless"))]
    text = written(folder, tmp_path, *given, chosen_step=12, stopped_early="the win rate fell").content
    for said in (
        "There is one reward, so its utility is what is maximised.",
        "There was no KL penalty.",
        "| right | function | verdict, error rate 0.05 | none: the scale has a zero of its own | 1 |",
        "These weights are of step 12",
        "Training ended early: the win rate fell.",
    ):
        assert said in text, said


def test_the_code_in_the_card_runs(folder, tmp_path, monkeypatch, capsys):
    content = written(folder, tmp_path).content
    code = content.partition("```python\n")[2].partition("```")[0]
    monkeypatch.chdir(folder)
    exec(code.replace("max_new_tokens=256", "max_new_tokens=4"), {})
    assert capsys.readouterr().out
