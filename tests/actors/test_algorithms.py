"""Every algorithm, adapters, and the baseline's options, on real actors."""

import json

import numpy as np
import pytest
import ray
import torch

from actors.stages.align import Align
from actors.stages.baseline import Baseline
from rlhf.logs import read_metrics
from rlhf.models.load import load_policy
from rlhf.utility.statistics import BaselineStatistics
from tests.actors.conftest import run

pytestmark = pytest.mark.actors


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce_pp", "grpo", "dr_grpo", "gdpo"])
def test_an_algorithm_raises_the_utility(jobs, algorithm):
    """Steps with hardly any KL penalty; the KL is measured, and with several steps a batch it is clipped."""
    options = ("align.steps=20", "align.samples_per_prompt=16", "align.learning_rate=0.004")
    utility = ["utility=linear"] if algorithm == "gdpo" else []
    job = jobs.make(f"algorithm={algorithm}", *utility, "align.kl_coef=0.001", *options)
    run(job, "align")
    metrics = read_metrics(job.stages.of(Align).path)
    first, last = (np.mean([s["utility/combined"] for s in part]) for part in (metrics[:3], metrics[-3:]))
    assert last > first + 0.3
    assert abs(metrics[0]["kl"]) < 1e-4 < metrics[-1]["kl"]
    assert ("critic/loss" in metrics[0]) == (algorithm == "ppo")
    assert max(step["clipped"] for step in metrics) > 0
    assert all(np.isfinite(list(step.values())).all() for step in metrics)


def test_an_adapter_is_trained_against_its_own_base(jobs, policy_folder):
    """Only low-rank changes of the weights; the saved policy is plain, and is what base and adapter give together."""
    import peft

    job = jobs.make(
        "deepspeed=zero3",
        "policy.lora={rank: 2, alpha: 4, target_modules: all-linear}",
        "align.kl_coef=0.01",
        "resources.learner={count: 2, cpus: 0.1, gpus: 0}",
        apart=True,
    )
    ray.get(job.roles.baseline.actor.load.remote(str(job.stages.of(Baseline).statistics_path)))
    run(job, "align")
    base = load_policy(str(policy_folder))
    trained = load_policy(str(job.stages.of(Align).path / "policy"))
    changed = 0
    for (name, before), after in zip(base.named_parameters(), trained.parameters(), strict=True):
        rank = int(torch.linalg.matrix_rank(after - before, rtol=1e-3)) if before.dim() == 2 else 0
        assert rank <= 2, name
        changed += rank > 0
    assert changed == 14  # seven linear layers in each of two blocks
    adapter = peft.PeftModel.from_pretrained(base, job.stages.of(Align).path / "policy" / "adapter")
    ids = torch.tensor([[2, 9, 4, 7]])
    with torch.no_grad():
        torch.testing.assert_close(
            adapter(input_ids=ids).logits, trained(input_ids=ids).logits, atol=1e-4, rtol=1e-4
        )
    metrics = read_metrics(job.stages.of(Align).path)
    assert abs(metrics[0]["kl"]) < 1e-4 < abs(metrics[-1]["kl"])


def test_without_a_penalty_there_is_no_reference(jobs):
    job = jobs.make("align.kl_coef=0", "align.steps=2")
    run(job, "align")
    assert all("kl" not in step for step in read_metrics(job.stages.of(Align).path))


def test_the_kl_coefficient_follows_its_target(jobs):
    """The KL starts at 0, below any target, so the coefficient falls at the highest rate: 20 % a horizon."""
    job = jobs.make("algorithm.kl_target=50.0", "algorithm.kl_horizon=24", "align.kl_coef=0.1")
    run(job, "align")
    found = [step["kl_coef"] for step in read_metrics(job.stages.of(Align).path)]
    np.testing.assert_allclose(found, [0.1, 0.1 * 0.9, 0.1 * 0.81], rtol=1e-5)  # 12 responses a step


def baseline(job) -> tuple[dict, BaselineStatistics]:
    run(job, "baseline")
    folder = job.stages.store.folder("baseline", job.stages.of(Baseline).output_name)
    summary = json.loads((folder / "summary.json").read_text())
    return summary, BaselineStatistics.load(folder / "statistics.npz")


