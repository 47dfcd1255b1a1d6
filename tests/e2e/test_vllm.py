"""The quick job sampled by vLLM, and by the embedded engine, from the same base policy and reward models. vLLM's own
Llama does not take its activation (relu), so that this is sampled by transformers' code within vLLM."""

import json

import numpy as np
import pytest

from tests.e2e.command import rlhf

pytest.importorskip("vllm", reason="no vLLM here (make test-vllm)")
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1200, method="signal")]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    found = {}
    for engine in ("vllm", "embedded"):
        done = rlhf("experiment=quick", f"rollout.engine={engine}", cwd=folder)
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
        found[engine] = (folder / "outputs" / "latest").resolve()
    return found


def test_it_wins_as_often_as_with_the_embedded_engine(runs):
    vllm, embedded = (json.loads((runs[e] / "summary.json").read_text()) for e in ("vllm", "embedded"))
    assert embedded["skipped"] == ["sft", "reward_models"]
    low, high = embedded["win_rate_ci"]["joint"]["aligned"]
    assert low <= vllm["win_rate"]["joint"]["aligned"] <= high
    assert vllm["win_rate_ci"]["joint"]["change"][0] > 0
    assert vllm["kl"] == pytest.approx(embedded["kl"], rel=0.3)


def test_sampler_and_learner_agree_on_the_log_probabilities(runs):
    steps = [json.loads(line) for line in (runs["vllm"] / "align" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 20
    assert max(step["sampler_gap"] for step in steps) < 1e-3
    assert abs(steps[0]["kl"]) < 1e-3  # the first step samples from the base policy
    assert np.mean([step["kl"] for step in steps[-5:]]) > 0.5  # and the later ones from new weights
