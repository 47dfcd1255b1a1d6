"""Reward sources in the pool, and reward models that are measured on pairs apart."""

import json
from pathlib import Path

import numpy as np
import pytest
import ray
import torch

from actors.stages.align import Align
from actors.stages.base_samples import BaseSamples
from actors.stages.baseline import Baseline
from actors.stages.held_out import CALIBRATION, CURVE
from actors.stages.reward_models import RewardModels
from rlhf.data.preferences import load_preferences
from rlhf.evaluate.record import load_samples
from rlhf.learn.tokenise import held_out_pairs
from rlhf.models.reward import RewardScorer
from rlhf.types import prompt_id
from rlhf.utility.calibration import calibrate
from rlhf.utility.statistics import BaselineStatistics
from tests.actors.conftest import run
from tests.actors.test_reward_pool import sampled
from tests.tiny import WORDS, save_reward_model

pytestmark = pytest.mark.actors

FUNCTIONS = """
import time

def words(completions, completion_ids, finished, topic, **_):
    assert len(completion_ids) == len(finished) == len(topic) == len(completions)
    return [len(c[-1]["content"].split()) for c in completions]

def tea(prompts, completions):
    return [None if "lock" in p[-1]["content"] else "tea" in c[-1]["content"] for p, c in zip(prompts, completions)]

def hangs(completions):
    time.sleep(0.0 if completions[0] == "fine" else 3600)
    return [1.0] * len(completions)

def few(completions): return [1.0]
def nan(completions): return [float("nan")] * len(completions)
def text(completions): return ["good"] * len(completions)
def half(completions): return [0.5] * len(completions)
"""


def function(name: str, scale: str, path: str, *more: str) -> list[str]:
    key = f"reward_models.{name}"
    return [f"+source@{key}=function", f"{key}.path={path}:{name}", f"{key}.scale={scale}", *more]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    path = tmp_path_factory.mktemp("functions") / "functions_of_tests.py"
    path.write_text(FUNCTIONS)
    return str(path)


def test_sources_of_all_kinds_in_one_pool(jobs, module, tmp_path):
    """Columns in their order; one forward pass for two heads; what does not apply is left out, and counted."""
    rows = [{"prompt": [{"role": "user", "content": f"what is {w} ?"}], "topic": w} for w in WORDS[:12]]
    data = tmp_path / "prompts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    labels = save_reward_model(tmp_path / "labels", seed=5, labels=3)
    job = jobs.make(
        f"data.prompts={data}", "utility.combine='helpful & harmless & (kind | ~curt) & tea & words'",
        "utility=quantile_rank", "utility.combine='helpful & harmless & (kind | ~curt) & tea & words'",
        "+source@reward_models.armo=classifier", f"reward_models.armo.path={labels}",
        "+reward_models.armo.heads={kind: 0, curt: {label: 2, reference: mean}}",
        *function("words", "number", module), *function("tea", "verdict", module),
        *(part.replace("reward_models", "evaluators") for part in function("tea", "verdict", module)),
        apart=True, bare=True,
    )  # fmt: skip
    names = ["helpful", "harmless", "kind", "curt", "words", "tea"]
    stages = job.stages
    rollouts = sampled(job)
    raw = ray.get(job.roles.rewards.raw(rollouts))
    found = ray.get(rollouts)
    assert raw.shape == (found.responses, 6)
    prompts = [found.prompts[g] for g in found.group]
    own = RewardScorer("armo", str(labels), heads={"kind": 0, "curt": 2}).score_heads(prompts, found.texts)
    np.testing.assert_allclose(raw[:, 2:4], own, atol=1e-4)
    np.testing.assert_array_equal(raw[:, 4], [len(t.split()) for t in found.texts])
    assert list(stages.of(Baseline).rules) == names
    run(job, "baseline")
    statistics = BaselineStatistics.load(stages.of(Baseline).statistics_path)
    ids = np.array([p.id for p in job.stages.data.prompts], np.uint64)
    lock = np.array(["lock" in p.content[-1]["content"] for p in job.stages.data.prompts])
    np.testing.assert_array_equal(statistics.absent("tea", ids), lock)
    summary = json.loads((stages.of(Baseline).statistics_path.parent / "summary.json").read_text())
    assert summary["references"]["tea"]["absent"] == 1
    base = load_samples(
        stages.of(BaseSamples).path(job)
    )  # by an evaluator that does not apply to all prompts
    locked = np.array(["lock" in p[-1]["content"] for p in base.prompts])
    np.testing.assert_array_equal(np.isnan(base.evaluated["tea"]).all(1), locked)
    utility = stages.of(Align).utility
    references = {
        n: statistics.reference(n, found.prompt_ids, r, 256) for n, r in stages.of(Baseline).rules.items()
    }
    expected = utility.combined(raw, references, found.group)
    rewards = ray.get(
        job.roles.rewards.rewards(
            rollouts, utility, stages.of(Baseline).rules, stages.of(Baseline).statistics_path
        )
    )
    np.testing.assert_allclose(rewards.combined, expected, rtol=1e-5)