def test_sampling_goes_on_for_uncertain_prompts_only(jobs):
    job = jobs.make("baseline.tolerance=0.3", "baseline.max_samples=16", bare=True)
    summary, statistics = baseline(job)
    ids = np.array([p.id for p in [*job.stages.data.prompts, *job.stages.data.eval_prompts]], np.uint64)
    counts = statistics.counts("helpful", ids)
    errors = statistics.reference("helpful", ids, job.stages.of(Baseline).rules["helpful"]).standard_error
    assert set(counts) <= {4, 8, 12, 16}
    assert len(set(counts)) > 1
    assert (errors[counts < 16] <= 0.3).all()
    assert summary["samples"] == counts.sum()
    assert summary["samples_saved"] == (16 - counts).sum()


def test_known_statistics_are_taken_over_and_unseen_prompts_sampled_or_refused(jobs):
    known = jobs.warm.stages.of(Baseline).statistics_path
    job = jobs.make(f"baseline.known={known}", "baseline.unseen=refuse", bare=True)
    summary, statistics = baseline(job)
    assert summary["samples"] == summary["prompts_sampled"] == 0
    assert statistics.digest() == BaselineStatistics.load(known).digest()

    fewer = jobs.make("data.train_size=6", bare=True)
    baseline(fewer)
    part = fewer.stages.of(Baseline).statistics_path
    with pytest.raises(ValueError, match=r"baseline.known=.* has no samples of .* first .*jsonl:\d+"):
        run(jobs.make(f"baseline.known={part}", "baseline.unseen=refuse", bare=True), "baseline")
    summary, statistics = baseline(jobs.make(f"baseline.known={part}", bare=True))
    assert summary["prompts_sampled"] == summary["prompts"] - 10
    ids = np.array([p.id for p in job.stages.data.prompts], np.uint64)
    assert (statistics.counts("helpful", ids) == 4).all()

    more = ("baseline.tolerance=0.0001", "baseline.max_samples=8")
    _, statistics = baseline(jobs.make(f"baseline.known={known}", *more, bare=True))
    assert (statistics.counts("helpful", ids) == 8).all()  # and not the four that are known once more
    assert np.mean([len(set(statistics.samples("helpful", int(i)))) for i in ids]) > 6

    other = jobs.make(f"baseline.known={known}", "reward_models.harmless.canned=['yes .']", bare=True)
    _, statistics = baseline(other)
    rules = other.stages.of(Baseline).rules
    before = BaselineStatistics.load(known).reference("harmless", ids, rules["harmless"]).r_ref
    assert (statistics.reference("harmless", ids, rules["harmless"]).r_ref != before).all()


def test_references_from_a_column_of_the_prompts(jobs, prompts_file, tmp_path):
    rows = [json.loads(line) for line in prompts_file.read_text().splitlines()]
    given = tmp_path / "given.jsonl"
    given.write_text("".join(json.dumps(row | {"r": i / 4}) + "\n" for i, row in enumerate(rows)))
    options = ("reward_models.helpful.reference=column", "reward_models.helpful.column=r")
    job = jobs.make(f"data.prompts={given}", *options, bare=True)
    _, statistics = baseline(job)
    ids = np.array([p.id for p in job.stages.data.prompts], np.uint64)
    found = statistics.reference("helpful", ids, job.stages.of(Baseline).rules["helpful"])
    np.testing.assert_array_equal(found.r_ref, [p.meta["r"] for p in job.stages.data.prompts])
    assert (found.standard_error == 0).all()
    given.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=r"given.jsonl:1: the column 'r' holds None"):
        jobs.make(f"data.prompts={given}", *options, bare=True)


def test_steps_without_a_finite_gradient_are_left_out_until_they_are_too_many(jobs, tmp_path):
    """Advantages that float32 holds, whose sum it does not."""
    weight = "reward_models.helpful.weight=3e37"
    job = jobs.make("utility=linear", weight, "align.max_skipped=1", "align.max_grad_norm=0")
    with pytest.raises(
        ValueError, match=r"step 2: the (loss|gradient) of response .*; the batch is in (\S+)"
    ) as error:
        run(job, "align")
    path = str(error.value).rsplit("the batch is in ", 1)[1].split()[0]
    with np.load(path, allow_pickle=False) as batch:
        assert len(json.loads(str(batch["text"]))["responses"]) == len(batch["combined"]) == 12
    (output,) = job.stages.of(Align).outputs
    assert not job.stages.store.unfinished(output.kind, output.name).exists()
