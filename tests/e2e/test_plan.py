"""`rlhf plan` as a user calls it."""

import json
import re

import pytest

from tests import tiny
from tests.e2e.command import rlhf

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300, method="signal")]


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("plan")
    models = [f"policy.path={tiny.save_policy(folder / 'policy')}"]
    for seed, name in enumerate(("helpful", "harmless"), 1):
        models.append(f"reward_models.{name}.path={tiny.save_reward_model(folder / name, seed)}")
    rows = [{"prompt": [{"role": "user", "content": f"what is {word} ?"}]} for word in tiny.WORDS[2:14]]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "data=files",
        f"data.prompts={folder / 'prompts.jsonl'}",
        "data.eval_size=2",
        *models,
        "align.prompts_per_step=4",
        "align.steps=1000",
        "rollout.prompts_per_item=4",
        "rollout.max_new_tokens=8",
        "resources.generators={count: 1, cpus: 0.1, gpus: 0}",
        "resources.learner={count: 1, cpus: 0.1, gpus: 0}",
        f"output_dir={folder / 'out'}",
    ], folder / "out"


def test_the_plan_comes_without_a_ray_and_leaves_no_run(given):
    overrides, out = given
    done = rlhf("plan", *overrides)
    assert done.returncode == 0, done.stderr
    assert re.search(r"a step: 4 prompts .* with 8 responses of 8 tokens: \d+ tokens", done.stdout)
    assert re.search(r"learner rank +\d\.\d\d GiB: ", done.stdout)
    assert re.search(r"this node: \d+\.\d\d GiB .*; free are ", done.stdout)
    assert "ray:" not in done.stdout
    assert not list(out.glob("runs/*"))


def test_the_time_comes_from_steps_that_are_run(given):
    overrides, out = given
    done = rlhf("plan", *overrides, "plan.measure=true")
    assert done.returncode == 0, done.stderr
    measured = re.search(r"measured: ([\d.]+) s a step, (\d+) tokens a response", done.stdout)
    assert measured, done.stdout
    assert 1 <= int(measured[2]) <= 8
    told = re.search(
        r"time, if responses stay as long: baseline .*, align ([\d.]+) (s|min|h), evaluate", done.stdout
    )
    assert told, done.stdout
    seconds = float(told[1]) * {"s": 1, "min": 60, "h": 3600}[told[2]]
    assert seconds == pytest.approx(1000 * float(measured[1]), rel=0.15, abs=60)
    assert {path.name for path in out.iterdir()} <= {"store", "runs"}
    assert not list(out.glob("runs/*"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["policy.path=/nowhere"], r"error: policy\.path=/nowhere: no such folder"),
        (["plan.response_tokens=0"], r"error: plan\.response_tokens=0 must be above 0"),
        (
            ["deepspeed.offload_optimizer=true"],
            r"error: deepspeed\.offload_optimizer=true needs a ZeRO stage",
        ),
        (["-m", "seed=1,2"], r"error: rlhf plan is no sweep"),
    ],
)
def test_bad_input_is_one_line(given, overrides, said):
    done = rlhf("plan", *given[0], *overrides)
    assert done.returncode == 1
    assert re.match(said, done.stderr.splitlines()[-1]), done.stderr
