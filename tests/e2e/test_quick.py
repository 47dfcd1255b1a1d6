"""The quick job from nothing, and what it leaves."""

import json
import re
import subprocess
import sys

import numpy as np
import pytest

from rlhf.evaluate.record import load_samples
from tests.e2e.command import rlhf

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600, method="signal")]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run's folder, made by the command in an empty folder that is not the checkout."""
    folder = tmp_path_factory.mktemp("quick")
    done = rlhf("experiment=quick", cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
    return folder / "outputs" / "latest"


def test_the_joint_win_rate_rose_at_a_bounded_kl(run):
    summary = json.loads((run / "summary.json").read_text())
    joint = summary["win_rate"]["joint"]
    assert joint["aligned"] >= joint["base"] + 0.03
    assert summary["win_rate_ci"]["joint"]["change"][0] > 0  # 95 % interval
    assert 0.5 < summary["kl"] < 8
    assert {"sft", "reward_models", "baseline", "align", "evaluate", "total"} <= summary["seconds"].keys()
    assert summary["skipped"] == []
    assert {"torch", "ray", "transformers", "deepspeed", "commit"} <= summary["versions"].keys()


def test_the_report_is_one_file_without_a_network(run):
    html = (run / "report.html").read_text()
    assert "Joint win rate" in html
    assert not re.search(r"""(?:src|href)=["']?https?:""", html)
    assert html.count("<svg") >= 5


def test_metrics_have_one_line_a_step_and_agree_with_tensorboard(run):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    steps = [json.loads(line) for line in (run / "align" / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == list(range(1, 21))
    board = EventAccumulator(str(run / "align" / "tensorboard"))
    board.Reload()
    np.testing.assert_allclose(
        [e.value for e in board.Scalars("kl")], [s["kl"] for s in steps], rtol=1e-5, atol=1e-6
    )
    assert abs(steps[0]["kl"]) < 1e-3 < steps[-1]["kl"]
    assert max(s["sampler_gap"] for s in steps) < 1e-3  # sampler and learner agree on the log-probabilities


SCORES = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
run, = sys.argv[1:]
rows = json.load(sys.stdin)
out = {}
for name in ("helpful", "harmless"):
    tokenizer = AutoTokenizer.from_pretrained(f"{run}/reward_models/{name}")
    model = AutoModelForSequenceClassification.from_pretrained(f"{run}/reward_models/{name}").eval()
    with torch.no_grad():
        out[name] = [model(**tokenizer.apply_chat_template(
            [*p, {"role": "assistant", "content": t}], return_tensors="pt", return_dict=True)).logits.item()
            for p, t in rows]
tokenizer = AutoTokenizer.from_pretrained(f"{run}/policy")
policy = AutoModelForCausalLM.from_pretrained(f"{run}/policy").eval()
base = AutoModelForCausalLM.from_pretrained(f"{run}/base_policy").eval()
def ids(messages, **more):
    return tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True, **more).input_ids
def logprob(model, p, t):
    start, whole = ids(p, add_generation_prompt=True), ids([*p, {"role": "assistant", "content": t}])
    assert whole[0, : start.shape[1]].tolist() == start[0].tolist()
    with torch.no_grad():
        logits = torch.log_softmax(model(whole).logits[0, start.shape[1] - 1 : -1], -1)
    return logits.gather(-1, whole[0, start.shape[1] :, None]).sum().item(), whole.shape[1] - start.shape[1]
pairs = [(logprob(policy, p, t), logprob(base, p, t)) for p, t in rows]
out["log_ratio"] = [a - b for (a, _), (b, _) in pairs]
out["lengths"] = [n for (_, n), _ in pairs]
json.dump(out, sys.stdout)
"""


def test_plain_transformers_reproduces_the_recorded_scores(run):
    """The saved models, in another process and without this package, on the recorded samples.

    Special tokens that were sampled within a response are left out: plain transformers reads their spelling as
    the tokens, a reward model here as text."""
    samples = load_samples(run / "evaluate" / "aligned.npz")
    some = [(p, i) for p in range(0, len(samples.prompts), 5) for i in range(2)]
    places = [(p, i) for p, i in some if samples.finished[p, i] and "<" not in samples.texts[p][i]]
    assert len(places) > 0.7 * len(some)
    rows = [(samples.prompts[p], samples.texts[p][i]) for p, i in places]
    done = subprocess.run(
        [sys.executable, "-I", "-c", SCORES, str(run)], input=json.dumps(rows), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in ("helpful", "harmless"):
        recorded = [samples.rewards[name][p, i] for p, i in places]
        np.testing.assert_allclose(found[name], recorded, atol=1e-4)
    # The same text can be sampled in other tokens than the tokenizer's: a word in two, for example.
    whole = np.array([samples.lengths[p, i] for p, i in places]) == found["lengths"]
    assert whole.mean() > 0.8
    recorded = np.array([samples.log_ratio[p, i] for p, i in places])
    np.testing.assert_allclose(np.array(found["log_ratio"])[whole], recorded[whole], atol=1e-3)


def test_a_second_call_skips_what_is_there(run):
    done = rlhf("experiment=quick", cwd=run.resolve().parents[2])
    assert done.returncode == 0, done.stderr
    for stage in ("sft", "reward_models", "baseline", "align", "evaluate"):
        assert f"{stage}: skipped" in done.stdout
    assert "ray:" not in done.stdout


def test_a_stage_without_its_input_says_which_to_add(run):
    done = rlhf("experiment=quick", "seed=5", "stages=[evaluate,report]", cwd=run.resolve().parents[2])
    assert done.returncode == 1
    assert "stage align has no output for this configuration; add it to stages" in done.stderr


def test_errors_are_one_line_and_exit_with_1(tmp_path):
    done = rlhf("data=files", "data.prompts=nowhere.jsonl", "policy.path=p", "reward_models.helpful.path=p",
                "reward_models.harmless.path=p", cwd=tmp_path)  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.strip().startswith("error: nowhere.jsonl: no such file")
    assert "Traceback" not in done.stderr
    done = rlhf("align.epochs=3", cwd=tmp_path)
    assert done.returncode == 1
    assert "align.epochs" in done.stderr
