"""A stage that is interrupted and gone on with gives what it gives undisturbed, bit for bit.

`RLHF_INTERRUPTIONS=10 pytest tests/actors/test_resume.py -k alignment_that_is_ended` ends alignment at ten random
steps, with every algorithm; by itself two steps and two algorithms do (RLOO goes on in other tests here).
"""

import json
import os
import shutil
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import psutil
import pytest
import ray
from safetensors.numpy import load_file

from actors import signals
from actors.failures import fault
from actors.stages.align import Align
from actors.stages.baseline import Baseline
from rlhf.evaluate.curve import read_points
from rlhf.flow.check import check
from rlhf.flow.history import read
from rlhf.logs import read_metrics
from tests.actors.conftest import run
from tests.actors.test_align import without_times

pytestmark = pytest.mark.actors
ASKED = os.environ.get("RLHF_INTERRUPTIONS")
INTERRUPTIONS = int(ASKED or 2)
STEPS = 6 + INTERRUPTIONS  # of alignment
ALGORITHMS = {
    "rloo": (),
    "ppo": ("algorithm=ppo", "algorithm.kl_target=0.5"),
    "lora": ("policy.lora={rank: 2, alpha: 4, target_modules: all-linear}", "resources.learner.count=2"),
}


@pytest.fixture
def heard():
    """SIGTERM as the command hears it."""
    before = signal.signal(signal.SIGTERM, signals._raise)
    yield
    signal.signal(signal.SIGTERM, before)


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def end_at(path: Path, steps: int) -> threading.Thread:
    """SIGTERM once a file has so many lines."""

    def wait() -> None:
        while lines(path) < steps:
            time.sleep(0.005)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


