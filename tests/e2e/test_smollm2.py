"""`make real` with little of everything: a known model, its chat template, adapters, bfloat16."""

import json

import numpy as np
import pytest
from safetensors.numpy import load_file

from benchmarks.smollm2 import make
from tests.e2e.command import ROOT, rlhf

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900, method="signal")]

LITTLE = (
    "data.train_size=8",
    "data.eval_size=4",
    "evaluators=none",
    "policy.training.steps=3",
    "reward_models.helpful.training.steps=3",
    "reward_models.harmless.training.steps=3",
    "baseline.samples=4",
    "rollout.max_new_tokens=16",
    "rollout.prompts_per_item=2",
    "align.steps=3",
    "align.prompts_per_step=4",
    "align.samples_per_prompt=4",
    "evaluate.samples=2",
    "evaluate.judge_samples=4",
    "evaluate.best_of=[]",
    "dtype=bfloat16",
)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of a few steps, by the configuration that `make real` has."""
    folder = tmp_path_factory.mktemp("smollm2")
    given = (f"policy.init_from={make()}", f"output_dir={folder}", *LITTLE)
    done = rlhf("experiment=smollm2", *given, cwd=ROOT, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return folder / "latest"


def test_the_policy_learns_and_the_sampler_agrees_with_the_learner(run):
    steps = [json.loads(line) for line in (run / "align" / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [1, 2, 3]
    assert steps[0]["kl"] == pytest.approx(0, abs=0.5)  # nats a response, of bfloat16's rounding alone
    assert (
        max(s["sampler_gap"] for s in steps) < 0.2
    )  # nats a token on average: 0.046 where this was measured
    assert all(s["grad_norm"] > 0 for s in steps)


def test_what_is_aligned_is_the_whole_model_with_the_adapter_in_it(run):
    """Plain transformers loads it: the base policy's names, other values where the adapter is."""
    base, aligned = (load_file(run / name / "model.safetensors") for name in ("base_policy", "policy"))
    assert base.keys() == aligned.keys()
    moved = {name for name in base if not np.array_equal(base[name], aligned[name])}
    assert any("q_proj" in name for name in moved)
    assert not any("norm" in name or "embed" in name for name in moved)


def test_prompts_of_both_kinds_are_evaluated(run):
    summary = json.loads((run / "summary.json").read_text())
    assert set(summary["win_rate"]) >= {"helpful", "harmless", "joint"}
