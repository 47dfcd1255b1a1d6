"""The alignment loop on real actors: reproducible, bounded, and safe against dying generators."""

import itertools
import os
import re
import signal
import threading
import time

import numpy as np
import pytest
import ray

from actors.stages.align import Align
from actors.stages.baseline import Baseline
from actors.stages.sft import Sft
from rlhf import timeline
from rlhf.logs import read_metrics
from rlhf.types import Rewards
from tests.actors.conftest import run

pytestmark = pytest.mark.actors


def align(job) -> list[dict[str, float]]:
    run(job, "align")
    return read_metrics(job.stages.of(Align).path)


def without_times(metrics: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{k: v for k, v in step.items() if not k.startswith("seconds")} for step in metrics]


@pytest.fixture(scope="module")
def expected(shared_jobs):
    """The metrics of an undisturbed run at staleness 0, with two generators."""
    return without_times(align(shared_jobs.make()))


def test_same_metrics_with_another_number_of_generators(jobs, expected):
    assert without_times(align(jobs.make("resources.generators.count=3", apart=True))) == expected
    assert [step["step"] for step in expected] == [1, 2, 3]
    assert all(step["staleness"] == 0 for step in expected)


def test_same_metrics_when_a_generator_is_killed(jobs, expected, monkeypatch):
    """SIGKILL between two steps and during one: its items are sampled elsewhere, with the right weights."""
    job = jobs.make()
    generators = job.roles.generators
    pids = ray.get([a.__ray_call__.remote(lambda _: os.getpid()) for a in generators._actors])
    submit, calls = generators.submit, []

    def submit_and_kill(item, worker):
        submit(item, worker)
        calls.append(worker)
        if len(calls) in (3, 6):
            os.kill(pids[worker], signal.SIGKILL)
            pids[worker] = pids[1 - worker]

    monkeypatch.setattr(generators, "submit", submit_and_kill)
    run(job, "align")
    assert len(calls) > 6  # some items went out twice
    assert without_times(read_metrics(job.stages.of(Align).path)) == expected


def test_same_metrics_when_the_queue_is_restarted(jobs, expected, monkeypatch):
    """A restarted queue is empty; the controller puts the items again."""
    from actors import queue

    started = []

    class Known(queue.Queue):
        def __init__(self, recovery):
            super().__init__(recovery)
            started.append(self.actor)

    monkeypatch.setattr(queue, "Queue", Known)
    job = jobs.make()
    killer = threading.Thread(
        target=lambda: (wait_for(started), time.sleep(0.5), ray.kill(started[0], no_restart=False))
    )
    killer.start()
    run(job, "align")
    killer.join()
    assert without_times(read_metrics(job.stages.of(Align).path)) == expected


def wait_for(things: list) -> None:
    while not things:
        time.sleep(0.01)


def test_staleness_is_bounded_and_used(jobs):
    metrics = align(jobs.make("align.staleness=1", "align.steps=6"))
    assert [step["step"] for step in metrics] == [1, 2, 3, 4, 5, 6]
    assert max(step["staleness"] for step in metrics) == 1
    assert metrics[0]["staleness"] == 0


def test_the_timeline_has_every_process_within_the_stage(jobs):
    job = jobs.make()
    started = time.time()
    metrics = align(job)
    spans = timeline.read(job.stages.of(Align).path / "timeline.json")
    tracks = {(s.track, s.name) for s in spans}
    for number in range(2):
        assert (f"generator {number}", "sample") in tracks
    for name in job.config.reward_models:
        assert (f"reward {name}", "score") in tracks
    assert {("learner 0", "prepare"), ("learner 0", "train"), ("learner 0", "publish weights")} <= tracks
    assert sum(s.name == "train" for s in spans) == len(metrics)
    assert max(s.end for s in spans) <= time.time() - started
    for track in {s.track for s in spans}:  # a process does one thing at a time
        own = sorted((s for s in spans if s.track == track), key=lambda s: s.start)
        assert all(a.end <= b.start + 1e-3 for a, b in itertools.pairwise(own))


