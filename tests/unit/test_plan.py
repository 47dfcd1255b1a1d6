"""What `rlhf plan` says before a run, against what real models take and against closed forms."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from actors.plan import short
from actors.preflight import preflight
from actors.stages.stage import Stages
from rlhf.config import Config, DeepSpeedConfig, LoraConfig
from rlhf.learn.logprobs import PolicyModel, token_logprobs
from rlhf.learn.recompute import recompute_layers
from rlhf.models import precision
from rlhf.models.lora import with_adapter
from rlhf.plan.live import Live
from rlhf.plan.memory import LEARNER, VERSIONS, Need, learner, object_store
from rlhf.plan.models import Outline, Sizes
from rlhf.plan.report import lines, node
from rlhf.plan.roles import Plan, plan
from rlhf.plan.times import Steps, estimate
from rlhf.plan.work import Work
from rlhf.store import Store
from tests import tiny
from tests.ranks import config as model_config
from tests.unit.test_config import config

WORK = Work((12, 20, 9, 20), 24, 3, 4, 3, 4, 1, 4096, 64, 0)


def settings(stage: int = 0, recompute: bool = False) -> DeepSpeedConfig:
    return DeepSpeedConfig(stage, "float32", 4096, False, recompute)


def wide(kind: str = "Llama", **changes: Any) -> Any:
    return model_config(
        kind, **{"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, **changes}
    )


def real_peak(given: Any, dtype: torch.dtype, recompute: bool, lora: LoraConfig | None) -> int:
    """Bytes that the passes of `WORK` take at most, as PyTorch makes the tensors of a model that is there."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(given).eval()
    policy = PolicyModel(model if lora is None else with_adapter(model, lora, 0))
    precision.cast(policy, dtype)
    if recompute:
        recompute_layers(policy)
    policy.zero_grad()
    batches = WORK.micro_batches()
    token_logprobs(policy, batches[0]).sum().backward()  # masks are made once
    policy.zero_grad()
    with Live() as live:
        live.leave_out(policy)
        for batch in batches:
            token_logprobs(policy, batch).sum().backward()
    return live.peak


LORA = LoraConfig(4, 8, "all-linear")
KINDS = [
    ("Llama", torch.float32, False, None),
    ("Llama", torch.float32, True, None),
    ("Llama", torch.float32, False, LORA),
    ("Llama", torch.bfloat16, False, None),
    ("Llama", torch.bfloat16, True, None),
    ("Qwen3", torch.float32, False, None),
    ("Mistral", torch.float32, False, None),
]


@pytest.mark.parametrize(("kind", "dtype", "recompute", "lora"), KINDS)
def test_passes_take_what_they_take_of_a_real_model(kind, dtype, recompute, lora):
    given = wide(kind, head_dim=32)
    expected = real_peak(given, dtype, recompute, lora)
    found = Outline(given, AutoModelForCausalLM, dtype, lora).training_peak(WORK.micro_batches(), recompute)
    assert found == pytest.approx(expected, rel=0.05)


def test_recomputing_takes_less():
    outline = Outline(wide(num_hidden_layers=12), AutoModelForCausalLM, torch.float32)
    batches = WORK.micro_batches()
    kept, again = (outline.training_peak(batches, recompute) for recompute in (False, True))
    assert again < kept / 2