def made(job, folder: Path) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    return without_times(read_metrics(folder)), load_file(folder / "policy" / "model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(shared_jobs):
    """What an algorithm gives, by its name."""
    found = {}

    def of(algorithm):
        if algorithm not in found:
            job = shared_jobs.make(*ALGORITHMS[algorithm], f"align.steps={STEPS}")
            run(job, "align")
            found[algorithm] = made(job, job.stages.of(Align).path)
        return found[algorithm]

    return of


def check_same(found, expected) -> None:
    metrics, weights = found
    assert metrics == expected[0]
    assert weights.keys() == expected[1].keys()
    for name, value in weights.items():
        np.testing.assert_array_equal(value, expected[1][name], err_msg=name)


@pytest.mark.parametrize("algorithm", ALGORITHMS if ASKED else ("ppo", "lora"))
def test_alignment_that_is_ended_and_gone_on_with(jobs, heard, undisturbed, algorithm):
    """SIGTERM after random steps; then the newest checkpoint is lost, as of a run that was killed."""
    expected = undisturbed(algorithm)
    options = (*ALGORITHMS[algorithm], f"align.steps={STEPS}", "recovery.grace=60")
    parts = jobs.make(*options, "align.checkpoint={every: 3, minutes: null, keep: 2}")
    (output,) = parts.stages.of(Align).outputs
    work = parts.stages.store.unfinished(output.kind, output.name)
    rng = np.random.default_rng(len(algorithm))
    for after in sorted(rng.choice(np.arange(1, STEPS - 1), INTERRUPTIONS, replace=False)):
        thread = end_at(work / "metrics.jsonl", int(after))
        with pytest.raises(signals.Ended):
            run(parts, "align")
        thread.join()
    newest = sorted((work / "checkpoints").glob("step-*"))[-1]
    if len(list((work / "checkpoints").glob("step-*"))) > 1:
        shutil.rmtree(newest)
    run(parts, "align")
    check_same(made(parts, parts.stages.of(Align).path), expected)
    attempts = {line.attempt for line in read(parts.stages.of(Align).path / "history.jsonl")}
    assert attempts == set(range(1, INTERRUPTIONS + 2))
    assert not work.exists()


def test_alignment_goes_on_after_a_learner_rank_was_stopped(jobs, undisturbed):
    """From the newest checkpoint, with new processes; none of the old ones is left."""
    expected = undisturbed("lora")
    job = jobs.make(
        *ALGORITHMS["lora"],
        f"align.steps={STEPS}",
        "align.checkpoint={every: 2, minutes: null, keep: 2}",
        "recovery={silence: 3, backoff: 0, restarts: 1}",
        apart=True,
    )
    (output,) = job.stages.of(Align).outputs
    work = job.stages.store.unfinished(output.kind, output.name)
    learner = job.roles.learner
    pids = ray.get([rank.__ray_call__.remote(lambda _: os.getpid()) for rank in learner.ranks])

    def disturb():
        while lines(work / "metrics.jsonl") < 5:
            time.sleep(0.005)
        os.kill(pids[1], signal.SIGSTOP)

    threading.Thread(target=disturb, daemon=True).start()
    run(job, "align")
    folder = job.stages.of(Align).path
    check_same(made(job, folder), expected)
    verdict = check(read(folder / "history.jsonl"))
    assert verdict.clean, verdict
    assert (verdict.attempts, verdict.undone > 0) == (2, True)
    for _ in range(100):
        if not any(psutil.pid_exists(pid) for pid in pids):
            break
        time.sleep(0.1)
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_a_run_goes_on_from_a_checkpoint_of_another_with_more_steps(jobs, undisturbed):
    """As the longer run; keys that make another history are refused, before anything starts."""
    saved = "align.checkpoint={every: 3, minutes: null, keep: 9}"
    short = jobs.make("align.steps=5", saved)
    run(short, "align")
    checkpoint = short.stages.of(Align).path / "checkpoints" / "step-000003"
    resumed = f"align.checkpoint={{every: null, minutes: null, keep: 1, resume: {checkpoint}}}"
    longer = jobs.make(f"align.steps={STEPS}", resumed)
    run(longer, "align")
    folder = longer.stages.of(Align).path
    check_same(made(longer, folder), undisturbed("rloo"))
    assert check(read(folder / "history.jsonl")).clean
    other = jobs.make("align.kl_coef=0.7", "seed=0", resumed)
    with pytest.raises(
        ValueError, match=r"resume=.* another history: .*align.kl_coef \(0.3 there, 0.7 here\)"
    ):
        run(other, "align")
    with pytest.raises(ValueError, match=r"is of step 3, and align.steps=2"):
        run(jobs.make("align.steps=2", resumed), "align")
    with pytest.raises(ValueError, match=r"align.checkpoint.resume: .*no whole checkpoint"):
        run(jobs.make("align.checkpoint.resume=nowhere"), "align")


def test_the_policy_of_the_best_evaluated_step_is_kept(jobs, heard):
    """With a bound on the KL that only an early step keeps; also across an interruption. The policy is that of a run
    that ends there."""
    options = ("align.steps=6", "evaluate.every=2", "evaluate.during_samples=2", "evaluate.max_kl=1e-6")
    job = jobs.make(*options, "align.checkpoint={every: null, minutes: null, keep: 1}")
    (output,) = job.stages.of(Align).outputs
    work = job.stages.store.unfinished(output.kind, output.name)
    thread = end_at(work / "metrics.jsonl", 5)
    with pytest.raises(signals.Ended):
        run(job, "align")
    thread.join()
    kept = sorted(int(p.name.split("-")[1]) for p in (work / "checkpoints").glob("step-*"))
    run(job, "align")
    folder = job.stages.of(Align).path
    points = read_points(folder / "evaluations.jsonl")
    assert [p.step for p in points] == [0, 2, 4, 6]
    assert abs(points[0].kl) < 1e-4
    chosen = min(points[1:], key=lambda p: p.kl).step
    assert chosen < 6
    assert chosen in kept
    short = jobs.make(f"align.steps={chosen}")
    run(short, "align")
    metrics, weights = made(job, folder)
    assert len(metrics) == 6
    check_same((metrics[:chosen], weights), made(short, short.stages.of(Align).path))


FITS = {
    "sft": "policy.training",
    "reward_models": "reward_models.helpful.training",
}


@pytest.mark.parametrize("stage", FITS)
def test_a_fit_that_is_ended_and_whose_rank_is_killed(
    jobs, heard, monkeypatch, tmp_path, policy_folder, stage
):
    """SIGTERM, the same command again, then SIGKILL of a rank: each goes on from the newest checkpoint."""
    monkeypatch.setattr("actors.stages.fit.CHUNK", 2)
    words = ["tea", "bread", "lock", "yes", "no", "good", "bad"]
    turns = [
        (
            [{"role": "user", "content": f"what is {a} ?"}],
            *([{"role": "assistant", "content": f"{c} ."}] for c in b),
        )
        for a in words
        for b in pairwise(words)
    ]
    shown = "".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c, _ in turns)
    pairs = "".join(json.dumps({"prompt": p, "chosen": c, "rejected": r}) + "\n" for p, c, r in turns)
    (tmp_path / "shown.jsonl").write_text(shown)
    (tmp_path / "pairs.jsonl").write_text(pairs)
    training = "{steps: 12, batch_size: 4, learning_rate: 0.01, warmup_steps: 2, weight_decay: 0.1}"
    options = [
        f"{FITS[stage]}={training}",
        "recovery={grace: 60, backoff: 0, restarts: 1}",
        "align.checkpoint={every: null, minutes: 0.0001, keep: 2}",
    ]
    if stage == "sft":
        options += ["policy.path=null", f"policy.init_from={policy_folder}"]
        options += [f"data.demonstrations={tmp_path / 'shown.jsonl'}"]
    else:
        options += ["reward_models.helpful.path=null", f"reward_models.helpful.init_from={policy_folder}"]
        options += [f"reward_models.helpful.preferences={tmp_path / 'pairs.jsonl'}"]
    whole, parts = jobs.make(*options, bare=True), jobs.make(*options, bare=True, apart=True)
    run(whole, stage)
    (owner,) = [s for s in parts.stages.configured() if s.name == stage]
    (output,) = owner.outputs
    work = parts.stages.store.unfinished(output.kind, output.name)
    thread = end_at(work / "metrics.jsonl", 3)
    with pytest.raises(signals.Ended):
        run(parts, stage)
    thread.join()
    done, said = lines(work / "metrics.jsonl"), []
    assert 3 <= done < 12
    (pid,) = ray.get([rank.__ray_call__.remote(lambda _: os.getpid()) for rank in parts.roles.learner.ranks])

    def disturb():
        while lines(work / "metrics.jsonl") < done + 3:
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)

    monkeypatch.setattr(parts.view, "line", said.append)
    threading.Thread(target=disturb, daemon=True).start()
    run(parts, stage)
    assert sum("goes on from step" in line for line in said) == 2, said
    assert any("its processes are started again" in line for line in said), said
    found, expected = (job.stages.store.folder(output.kind, output.name) for job in (parts, whole))
    assert without_times(read_metrics(found)) == without_times(read_metrics(expected))
    check_same(
        (None, load_file(found / "model.safetensors")), (None, load_file(expected / "model.safetensors"))
    )


