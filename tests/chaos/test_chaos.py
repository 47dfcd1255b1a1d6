"""A short schedule in one job, and what its lines say; the harness's own parts. Longer: `python -m tests.chaos`."""

import re

import pytest

from tests.chaos.__main__ import main, table
from tests.chaos.schedule import KINDS, Fault, random_schedule, read_schedule, write_schedule
from tests.chaos.seed import Outcome

SMALL = (
    "data.microcosm={demonstrations: 400, pairs: 400, eval_share: 0.2, seed: 0}",
    "data.eval_size=16",
    "policy.training.steps=20",
    "reward_models.helpful.training.steps=10",
    "reward_models.harmless.training.steps=10",
    "baseline.samples=4",
    "evaluate={samples: 2, judge_samples: 4, best_of: []}",
    "resources.generators.count=1",
    "resources.learner.count=1",
)


@pytest.mark.e2e
@pytest.mark.timeout(300, method="signal")
def test_a_generator_and_a_rank_are_killed_and_the_command_is_ended_and_the_job_comes_through(
    tmp_path, capsys
):
    kinds = ("kill-generator", "kill-learner", "term-driver")
    write_schedule(tmp_path / "faults.jsonl", [Fault(kind, 1, 0.0, 0) for kind in kinds])
    options = ["--seeds", "1", "--alone", "--folder", str(tmp_path / "chaos")]
    status = main([*options, "--schedule", str(tmp_path / "faults.jsonl"), *SMALL])
    said = capsys.readouterr().out
    assert status == 0, said
    assert re.search(r"fault  1  kill-generator .* s  in place", said)
    assert re.search(r"fault  2  kill-learner .* s  from a checkpoint", said)
    assert re.search(r"fault  3  term-driver .* s  command run again", said)
    assert said.endswith("1 passed, 0 failed\n")


def test_schedules_are_seeded_and_are_read_as_written(tmp_path):
    faults = random_schedule(3, 40)
    assert faults == random_schedule(3, 40) != random_schedule(4, 40)
    assert {f.kind for f in faults} == set(KINDS)
    assert all((f.seconds > 0) == f.kind.startswith(("delay", "fill")) for f in faults)
    write_schedule(tmp_path / "faults.jsonl", faults)
    assert read_schedule(tmp_path / "faults.jsonl") == faults
    (tmp_path / "bad.jsonl").write_text('{"kind": "kill-cat", "gap": 1, "seconds": 0, "which": 0}\n')
    with pytest.raises(ValueError, match=r"bad\.jsonl: 'kill-cat' is not one of kill-generator"):
        read_schedule(tmp_path / "bad.jsonl")


def test_the_table_has_a_row_for_each_kind_with_its_times():
    outcomes = [Outcome("kill-learner", s, "from a checkpoint") for s in (4.0, 6.0, 11.0)]
    outcomes.append(Outcome("stop-queue", None, "in place"))
    assert table(outcomes).splitlines() == [
        "| fault | times | seconds, median (most) | in place | from a checkpoint | command run again |",
        "|---|---|---|---|---|---|",
        "| stop queue | 1 |  | 1 |  |  |",
        "| kill learner | 3 | 6.0 (11.0) |  | 3 |  |",
    ]