def test_live_memory_is_that_of_tensors_that_are_there():
    with Live() as live:
        x = torch.empty(1000, device="meta")
        views = x.view(10, 100), x[5:]
        assert live.now == 4000
        y = x + 1
        assert live.now == 8000
        del x, views
        assert live.now == 4000
        z = y.bfloat16()
        del y
    assert (live.now, live.peak) == (2000, 8000)
    assert z.numel() == 1000


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_are_those_of_the_real_model(tied):
    given = wide(tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(given)
    found = Outline(given, AutoModelForCausalLM, torch.float32).sizes
    head = 500 * 64
    assert found.every == sum(p.numel() for p in model.parameters())
    assert found.tied == (head if tied else 0)
    attention, mlp = 64 * 64 * 2 + 2 * 64 * 32, 3 * 64 * 128
    assert found.linear == 4 * (attention + mlp) + (0 if tied else head)
    assert Sizes.of(model) == found


def test_tokens_of_a_step_are_those_of_its_batches():
    work = replace(WORK, prompt_lengths=(20,) * 4)
    assert work.step_tokens == sum(batch.input_ids.numel() for batch in work.micro_batches())
    assert work.step_tokens == 3 * (20 + 4 * 23)
    small = replace(work, budget=70).micro_batches()
    assert len(small) > 3
    assert max(batch.input_ids.numel() for batch in small) <= 70
    halves = replace(work, prompts=4, ranks=2).micro_batches()
    assert sum(batch.input_ids.numel() for batch in halves) == 2 * (20 + 4 * 23)


def test_a_generator_has_as_many_rows_as_its_work_and_slots_allow():
    assert WORK.rows == 12
    assert replace(WORK, slots=5).rows == 5
    assert replace(WORK, most_samples=10).rows == 30
    assert replace(WORK, prompts=6, staleness=1).rows == 24


@pytest.mark.parametrize(
    ("stage", "ranks", "shared"), [(0, 1, 1), (0, 4, 1), (1, 4, 4), (2, 4, 4), (3, 4, 4)]
)
def test_what_ranks_share_is_divided(stage, ranks, shared):
    outline = Outline(wide(), AutoModelForCausalLM, torch.float32)
    every = outline.sizes.every
    own = learner(outline, "p", False, replace(WORK, ranks=ranks), settings(stage), True).own
    assert own["Adam's moments"] == 8 * every // shared
    assert own["checkpoint's copy"] == 12 * every // ranks
    assert own["weights"] == 4 * every // (ranks if stage == 3 else 1)
    assert own.get("float32 weights", 0) == (4 * every // shared if stage else 0)
    assert own["reference policy"] == own["published weights"] == 4 * every
    assert own["process"] == LEARNER


def test_adapters_need_no_reference_and_leave_frozen_weights_in_their_file():
    outline = Outline(wide(), AutoModelForCausalLM, torch.float32, LORA)
    need = learner(outline, "p", True, WORK, settings(), True)
    layer = 4 * sum(
        a + b for a, b in [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    )
    assert outline.trained == 4 * layer
    assert "reference policy" not in need.own
    assert need.own["weights"] == 4 * outline.trained
    assert need.own["Adam's moments"] == 8 * outline.trained
    assert need.files == {"p": 4 * outline.sizes.every}
    assert object_store(outline) == VERSIONS * 4 * outline.sizes.every


@pytest.fixture
def given(tmp_path: Path) -> Any:
    """`given(*overrides)` is the configuration of a run with tiny models, whose weights are removed."""
    folders = {"policy": tiny.save_policy(tmp_path / "policy")}
    folders |= {n: tiny.save_reward_model(tmp_path / n, seed=1) for n in ("helpful", "harmless")}
    for folder in folders.values():
        (folder / "model.safetensors").unlink()
    rows = [{"prompt": [{"role": "user", "content": f"what is {word} ?"}]} for word in tiny.WORDS[2:14]]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def make(*overrides: str) -> Config:
        values = [
            "data=files",
            f"data.prompts={tmp_path / 'prompts.jsonl'}",
            "data.eval_size=2",
            f"policy.path={folders['policy']}",
            *(f"reward_models.{name}.path={folders[name]}" for name in ("helpful", "harmless")),
            "align.prompts_per_step=4",
            "rollout.prompts_per_item=4",
            f"output_dir={tmp_path / 'out'}",
        ]
        return config(*values, *overrides)

    return make


def planned(made: Config) -> Plan:
    store = Store(Path(made.output_dir) / "store")
    return plan(made, preflight(made, store, here=False), store)


def test_models_are_planned_by_their_configurations_alone(given):
    found = planned(given("resources.generators.count=2", "plan.response_tokens=10"))
    counts = {need.role: need.count for need in found.needs}
    models = {f"reward_models.{name}": 1 for name in ("helpful", "harmless")}
    services = dict.fromkeys(("driver", "baseline", "queue", "reward ingress", "serve controller"), 1)
    assert counts == {"learner rank": 2, "generator": 2, **models, **services}
    assert found.work.response_tokens == 10
    assert found.own == sum(need.total * need.count for need in found.needs)
    assert found.total == found.own + found.store + found.files
    assert len({path for need in found.needs for path in need.files}) == 3  # a file is there once
    text = lines(found)
    assert text[1].startswith("a step: 4 prompts (mean ")
    assert any(line.startswith("learner rank") and " 2 x " in line for line in text)


def test_a_policy_that_is_made_here_has_the_architecture_of_the_configuration(tmp_path):
    made = config("experiment=quick", f"output_dir={tmp_path}", "policy.architecture.layers=3")
    found = planned(made)
    assert found.parameters["policy"] > 3 * (4 * 128**2 + 3 * 128 * 384)
    assert found.parameters["reward_models.helpful"] == pytest.approx(found.parameters["policy"], rel=0.01)


def test_a_critic_is_planned_beside_the_policy(given):
    without, found = (planned(given(f"algorithm={name}")) for name in ("rloo", "ppo"))
    plain, own = (made.needs[0].own for made in (without, found))
    every = without.parameters["reward_models.helpful"]  # a classifier of the policy's shape
    assert own.keys() - plain.keys() == {"critic"}
    assert own["critic"] == 4 * every + 8 * every + 12 * every // 2  # of two ranks


def test_what_is_left_out_is_told(given):
    found = planned(given("resources.learner.gpus=1", "resources.autoscaling=true"))
    assert [note.split(":")[0] for note in found.notes] == ["resources.learner.gpus"]


def test_what_does_not_fit_is_told():
    work, need = WORK, Need("learner rank", 2, {"process": 3 * 2**30})
    found = Plan(work, [need], 2**30, {"policy": 1}, 1, [])
    assert found.total == 7 * 2**30
    assert node(found, 8 * 2**30) == [
        "this node: 7.00 GiB (processes 6.00, object store 1.00, weights read where they lie 0.00); free are 8.00"
    ]
    assert node(found, 6 * 2**30)[1].startswith("it does not fit: deepspeed.activation_checkpointing=true")
    assert len(node(found, None)) == 1


def test_responses_cannot_be_expected_to_be_longer_than_they_may_be():
    with pytest.raises(
        ValueError, match=r"^plan\.response_tokens=50 is more than rollout\.max_new_tokens=40"
    ):
        config("plan.response_tokens=50")


def test_times_are_in_proportion(given):
    made = given("align.steps=100", "align.samples_per_prompt=5", "baseline.samples=6")
    made = replace(made, evaluate=replace(made.evaluate, samples=3, judge_samples=4, best_of=[]))
    steps = Steps(seconds=10.0, sampling=4.0, tokens=20.0)  # 0.2 s of sampling for each of 4 * 5 responses
    found = estimate(made, steps, prompts=10, evaluated=2)
    assert found == pytest.approx({"baseline": 0.2 * 60, "align": 1000.0, "evaluate": 0.2 * 2 * (2 * 3 + 4)})
    during = replace(made, evaluate=replace(made.evaluate, every=20, during_samples=8))
    assert estimate(during, steps, 10, 2)["align"] == pytest.approx(1000.0 + 5 * 0.2 * 2 * 8)
    assert set(estimate(replace(made, stages=["align"]), steps, 10, 2)) == {"align"}


def test_measuring_needs_models(tmp_path):
    made = config("experiment=quick", f"output_dir={tmp_path}")
    store = Store(tmp_path / "store")
    with pytest.raises(
        ValueError, match=r"^plan\.measure=true needs the models: give them by path, or make them"
    ):
        short(made, Stages(made, preflight(made, store), store))


def test_a_measured_run_is_short_and_keeps_what_a_step_is(given):
    made = given("deepspeed=zero2", "policy.lora={rank: 2, alpha: 4, target_modules: all-linear}")
    store = Store(Path(made.output_dir) / "store")
    found = short(made, Stages(made, preflight(made, store), store))
    assert (found.stages, found.align.steps, found.evaluate.every) == (["baseline", "align"], 3, None)
    for kept in ("deepspeed", "rollout", "resources", "algorithm", "utility"):
        assert getattr(found, kept) == getattr(made, kept)
    assert found.policy.lora == made.policy.lora
    assert found.align.prompts_per_step == made.align.prompts_per_step


def test_the_outline_of_a_classifier_has_its_head():
    found = Outline(wide(num_labels=1), AutoModelForSequenceClassification, torch.float32)
    assert (
        found.sizes.every == Outline(wide(), AutoModelForCausalLM, torch.float32).sizes.every - 500 * 64 + 64
    )
    batch = WORK.scored(4096)[0]
    assert found.inference_peak(batch, "predict") > 4 * np.prod(batch.input_ids.shape) * 64
