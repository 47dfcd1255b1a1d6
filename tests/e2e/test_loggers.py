"""A run with loggers, ended by a signal and gone on with, then pushed: one run everywhere, and no secret anywhere."""

import json
import signal
import subprocess
import time
from importlib.util import find_spec

import numpy as np
import pytest

from rlhf.loggers.wandb_file import files_of, history
from tests.e2e.command import COMMAND, environment, rlhf
from tests.hub import hub
from tests.tiny import save_policy, save_reward_model

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(400, method="signal"),
    pytest.mark.skipif(
        not (find_spec("wandb") and find_spec("mlflow")), reason="wandb or mlflow is not installed"
    ),
]
SECRETS = {
    "HF_TOKEN": "hf_" + "Xx7" * 10,
    "WANDB_API_KEY": "f0e1d2c3b4" * 4,
    "MLFLOW_TRACKING_TOKEN": "token-of-mlflow",
    "OTHER_PASSWORD": "word-of-an-address",
}
STEPS = 12


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    here = tmp_path_factory.mktemp("given")
    words = ["tea", "bread", "lock", "yes", "no", "good", "bad", "the"]
    rows = [{"prompt": [{"role": "user", "content": f"what is {a} {b} ?"}]} for a in words for b in words[:3]]
    (here / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [
        "data=files", f"data.prompts={here}/prompts.jsonl", "data.eval_size=4",
        f"policy.path={save_policy(here / 'policy')}",
        f"reward_models.helpful.path={save_reward_model(here / 'helpful', 1)}",
        f"reward_models.harmless.path={save_reward_model(here / 'harmless', 2)}",
        "reward_models.harmless.canned=['no .']", "rollout.max_new_tokens=8", "rollout.prompts_per_item=2",
        "baseline.samples=4", f"align.steps={STEPS}", "align.prompts_per_step=4", "align.samples_per_prompt=3",
        "align.checkpoint={every: 4}", "evaluate.samples=2", "evaluate.judge_samples=4", "evaluate.best_of=[2]",
        "resources.generators={count: 1, cpus: 0.1, gpus: 0}", "resources.learner={count: 1, cpus: 0.1, gpus: 0}",
        "resources.reward={count: 1, cpus: 0.1, gpus: 0}",
        "logging={live: plain, loggers: [tensorboard, wandb, mlflow]}", "logging.wandb.mode=offline",
        "logging.mlflow.mode=offline",
        f"+logging.custom={{url: 'https://me:{SECRETS['OTHER_PASSWORD']}@host/x', api_key: plain-text-key}}",
        "hub.repo=me/aligned",
    ]  # fmt: skip


def rows_of(run, outputs) -> dict[str, list[tuple[int, float]]]:
    """The KL of each step, by what has it."""
    from mlflow.tracking import MlflowClient
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    align = run / "align"
    name = json.loads((align / "loggers" / "wandb.json").read_text())["id"]
    board = EventAccumulator(str(align / "tensorboard"))
    board.Reload()
    client = MlflowClient(f"sqlite:///{outputs}/mlflow.db")
    kept = json.loads((align / "loggers" / "mlflow.json").read_text())["id"]
    assert client.get_run(kept).info.status == "FINISHED"
    records = [json.loads(line) for line in (align / "metrics.jsonl").read_text().splitlines()]
    return {
        "record": [(r["step"], r["kl"]) for r in records],
        "tensorboard": [(e.step, e.value) for e in board.Scalars("kl")],
        "wandb": [(s, m["kl"]) for f in files_of(outputs / "wandb", name) for s, m in history(f).items()],
        "mlflow": sorted((m.step, m.value) for m in client.get_metric_history(kept, "kl")),
    }


def test_a_run_with_loggers_is_interrupted_finished_and_pushed(given, tmp_path):
    outputs = tmp_path / "outputs"
    with hub(SECRETS["HF_TOKEN"]) as server:
        changes = {
            "HF_ENDPOINT": server.url, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", **SECRETS,
            "HF_HOME": str(tmp_path / "home"),
        }  # fmt: skip
        command = subprocess.Popen(
            [*COMMAND, *given], cwd=tmp_path, env=environment(**changes), text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        unfinished = outputs / "store" / "unfinished" / "align"
        while not any(len(p.read_text().splitlines()) >= 5 for p in unfinished.glob("*/metrics.jsonl")):
            assert command.poll() is None, command.communicate()
            time.sleep(0.02)
        command.send_signal(signal.SIGTERM)
        first, _ = command.communicate(timeout=200)
        assert command.returncode == 143, first
        done = rlhf(*given, cwd=tmp_path, **changes)
        assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-3000:]
        assert "align: goes on from step" in done.stdout
        again = rlhf(*given, cwd=tmp_path, **changes)
        assert again.returncode == 0, again.stderr[-3000:]
    run = (outputs / "latest").resolve()
    found = rows_of(run, outputs)
    assert [step for step, _ in found["record"]] == list(range(1, STEPS + 1))
    for rows in found.values():
        assert [step for step, _ in rows] == list(range(1, STEPS + 1))
        np.testing.assert_allclose(
            [v for _, v in rows], [v for _, v in found["record"]], rtol=1e-5, atol=1e-6
        )
    card = (run / "policy" / "README.md").read_text()
    assert str(tmp_path) not in card
    assert server.files == {
        str(p.relative_to(run / "policy")): p.read_bytes() for p in (run / "policy").rglob("*") if p.is_file()
    }
    assert f"hub: {server.url}/me/aligned" in done.stdout
    said = first + done.stdout + done.stderr + again.stdout + again.stderr
    files = [p for p in outputs.rglob("*") if p.is_file() and not p.is_symlink()]
    assert len(files) > 50
    for secret in (*SECRETS.values(), "plain-text-key"):
        assert secret not in said
        assert not [p for p in files if secret.encode() in p.read_bytes()]