@pytest.mark.parametrize("tolerance", ["null", "0.3"])
def test_a_baseline_that_is_ended_and_gone_on_with(jobs, heard, monkeypatch, tolerance):
    """SIGTERM once some items, or rounds, are in; the statistics are those of an undisturbed run."""
    options = (f"baseline={{samples: 4, tolerance: {tolerance}, max_samples: 16}}", "recovery.grace=60")
    whole, parts = jobs.make(*options, bare=True), jobs.make(*options, bare=True)
    run(whole, "baseline")
    generators = parts.roles.generators
    sample, rounds = generators.sample, []

    def sample_and_end(items, use):
        rounds.append(len(items))
        for n, sampled in enumerate(sample(items, use), 1):
            if (n == 3 and tolerance == "null") or len(rounds) == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            yield sampled

    monkeypatch.setattr(generators, "sample", sample_and_end)
    with pytest.raises(signals.Ended):
        run(parts, "baseline")
    monkeypatch.setattr(
        generators, "sample", lambda items, use: rounds.append(len(items)) or sample(items, use)
    )
    run(parts, "baseline")
    found, expected = (
        json.loads((job.stages.of(Baseline).statistics_path.parent / "summary.json").read_text())
        for job in (parts, whole)
    )
    assert found == expected
    if tolerance == "null":
        assert 0 < rounds[1] < rounds[0]  # some were not sampled again
    assert not (parts.stages.of(Baseline).statistics_path.parent / "checkpoints").exists()


def test_the_baseline_estimator_may_die_or_be_lost_while_it_is_filled(jobs, undisturbed, monkeypatch):
    """In alignment it loads its file again, in place; in its own stage that begins anew."""
    job = jobs.make(f"align.steps={STEPS}")
    baseline = job.roles.baseline
    kill = baseline.actor.__ray_call__.remote
    pid = ray.get(kill(lambda _: os.getpid()))
    (output,) = job.stages.of(Align).outputs
    work = job.stages.store.unfinished(output.kind, output.name)

    def disturb():
        while lines(work / "metrics.jsonl") < 2:
            time.sleep(0.005)
        os.kill(pid, signal.SIGKILL)

    threading.Thread(target=disturb, daemon=True).start()
    run(job, "align")
    check_same(made(job, job.stages.of(Align).path), undisturbed("rloo"))
    assert {line.attempt for line in read(job.stages.of(Align).path / "history.jsonl")} == {1}
    again = ray.get(kill(lambda _: os.getpid()))
    assert again != pid
    os.kill(again, signal.SIGKILL)
    while psutil.pid_exists(again):
        time.sleep(0.05)
    with pytest.raises(ray.exceptions.RayTaskError) as error:
        baseline.ask("taken", "any")
    assert "was started again" in (fault(error.value) or "")
