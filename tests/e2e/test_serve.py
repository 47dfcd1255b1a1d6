"""`rlhf serve` and those who call it, unmodified: TRL's trainer, OpenRLHF's and slime's requests, our source."""

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import numpy as np
import psutil
import pytest
import requests

from rlhf.clients import RewardFunction, compute_score
from rlhf.models.reward import RewardScorer
from tests.e2e.command import COMMAND, environment, rlhf
from tests.tiny import save_policy, save_reward_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(400, method="signal")]

TOKEN = "a-token-of-tests"
PROMPT, RESPONSES = "what is tea ?", ["good .", "bad bread and the lock .", "yes"]
TALK = [{"role": "user", "content": "how do i make bread ?"}]
RULE = """
def short(completions, limit, **_):
    return [len(c if isinstance(c, str) else c[-1]["content"]) < limit for c in completions]

def right(completions, label=None, **_):
    if label is None:
        return [None] * len(completions)
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [None if wanted is None else wanted in text for text, wanted in zip(texts, label)]
"""


class Server:
    def __init__(self, folder: Path, *overrides: str) -> None:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / "log"
        given = [
            "serve", "data=none", f"policy.path={folder}/policy", f"reward_models.helpful.path={folder}/helpful",
            f"reward_models.harmless.path={folder}/harmless", "reward_models.harmless.canned=['no .','i do no bad .']",
            f"output_dir={folder}/out", "logging.live=plain", f"serve.port={self.port}", "serve.token_env=MY_TOKEN",
            "rollout.max_new_tokens=8", "baseline.samples=16", *overrides,
        ]  # fmt: skip
        self.process = subprocess.Popen(
            [*COMMAND, *given],
            cwd=folder,
            env=environment(MY_TOKEN=TOKEN, PYTHONUNBUFFERED="1"),
            stdout=self.log.open("w"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end = time.monotonic() + 200
        while self.process.poll() is None and time.monotonic() < end:
            if f"serve: {self.url}" in self.log.read_text():
                return
            time.sleep(0.3)
        self.stop()
        raise AssertionError(self.log.read_text())

    def post(self, path: str, body: object, **more) -> requests.Response:
        head = {"Authorization": f"Bearer {TOKEN}"}
        return requests.post(f"{self.url}{path}", json=body, headers=head, timeout=120, **more)

    def stop(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.process.wait(90)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    save_policy(folder / "policy")
    for seed, name in enumerate(("helpful", "harmless"), 1):
        save_reward_model(folder / name, seed)
    (folder / "rule.py").write_text(RULE)
    return folder


@pytest.fixture(scope="module")
def server(folder):
    found = Server(
        folder,
        "+source@reward_models.short=function", "reward_models.short.path=rule.py:short",
        "+reward_models.short.arguments.limit=10", "reward_models.short.scale=verdict",
        "+source@reward_models.right=function", "reward_models.right.path=rule.py:right",
        "reward_models.right.scale=verdict", "resources.reward.count=2",
    )  # fmt: skip
    yield found
    found.stop()


@pytest.fixture(scope="module")
def scorers(folder):
    return {n: RewardScorer(n, str(folder / n)) for n in ("helpful", "harmless")}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_the_batch_call_is_the_method(server, scorers):
    """Raw rewards against the models themselves, r_ref of the canned ones too, and the rest by hand from them."""
    body = {
        "conversations": [
            {"prompt": PROMPT, "responses": RESPONSES, "columns": {"label": "es"}},
            {"prompt": TALK, "responses": RESPONSES[:1]},
        ]
    }
    first, second = server.post("/v1/rewards", body).json()["results"]
    for name, scorer in scorers.items():
        expected = scorer.score([PROMPT] * 3, RESPONSES)
        np.testing.assert_allclose(first["raw"][name], expected, atol=1e-4)
        np.testing.assert_allclose(second["raw"][name], scorer.score([TALK], RESPONSES[:1]), atol=1e-4)
    assert first["raw"]["short"] == [1.0, 0.0, 1.0]
    assert first["raw"]["right"] == [0.0, 0.0, 1.0]
    assert second["raw"]["right"] == [None]
    canned = scorers["harmless"].score([PROMPT] * 2, ["no .", "i do no bad ."]).mean()
    assert first["reference"]["harmless"] == pytest.approx(canned, abs=1e-4)
    for i in range(3):
        p = [sigmoid(first["raw"][n][i] - first["reference"][n]) for n in scorers]
        p += [0.05 + 0.9 * first["raw"][n][i] for n in ("short", "right")]
        assert [first["p_good"][n][i] for n in first["p_good"]] == pytest.approx(p, rel=1e-4)
        assert first["combined"][i] == pytest.approx(np.log(p).sum(), rel=1e-4)
    assert second["utility"]["right"] == [None]
    known = [second["utility"][n][0] for n in ("helpful", "harmless", "short")]
    assert second["combined"][0] == pytest.approx(sum(known), rel=1e-4)


def test_a_reference_is_made_once_and_stays(server):
    body = {"conversations": [{"prompt": "is the lock open ?", "responses": ["yes"]}]}
    with ThreadPoolExecutor(8) as threads:
        every = list(threads.map(lambda _: server.post("/v1/rewards", body).json()["results"][0], range(8)))
    for key in ("helpful", "harmless"):
        assert np.ptp([found["reference"][key] for found in every]) == 0
        assert np.ptp([found["raw"][key][0] for found in every]) < 1e-5


def test_the_same_prompt_with_other_columns_has_its_own_reference(server):
    """The first that asks decides nothing for others."""
    prompt = "do the lock and the bread make tea ?"
    one = {"prompt": prompt, "responses": ["yes"]}
    body = {"conversations": [one, one | {"columns": {"label": "es"}}, one | {"columns": {"label": "no"}}]}
    for _ in range(2):
        plain, one, other = server.post("/v1/rewards", body).json()["results"]
        assert [r["raw"]["right"] for r in (plain, one, other)] == [[None], [1.0], [0.0]]
        assert all(np.isfinite(r["combined"][0]) for r in (plain, one, other))


def test_an_estimator_that_dies_is_filled_again(server):
    body = {"conversations": [{"prompt": PROMPT, "responses": ["yes"]}]}
    before = server.post("/v1/rewards", body).json()["results"][0]
    children = psutil.Process(server.process.pid).children(recursive=True)
    (estimator,) = [c for c in children if "BaselineEstimator" in " ".join(c.cmdline())]
    estimator.kill()
    end = time.monotonic() + 60
    while (answer := server.post("/v1/rewards", body)).status_code != 200:
        assert answer.status_code == 503
        assert time.monotonic() < end
    after = answer.json()["results"][0]
    assert after["combined"] == pytest.approx(before["combined"], abs=1e-5)


def test_openrlhfs_sequence(server):
    """As its executor posts it: one text at a time, without headers, then whole batches."""
    url = f"{server.url}/get_reward?token={TOKEN}"

    async def fetch(session, rows):
        query, prompts, labels = (list(column) for column in zip(*rows, strict=True))
        body = {"query": query, "prompts": prompts, "labels": labels}
        async with session.post(url, json=body, timeout=aiohttp.ClientTimeout(total=180)) as answer:
            answer.raise_for_status()
            return await answer.json()

    async def sequence():
        rows = [(f"{PROMPT}{r}<|im_end|>", PROMPT, "good") for r in RESPONSES]
        async with aiohttp.ClientSession() as session:
            single = await asyncio.gather(*(fetch(session, [row]) for row in rows))
            return single, await fetch(session, rows)

    single, batch = asyncio.run(sequence())
    assert [s["rewards"][0] for s in single] == pytest.approx(batch["rewards"], abs=1e-5)
    assert batch["scores"] == batch["rewards"]
    assert batch["extra_logs"]["right"] == [1.0, 0.0, 0.0]
    expected = server.post("/v1/rewards", {"conversations": [
        {"prompt": PROMPT, "responses": RESPONSES, "columns": {"label": "good"}}]}).json()["results"][0]  # fmt: skip
    assert batch["rewards"] == pytest.approx(expected["combined"], abs=1e-5)


def test_slimes_sample_and_vllms_classes(server):
    combined = requests.post(
        f"{server.url}/slime?token={TOKEN}",
        json={"prompt": TALK, "response": "yes", "label": None},
        timeout=60,
    ).json()
    talk = [*TALK, {"role": "assistant", "content": "yes"}]
    found = server.post("/classify", {"model": "any", "messages": talk}).json()["data"][0]
    known = [p for p in found["probs"] if p is not None]
    assert found["num_classes"] == 4
    assert len(known) == 3
    assert combined == pytest.approx(np.log(known).sum(), rel=1e-4)


def test_trls_trainer_trains_with_it(server, folder, tmp_path, monkeypatch):
    """As a user of TRL writes it, with three steps."""
    monkeypatch.setenv("RLHF_SERVE_TOKEN", TOKEN)
    script = tmp_path / "train.py"
    script.write_text(f"""
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from rlhf.clients import RewardFunction

data = Dataset.from_list([{{"prompt": [{{"role": "user", "content": t}}], "label": "good"}} for t in
                          ("what is tea ?", "what is bread ?", "is the lock good ?", "how do i make tea ?")])
arguments = GRPOConfig(output_dir={str(tmp_path / "trl")!r}, max_steps=3, per_device_train_batch_size=4,
    num_generations=4, max_completion_length=6, learning_rate=1e-3, report_to=[], use_cpu=True, bf16=False,
    logging_steps=1, save_strategy="no", disable_tqdm=True)
trainer = GRPOTrainer(model=AutoModelForCausalLM.from_pretrained({str(folder / "policy")!r}),
    processing_class=AutoTokenizer.from_pretrained({str(folder / "policy")!r}), args=arguments, train_dataset=data,
    reward_funcs=[RewardFunction({server.url!r}, columns=("label",)), RewardFunction({server.url!r}, value="raw.right",
    columns=("label",))])
trainer.train()
import json
print(json.dumps([h for h in trainer.state.log_history if "reward" in h]))
""")
    done = subprocess.run(
        [sys.executable, str(script)], env=environment(RLHF_SERVE_TOKEN=TOKEN), capture_output=True, text=True,
        timeout=300, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    history = json.loads(done.stdout.splitlines()[-1])
    assert len(history) == 3
    for step in history:
        combined, right = (step[f"rewards/rlhf {v}/mean"] for v in ("combined", "raw.right"))
        assert combined < 0
        assert 0 <= right <= 1
        assert step["reward"] == pytest.approx(combined + right, abs=1e-4)


def test_verls_function_and_named_values(server, monkeypatch):
    monkeypatch.setenv("RLHF_SERVE_URL", server.url)
    monkeypatch.setenv("RLHF_SERVE_TOKEN", TOKEN)
    found = compute_score("tea", "yes", "es", {"prompt": PROMPT})
    assert found["short"] == 1.0
    assert "right" not in found  # it reads another column
    assert found["score"] == pytest.approx(RewardFunction()([PROMPT], ["yes"])[0], abs=1e-5)
    assert RewardFunction(value="raw.right")([PROMPT], ["yes"]) == [None]
    with pytest.raises(ValueError, match=r"has no 'raw.wrong': it gives helpful, harmless, short, right"):
        RewardFunction(value="raw.wrong")([PROMPT], ["yes"])
    with pytest.raises(ValueError, match="extra_info has no 'prompt'"):
        compute_score("tea", "yes", "es")
    monkeypatch.setenv("RLHF_SERVE_TOKEN", "another")
    with pytest.raises(ValueError, match=r"refused the call \(401\)"):
        RewardFunction()([PROMPT], ["yes"])


def test_a_fault_of_a_function_is_the_callers(server):
    body = {"conversations": [{"prompt": PROMPT, "responses": ["yes"], "columns": {"label": 3}}]}
    answer = server.post("/v1/rewards", body)
    assert answer.status_code == 422
    assert "raised TypeError" in answer.json()["detail"]
    assert "response 'yes'" in answer.json()["detail"]


def test_no_input_brings_it_down(server):
    """schemathesis, as a user calls it, against the OpenAPI page."""
    run = [
        str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json", "-H",
        f"Authorization: Bearer {TOKEN}", "--checks", "not_a_server_error", "--max-examples", "15", "--phases",
        "examples,coverage,fuzzing", "--seed", "1", "--no-color", "--request-timeout", "60",
    ]  # fmt: skip
    done = subprocess.run(run, capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stdout[-4000:]
    assert requests.get(f"{server.url}/health", timeout=30).status_code == 200


def test_a_replica_that_dies_under_load_fails_no_request(server):
    """32 clients, while one of two replicas of a reward model is killed."""
    found, faults, over = [], [], threading.Event()

    def client(number: int) -> None:
        while not over.is_set():
            body = {
                "conversations": [
                    {"prompt": PROMPT, "responses": [RESPONSES[number % 3]], "columns": {"label": "x"}}
                ]
            }
            answer = server.post("/v1/rewards", body)
            if answer.status_code == 200:
                found.append((number % 3, answer.json()["results"][0]["combined"][0]))
            else:
                faults.append((answer.status_code, answer.text))

    with ThreadPoolExecutor(16) as threads:
        clients = [threads.submit(client, n) for n in range(16)]
        time.sleep(3)
        children = psutil.Process(server.process.pid).children(recursive=True)
        replicas = [c for c in children if "reward-helpful" in " ".join(c.cmdline())]
        assert len(replicas) == 2, [c.cmdline() for c in children]
        replicas[0].kill()
        time.sleep(10)
        over.set()
        for one in clients:
            one.result()
    assert faults == []
    assert len(found) > 50
    for kind in range(3):
        values = [v for k, v in found if k == kind]
        assert np.ptp(values) < 1e-4


def test_our_http_source_takes_rewards_from_it(server, folder, tmp_path):
    """A whole run whose rewards come from the server."""
    rows = [{"prompt": f"what is {word} ?"} for word in ("tea", "bread", "lock", "good", "bad", "the")]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    sources = [
        f"+source@reward_models.{n}=http reward_models.{n}.url={server.url}/v1/rewards reward_models.{n}.protocol=rlhf "
        f"reward_models.{n}.reward={n} reward_models.{n}.token_env=MY_TOKEN reward_models.{n}.scale={scale} "
        f"reward_models.{n}.error_rate=0.05"
        for n, scale in (("helpful", "bradley_terry"), ("short", "verdict"))
    ]
    done = rlhf(
        "data=files", f"data.prompts={tmp_path}/prompts.jsonl", "data.eval_size=2", f"policy.path={folder}/policy",
        "reward_models=none", *" ".join(sources).split(), "rollout.max_new_tokens=8", "rollout.prompts_per_item=2",
        "baseline.samples=8", "align.steps=2", "align.prompts_per_step=4", "evaluate.best_of=[2]", "evaluate.samples=4",
        f"output_dir={tmp_path}/out", cwd=tmp_path, MY_TOKEN=TOKEN,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    summary = json.loads((tmp_path / "out/latest/summary.json").read_text())
    assert summary["rewards"]["short"]["kind"] == "http"
    kept = "".join(p.read_text(errors="ignore") for p in (tmp_path / "out/latest").glob("*.*"))
    assert TOKEN not in kept


def test_the_last_requests_are_answered(server):
    """SIGTERM while requests are under way: they are answered, then all ends with 143 and nothing is left."""
    body = {"conversations": [{"prompt": PROMPT, "responses": RESPONSES * 40, "columns": {"label": "x"}}]}
    started = psutil.Process(server.process.pid).children(recursive=True)
    with ThreadPoolExecutor(4) as threads:
        last = [threads.submit(server.post, "/v1/rewards", body) for _ in range(4)]
        time.sleep(0.1)
        os.kill(server.process.pid, signal.SIGTERM)
        assert [answer.result().status_code for answer in last] == [200] * 4
    assert server.process.wait(90) == 143
    assert server.log.read_text().splitlines()[-1] == "error: ended by SIGTERM"
    _, left = psutil.wait_procs(started, timeout=30)
    assert not left


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["serve.token_env=NOT_SET"],
            "error: serve.token_env=NOT_SET: there is no such environment variable",
        ),
        (["serve.port=PORT"], "error: serve.port=PORT: the port is in use"),
        (["serve.unseen=guess"], "error: serve.unseen=guess is not one of sample, refuse"),
    ],
)
def test_what_cannot_be_served_is_refused(folder, overrides, line):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen()
        port = str(s.getsockname()[1])
        given = [o.replace("PORT", port) for o in overrides]
        models = [f"reward_models.{n}.path={folder}/{n}" for n in ("helpful", "harmless")]
        done = rlhf("serve", "data=none", f"policy.path={folder}/policy", *models, *given, cwd=folder)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(line.replace("PORT", port))
