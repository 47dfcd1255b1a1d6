"""What the command says of every kind of user's error: the last line of stderr, and status 1.

To add a row: a name, the overrides that go wrong (after those of a run that works), and what the line must match.
"""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest

from tests.e2e.command import COMMAND, environment, rlhf
from tests.tiny import save_policy, save_reward_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300, method="signal")]

TINY = [
    "data=files",
    "data.eval_size=4",
    "rollout.max_new_tokens=8",
    "rollout.prompts_per_item=2",
    "baseline.samples=2",
    "resources.generators={count: 1, cpus: 0.1, gpus: 0}",
    "resources.learner={count: 1, cpus: 0.1, gpus: 0}",
    "resources.reward={count: 1, cpus: 0.1, gpus: 0}",
    "logging={live: 'off', loggers: []}",
]
TRAIN = "{steps: 1, batch_size: 2, learning_rate: 1e-3, warmup_steps: 0, weight_decay: 0.0}"

# Files and models are made by `place`; {here} is its folder, {port} a port that is taken.
CASES = {
    # the configuration
    "unknown key": (["align.epochs=3"], r"configuration key 'align.epochs' is unknown; there are: steps, "),
    "unknown added key": (["+align.epochs=3"], r"configuration key 'align.epochs': "),
    "unknown group": (["algoritm=ppo"], r"configuration key 'algoritm' is unknown"),
    "unknown choice": (["algorithm=pppo"], r"Could not find 'algorithm/pppo' .* ppo reinforce_pp rloo$"),
    "unknown experiment": (["experiment=fast"], r"Could not find 'experiment/fast'"),
    "group chosen twice": (["+experiment=quick"], r"Multiple values for experiment"),
    "no value": (["align.steps"], r"'align.steps' is no KEY=VALUE"),
    "unquoted": (["data.prompts=my (1).jsonl"], r"data.prompts=my \(1\).jsonl cannot be read: .* quotes"),
    "unclosed list": (["align.kl_coef=[[0,1]"], r"align.kl_coef=\[\[0,1\] cannot be read"),
    "interpolation": (["output_dir='${nowhere}'"], r"configuration key 'output_dir': .*nowhere"),
    "wrong type": (["seed=many"], r"configuration key 'seed': Value 'many'"),
    "impossible number": (["data.train_size=0"], r"data.train_size=0 must be above 0"),
    "not a number": (["align.kl_coef=nan"], r"align.kl_coef=nan must be a finite number"),
    "no samples for PPO": (["algorithm=ppo", "align.samples_per_prompt=0"], r"align.samples_per_prompt=0 must be"),
    "unknown stage": (["stages=[sft,train]"], r"stages: 'train' is not one of"),
    "no stages": (["stages=[]"], r"stages is empty"),
    "unknown logger": (["logging.loggers=[wnadb]"], r"logging.loggers: wnadb is not one of tensorboard, wandb, "),
    "a hub that is off": (["hub.repo=me/it"], r"hub.repo=me/it cannot be pushed to, for HF_HUB_OFFLINE is set"),
    "sweep of a wrong value": (["-m", "seed=-1,-2"], r"seed=-1 must be within"),
    # the folder of outputs
    "output_dir is a file": (["output_dir={here}/file"], r"output_dir=.*/file: a file has that name; give a folder"),
    "output_dir below a file": (["output_dir={here}/file/x"], r"output_dir=.*/file/x: Not a directory; give"),
    "output_dir is read-only": (["output_dir=/proc/outputs"], r"output_dir=/proc/outputs: .*; give a folder"),
    "output_dir is empty": (["output_dir="], r"output_dir is empty: give a folder"),
    # data and models
    "missing file": (["data.prompts=nowhere.jsonl"], r"nowhere.jsonl: no such file"),
    "bad row": (["data.prompts={here}/bad.jsonl"], r"bad.jsonl:2: this line is not JSON"),
    "bad template": (["policy.chat_template='{% if %}'"], r"policy.chat_template"),
    "no such policy": (["policy.path={here}/nowhere"], r"policy.path=.*/nowhere: no such folder"),
    "empty folder of a model": (["policy.path={here}/empty"], r"policy.path=.*/empty: the folder holds no config"),
    "two labels": (
        ["reward_models.helpful.path={here}/two"],
        r"reward_models.helpful.path=.*/two: a reward model has one label, .* has 2",
    ),
    "prompt too long": (["data.prompts={here}/long.jsonl"], r"long.jsonl:2: a prompt of \d+ tokens .* 128 positions"),
    "a stage before it is there": (["stages=[evaluate]"], r"stage align has no output .* add it to stages"),
    # the machine
    "port in use": (["resources.dashboard_port={port}"], r"resources.dashboard_port=\d+: the port is in use"),
    "too many ranks": (["resources.learner.count=999", "align.prompts_per_step=1998"], r"has \d+ CPUs"),
    "too many CPUs": (["resources.generators.cpus=999"], r"the roles ask for .* CPUs together, there are"),
    "an address of jobs": (["resources.address='http://127.0.0.1:8265'"], r"is where jobs are submitted"),
    "an address of Ray Client": (["resources.address='ray://127.0.0.1:1'"], r"Ray Client .* is not supported"),
    "a dead address": (
        ["resources.address='127.0.0.1:1'"],
        r"resources.address=127.0.0.1:1: no Ray cluster answers there \(Connection refused\)",
    ),
    # found by an actor
    "NaN rewards": (
        ["reward_models.helpful.path={here}/infinite", "stages=[baseline]"],
        r"reward model 'helpful' returned (nan|-?inf) for .* \(in reward-helpful\)$",
    ),
    "NaN loss": (
        [
            "policy.path=null",
            "policy.init_from={here}/policy",
            "data.demonstrations={here}/demonstrations.jsonl",
            f"policy.training={TRAIN}",
            "policy.training.learning_rate=1e30",
            "policy.training.steps=4",
            "stages=[sft]",
        ],
        r"step \d+: the (loss|gradient) of .*learning rate .* \(in LearnerRank.fit\)$",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Good and bad files and models."""
    import torch
    from safetensors.torch import load_file, save_file

    here = tmp_path_factory.mktemp("errors")
    save_policy(here / "policy")
    for name, labels in (("helpful", 1), ("harmless", 1), ("two", 2), ("infinite", 1)):
        save_reward_model(here / name, seed=1, labels=labels)
    weights = load_file(here / "infinite" / "model.safetensors")
    weights["score.weight"] = torch.full_like(weights["score.weight"], torch.inf)
    save_file(weights, here / "infinite" / "model.safetensors", metadata={"format": "pt"})
    (here / "file").write_text("")
    (here / "empty").mkdir()
    words = ["tea", "bread", "lock", "yes", "no", "good", "bad", "the"]
    prompts = [
        {"prompt": [{"role": "user", "content": f"what is {a} {b} ?"}]} for a in words for b in words[:2]
    ]
    answers = [{**row, "completion": [{"role": "assistant", "content": "tea is good ."}]} for row in prompts]
    long = [{"prompt": [{"role": "user", "content": text}]} for text in ["what is tea ?", "tea " * 200]]
    for name, rows in (("prompts", prompts), ("demonstrations", answers), ("long", [*long, *prompts])):
        (here / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here / "bad.jsonl").write_text(json.dumps(prompts[0]) + "\n{'prompt': 1}\n")
    return here


def _given(place: Path) -> list[str]:
    return [
        f"data.prompts={place}/prompts.jsonl",
        f"policy.path={place}/policy",
        f"reward_models.helpful.path={place}/helpful",
        f"reward_models.harmless.path={place}/harmless",
    ]


@pytest.fixture(scope="module")
def ran(place, request) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """The commands of the rows that are asked for, two side by side."""
    asked = {i.callspec.params["name"] for i in request.session.items if "ran" in i.fixturenames}
    given = [*_given(place), f"output_dir={place}/outputs"]
    with socket.socket() as taken, ThreadPoolExecutor(2) as beside:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]

        def run(overrides: list[str]) -> subprocess.CompletedProcess[str]:
            placed = [o.replace("{here}", str(place)).replace("{port}", str(port)) for o in overrides]
            return rlhf(*TINY, *given, *placed, cwd=place, timeout=280)

        yield {name: beside.submit(run, row[0]) for name, row in CASES.items() if name in asked}
        beside.shutdown(cancel_futures=True)


@pytest.mark.parametrize("name", CASES)
def test_a_users_error_ends_in_one_line_that_says_what_is_wrong(ran, name):
    done = ran[name].result()
    lines = done.stderr.splitlines()
    assert done.returncode == 1, done.stderr[-2000:] + done.stdout[-2000:]
    assert re.match(f"error: .*{CASES[name][1]}", lines[-1]), done.stderr[-2000:]
    assert "Traceback" not in done.stderr, done.stderr[-3000:]


def test_a_folder_named_conf_is_not_ours(tmp_path):
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "__init__.py").write_text("")
    done = rlhf("--cfg", "job", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "transform: lsc" in done.stdout


def test_a_home_folder_is_one_folder(tmp_path):
    done = rlhf("output_dir='~/out puts'", "align.steps=0", cwd=tmp_path, HOME=str(tmp_path))
    assert done.stderr.startswith("error: align.steps=0"), done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["out puts"]


def _lines(pid: int) -> list[str]:
    """The command lines of a process's children; of one that has ended meanwhile, none."""
    found = []
    for child in psutil.Process(pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):
            found.append(" ".join(child.cmdline()))
    return found


@pytest.mark.parametrize("which", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_what_was_started(place, which, tmp_path):
    """While Ray starts, and once it is there: to the command alone, as a scheduler sends it, and to its whole group."""
    given = [*TINY, *_given(place), f"output_dir={tmp_path}", "logging.live=plain", "stages=[baseline]"]
    process = subprocess.Popen(
        [*COMMAND, *given],
        cwd=tmp_path,
        env=environment(PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    if which == signal.SIGTERM:
        next(line for line in process.stdout if "ray: " in line)
    else:
        while not any("gcs_server" in line for line in _lines(process.pid)):
            time.sleep(0.1)
    started = psutil.Process(process.pid).children(recursive=True)
    assert started
    (os.kill if which == signal.SIGTERM else os.killpg)(process.pid, which)
    assert process.wait(60) == 128 + which
    *said, last = process.stderr.read().splitlines()
    assert last == f"error: ended by {which.name}"
    assert len(said) == (which == signal.SIGTERM)
    assert all(line.startswith("SIGTERM: a checkpoint is written after this step") for line in said)
    _, left = psutil.wait_procs(started, timeout=30)
    assert not left