def test_each_fault_of_a_function_is_one_line(jobs, module):
    job = jobs.make(
        *function("hangs", "verdict", module, "reward_models.hangs.timeout=0.5"),
        *(part for name in ("few", "nan", "text", "half") for part in function(name, "verdict", module)),
        apart=True, bare=True,
    )  # fmt: skip
    pool = job.roles.rewards
    lines = {
        "hangs": r"has not returned after 0.5 s \(timeout\), for 2 responses, the first of prompt 'a', response 'b'",
        "few": "returned 1 rewards for 2 responses, the first of prompt 'a', response 'b'",
        "nan": "returned nan for prompt 'a', response 'b'; it must return a finite number",
        "text": r"returned 'good' \(str\) for prompt 'a', response 'b'",
    }
    for name, line in lines.items():
        with pytest.raises(ValueError, match=rf"reward source '{name}' \(.*:{name}\) {line}"):
            ray.get(pool.texts(name, ["a", "a"], ["b", "c"]))
    line = "reward source 'half' gave 0.5 for prompt 'a', response 'b', but its scale is verdict: a verdict is 0 or 1"
    with pytest.raises(ValueError, match=line):
        ray.get(pool.texts("half", ["a", "a"], ["b", "c"]))


def pairs(path, prompts: int, seed: int):
    """Preferences for texts with "good", with mistakes."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(prompts):
        prompt = f"what is {rng.choice(WORDS)} {i} ?"
        for _ in range(3):
            texts = [" ".join(rng.choice(WORDS, 4)) for _ in range(2)]
            texts[0] += " good"
            if rng.random() < 0.2:
                texts.reverse()
            rows.append({"prompt": prompt, "chosen": texts[0], "rejected": texts[1]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def margins(folder, given) -> np.ndarray:
    scorer = RewardScorer("helpful", str(folder))
    prompts = [p.prompt for p in given]
    return scorer.score(prompts, [p.chosen for p in given]) - scorer.score(
        prompts, [p.rejected for p in given]
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_model_is_measured_on_pairs_apart_and_its_best_step_is_kept(jobs, policy_folder, tmp_path, ranks):
    source = pairs(tmp_path / "pairs.jsonl", 40, seed=0)
    job = jobs.make(
        "reward_models.helpful.path=null", f"reward_models.helpful.init_from={policy_folder}",
        f"reward_models.helpful.preferences={source}", "reward_models.helpful.held_out=0.25",
        "reward_models.helpful.evaluations=4", "reward_models.helpful.training.steps=30",
        "reward_models.helpful.training.learning_rate=0.01", "reward_models.helpful.training.batch_size=16",
        f"resources.learner.count={ranks}", f"deepspeed.zero_stage={3 if ranks == 2 else 0}", apart=True, bare=True,
    )  # fmt: skip
    run(job, "reward_models")
    models = job.stages.of(RewardModels)
    folder = Path(models.paths("reward_models")["helpful"])
    curve = json.loads((folder / CURVE).read_text())
    assert [point["step"] for point in curve] == [8, 15, 23, 30]
    given = load_preferences(str(source))
    apart = held_out_pairs("key", np.array([prompt_id(p.prompt) for p in given], np.uint64), 0.25, 0)
    assert 30 <= apart.sum() <= 33
    own = calibrate(margins(folder, [p for p, held in zip(given, apart, strict=True) if held]))
    found = json.loads((folder / CALIBRATION).read_text())
    best = min(curve, key=lambda point: point["log_loss"])
    assert found["step"] == best["step"]
    assert found["pairs"] == apart.sum()
    assert found["before"]["log_loss"] == pytest.approx(best["log_loss"])
    assert own.before.log_loss == pytest.approx(best["log_loss"], abs=1e-4)
    assert own.temperature == pytest.approx(found["temperature"], rel=1e-3)
    assert models.scales()["helpful"].temperature == found["temperature"]
    assert best["accuracy"] > 0.65


def test_a_given_model_is_calibrated_on_given_pairs(jobs, reward_folders, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    source = pairs(tmp_path / "pairs.jsonl", 30, seed=1)
    model = AutoModelForSequenceClassification.from_pretrained(reward_folders["helpful"])
    given = load_preferences(str(source))
    if margins(reward_folders["helpful"], given).mean() < 0:
        with torch.no_grad():
            model.score.weight.neg_()
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(reward_folders["helpful"]).save_pretrained(tmp_path / "model")
    path = [f"reward_models.helpful.path={tmp_path / 'model'}", f"reward_models.helpful.calibration={source}"]
    job = jobs.make(*path, bare=True, apart=True)
    run(job, "reward_models")
    models = job.stages.of(RewardModels)
    expected = calibrate(margins(tmp_path / "model", given))
    assert models.scales()["helpful"].temperature == pytest.approx(expected.temperature, rel=1e-4)
    assert models.scales()["harmless"].temperature == 1
    plain = jobs.make(*path, "utility.calibrated=false", bare=True)
    assert plain.stages.of(Align).output_name != job.stages.of(Align).output_name