def test_bfloat16_through_every_process(jobs):
    """Sampler and learner, which may round apart, stay close on-policy."""
    job = jobs.make("dtype=bfloat16", "align.staleness=1", apart=True, bare=True)
    run(job, "baseline")
    metrics = align(job)
    assert metrics[0]["sampler_gap"] < 0.05  # later ones are of a staler policy too
    assert all(np.isfinite(step["utility/combined"]) for step in metrics)


def test_policy_moves_towards_the_reward(jobs):
    """Twenty steps without KL penalty raise the utility that is maximised, and the KL leaves 0."""
    metrics = align(jobs.make("align.steps=20", "align.kl_coef=0.001"))
    first, last = (np.mean([s["utility/combined"] for s in part]) for part in (metrics[:4], metrics[-4:]))
    assert last > first + 0.2
    assert abs(metrics[0]["kl"]) < 1e-4 < metrics[-1]["kl"]


def test_rewards_are_the_formula(jobs, reward_folders, policy_folder):
    """One batch through generator and pool against transformers, numpy's quantile and log sigmoid by hand."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    job = jobs.make()
    (sampled,) = job.roles.generators.sample([next(iter(items(job)))])
    ray.get(job.roles.baseline.actor.load.remote(str(job.stages.of(Baseline).statistics_path)))
    utility, rules = job.stages.of(Align).utility, job.stages.of(Baseline).rules
    statistics = job.stages.of(Baseline).statistics_path
    rewards: Rewards = ray.get(job.roles.rewards.rewards(sampled.rollouts, utility, rules, statistics))
    rollouts = ray.get(sampled.rollouts)
    tokenizer = AutoTokenizer.from_pretrained(policy_folder)
    for column, name in enumerate(("helpful", "harmless")):
        model = AutoModelForSequenceClassification.from_pretrained(reward_folders[name]).eval()

        def score(prompt, text, model=model):
            text = re.sub(
                r"<[^ ]+>", "<unk>", text
            )  # special tokens are text there, of words it does not know
            ids = tokenizer.apply_chat_template(
                [*prompt, {"role": "assistant", "content": text}], return_tensors="pt", return_dict=True
            )
            with torch.no_grad():
                return model(**ids).logits.item()

        raw = [score(rollouts.prompts[g], t) for g, t in zip(rollouts.group, rollouts.texts, strict=True)]
        np.testing.assert_allclose(rewards.raw[:, column], raw, atol=1e-4)
        base = ray.get(job.roles.baseline.actor.samples.remote(rules, rollouts.prompt_ids))[name]
        if name == "helpful":
            r_ref = [np.quantile(b.astype(np.float64), 0.85) for b in base]
        else:
            r_ref = [np.mean([score(p, c) for c in ("no .", "i do no bad .")]) for p in rollouts.prompts]
        np.testing.assert_allclose(rewards.reference[:, column], np.array(r_ref)[rollouts.group], atol=1e-4)
    centred = rewards.raw.astype(np.float64) - rewards.reference
    np.testing.assert_allclose(rewards.combined, -np.log1p(np.exp(-centred)).sum(1), rtol=1e-5)


def test_work_that_an_earlier_call_left_is_not_taken_for_this_one(jobs):
    """As after an error in the middle of a stage: the generators still hold its items."""
    from actors.work import work_items

    job = jobs.make()
    generators = job.roles.generators
    generators.load(job.stages.of(Sft).policy_path)
    left = work_items(job.stages.data.prompts[:3], 3, 2, seed=1, purpose="left")
    generators.submit(left[0], generators.free(left[0].id, 1))
    generators.load(job.stages.of(Sft).policy_path)  # as the next stage does
    asked = work_items(job.stages.data.prompts[3:12], 3, 2, seed=2, purpose="asked")
    found = sorted(generators.sample(asked), key=lambda s: s.item.id)
    assert [s.item for s in found] == asked


def items(job):
    from actors.work import work_items

    return work_items(job.stages.data.prompts[:3], 3, 4, seed=7, purpose="test")
