"""Loggers have what metrics.jsonl has, each step once, by the readers of their own libraries; and no secret."""

from __future__ import annotations

import math
import os
import tempfile
import threading
from importlib.util import find_spec
from pathlib import Path

import pytest

from rlhf import plugins
from rlhf.loggers import kinds
from rlhf.loggers.logger import Run, Unreachable
from rlhf.loggers.loggers import Loggers, check_loggers, send_figures
from rlhf.loggers.wandb_file import files_of, history, messages
from rlhf.logs import MetricsWriter, read_metrics
from tests.servers import serving
from tests.unit.test_config import config

os.environ.setdefault("TRACKIO_DIR", tempfile.mkdtemp())  # read when the library is imported
MODULES = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow", "trackio": "trackio"}
ALL = [
    pytest.param(
        kind, marks=pytest.mark.skipif(find_spec(module) is None, reason=f"{module} is not installed")
    )
    for kind, module in MODULES.items()
]
SECRETS = {
    "WANDB_API_KEY": "0a1b2c3d4e" * 4,
    "MLFLOW_TRACKING_TOKEN": "mlflow-token-of-this-test",
    "HF_TOKEN": "hf_" + "Zz9" * 10,
    "TRACKIO_WRITE_TOKEN": "trackio-token-of-this-test",
}
FIGURES = {"final/kl": 2.5, "final/win_rate/joint/aligned": 0.4}


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    for name in ("WANDB_DIR", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def settings(kind: str, *more: str):
    modes = [f"logging.{name}.mode=offline" for name in ("wandb", "mlflow")]
    return config(f"logging.loggers=[{kind}]", "logging.tags=[one]", *modes, *more).logging


def row(step: int, attempt: int = 1) -> dict[str, float]:
    return {"step": step, "kl": 0.1 * step, "utility/combined": attempt + 1 / step, "p_good/a": math.nan}


class Alignment:
    """A record that is written with its loggers, as the align stage does."""

    def __init__(self, folder: Path, settings) -> None:
        self.folder, self.settings, self.outputs, self.said = folder / "align", settings, folder, []
        self.name = f"{folder.parent.name}-{folder.name}"

    def run(self, step: int) -> Run:
        given = {"seed": 0, "align": {"kl_coef": [[0, 0.3], [5, 0.1]]}, "note": "x" * 600}
        return Run(self.name, given, self.folder, step)

    def train(self, begin: int, end: int, attempt: int = 1) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        with Loggers(self.settings, self.outputs, self.run(begin), self.said.append) as loggers:
            writer = MetricsWriter(self.folder, begin)
            for step in range(begin + 1, end + 1):
                writer.write(row(step, attempt))
                loggers.write(step, row(step, attempt))
            writer.close()

    def report(self) -> None:
        steps = len(read_metrics(self.folder))
        send_figures(self.settings, self.outputs, self.run(steps), FIGURES, self.said.append)


def tensorboard_rows(run: Alignment) -> list[tuple[str, int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run.folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return [(tag, e.step, e.value) for tag in events.Tags()["scalars"] for e in events.Scalars(tag)]


def wandb_rows(run: Alignment) -> list[tuple[str, int, float]]:
    found = []
    for path in files_of(run.outputs / "wandb", run.run(0).kept("wandb")["id"]):
        for step, metrics in history(path).items():
            found += [(name, step, value) for name, value in metrics.items() if not name.startswith("_")]
        for message in messages(path):
            for item in message.summary.update if message.WhichOneof("record_type") == "summary" else ():
                if item.key.startswith("final/"):
                    found.append((item.key, 0, float(item.value_json)))
    return found


def mlflow_rows(run: Alignment) -> list[tuple[str, int, float]]:
    from mlflow.tracking import MlflowClient

    client, name = MlflowClient(f"sqlite:///{run.outputs}/mlflow.db"), run.run(0).kept("mlflow")["id"]
    experiment = client.get_experiment_by_name("rlhf")
    assert [r.info.run_id for r in client.search_runs([experiment.experiment_id])] == [name]
    return [
        (key, m.step, m.value)
        for key in client.get_run(name).data.metrics
        for m in client.get_metric_history(name, key)
    ]


def trackio_rows(run: Alignment) -> list[tuple[str, int, float]]:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    assert [found.name for found in trackio.Api().runs("rlhf")].count(run.name) == 1
    logs = SQLiteStorage.get_logs("rlhf", run.name)
    own = [(n, r["step"], v) for r in logs for n, v in r.items() if n not in ("step", "timestamp")]
    return own + [("step", r["step"], r["step"]) for r in logs if "kl" in r]


READ = {"tensorboard": tensorboard_rows, "wandb": wandb_rows, "mlflow": mlflow_rows, "trackio": trackio_rows}


def check_equal(kind: str, run: Alignment) -> None:
    """The logger has every value of the record at its step, once, and the record no other."""
    found = [one for one in READ[kind](run) if not one[0].startswith("final/")]
    expected = {(name, int(m["step"])): v for m in read_metrics(run.folder) for name, v in m.items()}
    assert sorted((name, step) for name, step, _ in found) == sorted(expected)
    for name, step, value in found:
        assert value == pytest.approx(expected[name, step], rel=1e-6, nan_ok=True)  # TensorBoard has float32


def figures(kind: str, run: Alignment) -> dict[str, float]:
    found = [(name, value) for name, _, value in READ[kind](run) if name.startswith("final/")]
    assert len(found) == len(dict(found))
    return dict(found)


@pytest.mark.parametrize("kind", ALL)
def test_a_run_that_is_interrupted_is_one_run_with_each_step_once(kind, tmp_path):
    run = Alignment(tmp_path / kind, settings(kind))
    check_loggers(run.settings, run.outputs, False, run.said.append)
    run.train(0, 5)
    check_equal(kind, run)
    run.train(3, 7)  # from a checkpoint of step 3: 4 and 5 are trained again
    check_equal(kind, run)
    run.report()
    run.report()
    check_equal(kind, run)
    assert figures(kind, run) == pytest.approx(FIGURES)
    told = "has steps up to 5 of before; those that are trained again are not sent twice"
    assert run.said == ([] if kind == "tensorboard" else [f"{kind}: {told}"])


def test_tensorboard_shows_what_was_trained_again(tmp_path):
    run = Alignment(tmp_path, settings("tensorboard"))
    run.train(0, 5)
    run.train(3, 7, attempt=2)
    check_equal("tensorboard", run)


@pytest.mark.parametrize("kind", ALL)
def test_a_logger_gets_the_steps_that_it_lacks(kind, tmp_path):
    """Of a time without it, and of a run that had ended before it was asked for."""
    run = Alignment(tmp_path / kind, settings("tensorboard", "logging.loggers=[]"))
    run.train(0, 4)
    run.settings = settings(kind)
    run.train(4, 6)
    check_equal(kind, run)
    late = Alignment(tmp_path / f"{kind}-late", settings("tensorboard", "logging.loggers=[]"))
    late.train(0, 3)
    late.settings = run.settings
    late.report()
    check_equal(kind, late)
    assert figures(kind, late) == pytest.approx(FIGURES)


@pytest.mark.parametrize("kind", ALL)
def test_no_secret_is_written(kind, tmp_path):
    run = Alignment(tmp_path / kind, settings(kind))
    run.train(0, 2)
    run.report()
    places = [run.outputs, Path(os.environ["TRACKIO_DIR"])]
    files = [path for place in places for path in place.rglob("*") if path.is_file()]
    assert len(files) > 1
    for path in files:
        content = path.read_bytes()
        assert not [name for name, secret in SECRETS.items() if secret.encode() in content], path


class Broken:
    """A logger that fails, or hangs, where it is told to."""

    later = "do it again"
    wrote: list[int] = []  # noqa: RUF012 - of all of them
    hang = threading.Event()

    def __init__(self, settings, outputs) -> None:
        self.at = settings.custom["at"]

    def check(self) -> None:
        if self.at == "check":
            raise Unreachable("connection refused")

    def begin(self, run: Run) -> int:
        if self.at == "begin":
            raise OSError(f"no route\nto host, with {SECRETS['WANDB_API_KEY']}")
        return 0

    def write(self, step, metrics) -> None:
        if self.at == "hang":
            self.hang.wait()
        if self.at == "write" and step == 2:
            raise RuntimeError("quota")
        self.wrote.append(step)

    def finish(self, step, figures) -> None: ...

    def close(self) -> None: ...


def broken(at: str, *more: str):
    Broken.wrote.clear()
    return settings("tests.unit.test_loggers:Broken", f"+logging.custom.at={at}", *more)


@pytest.mark.parametrize(
    ("at", "why"), [("write", "RuntimeError: quota"), ("begin", "no route to host, with ***")]
)
def test_a_logger_that_fails_ends_no_run(at, why, tmp_path):
    run = Alignment(tmp_path, broken(at))
    run.train(0, 4)
    assert [m["step"] for m in read_metrics(run.folder)] == [1, 2, 3, 4]
    assert Broken.wrote == ([1] if at == "write" else [])
    (told,) = run.said
    assert why in told
    assert "all are in align/metrics.jsonl; to send them: do it again" in told
    Broken.wrote.clear()
    run.settings = broken("nowhere")
    run.report()
    assert Broken.wrote == [1, 2, 3, 4]
    run.report()
    assert Broken.wrote == [1, 2, 3, 4]


def test_a_logger_that_hangs_is_waited_for_no_longer_than_asked(tmp_path):
    run = Alignment(tmp_path, broken("hang", "logging.patience=0.2"))
    try:
        run.train(0, 3)
    finally:
        Broken.hang.set()
    assert len(read_metrics(run.folder)) == 3
    assert "it has not taken all of them in 0.2 s (logging.patience)" in run.said[0]


def test_a_service_that_does_not_answer_is_an_error_at_the_start_only(tmp_path):
    said: list[str] = []
    with pytest.raises(ValueError, match=r"logging.loggers: .*Broken does not answer \(connection refused\)"):
        check_loggers(broken("check"), tmp_path, False, said.append)
    check_loggers(broken("check"), tmp_path, True, said.append)
    assert said == [
        "tests.unit.test_loggers:Broken does not answer: metrics stay in align/metrics.jsonl until it does"
    ]


@pytest.mark.parametrize(
    ("kind", "more", "line"),
    [
        (
            "magic",
            [],
            "logging.loggers: magic is not one of tensorboard, wandb, mlflow, trackio, nor package.mod",
        ),
        ("no.where:C", [], "logging.loggers: no.where:C cannot be imported: ModuleNotFoundError"),
        (
            "json:JSONDecoder",
            [],
            "logging.loggers: json:JSONDecoder is no logger .*: it lacks check, begin, write",
        ),
        ("wandb", ["logging.wandb.mode=on"], "logging.wandb.mode=on is not one of online, offline"),
        (
            "mlflow",
            ["logging.mlflow.mode=online"],
            "logging.mlflow.uri=None must be the address of a tracking server",
        ),
        (
            "mlflow",
            ["logging.mlflow.mode=online", "logging.mlflow.uri='https://me:word@host'"],
            r"logging.mlflow.uri=https://\*\*\*@host has a secret in it: leave it out, and set MLFLOW_TRACKING_TOKEN",
        ),
        (
            "mlflow",
            ["logging.mlflow.uri='http://host'"],
            "logging.mlflow.uri=http://host must be a file, sqlite://",
        ),
        (
            "trackio",
            ["logging.trackio.space=a/b"],
            "logging.trackio.mode=offline keeps metrics on this machine",
        ),
        (
            "trackio",
            ["logging.trackio.mode=online", "logging.trackio.server='http://h?write_token=abcdefgh'"],
            r"logging.trackio.server=http://h\?write_token=\*\*\* has a secret in it: .* TRACKIO_WRITE_TOKEN",
        ),
    ],
)
def test_a_setting_that_cannot_work_is_refused(kind, more, line, tmp_path):
    with pytest.raises(ValueError, match=line) as error:
        check_loggers(settings(kind, *more), tmp_path, False, print)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["wandb", "mlflow", "trackio"])
def test_a_library_that_is_not_installed_is_named_with_how_to_install_it(kind, tmp_path, monkeypatch):
    import importlib

    def missing(name: str):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    made = kinds.make_loggers(settings(kind), tmp_path)  # whose own modules are there
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ValueError, match=rf"logging.loggers: {kind} needs .* pip install 'rlhf\[{kind}\]'"):
        made[kind].check()


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_without_a_key_or_a_network(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    online = settings("wandb", "logging.wandb.mode=online")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    key = os.environ.pop("WANDB_API_KEY")
    with pytest.raises(ValueError, match=r"logging.wandb.mode=online needs a key: set WANDB_API_KEY"):
        check_loggers(online, tmp_path, False, print)
    monkeypatch.setenv("WANDB_API_KEY", "short")
    with pytest.raises(
        ValueError, match=r"logging.wandb.mode=online: the key is refused .*: set WANDB_API_KEY"
    ):
        check_loggers(online, tmp_path, False, print)
    monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(ValueError, match=r"wandb does not answer .*set it to mode=offline"):
        check_loggers(online, tmp_path, False, print)


@pytest.mark.skipif(find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb_refused_by_the_server(tmp_path, monkeypatch):
    with serving(lambda _: (401, {"errors": [{"message": "permission denied"}]})) as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        with pytest.raises(ValueError, match=r"mode=online: the key is refused .*permission denied"):
            check_loggers(settings("wandb", "logging.wandb.mode=online"), tmp_path, False, print)


@pytest.mark.skipif(find_spec("mlflow") is None, reason="mlflow is not installed")
def test_mlflow_without_a_network_or_refused_by_the_server(tmp_path):
    def online(url: str):
        return settings("mlflow", "logging.mlflow.mode=online", f"logging.mlflow.uri='{url}'")

    with pytest.raises(ValueError, match=r"mlflow does not answer"):
        check_loggers(online("http://127.0.0.1:9"), tmp_path, False, print)
    with (
        serving(lambda _: (401, {"error_code": "UNAUTHENTICATED"})) as server,
        pytest.raises(
            ValueError, match=r"logging.mlflow: the server refuses the key \(MLFLOW_TRACKING_TOKEN"
        ),
    ):
        check_loggers(online(server.url), tmp_path, False, print)
    assert server.asked[0].headers["Authorization"] == f"Bearer {SECRETS['MLFLOW_TRACKING_TOKEN']}"


def test_an_installed_package_may_bring_a_kind(monkeypatch):
    from importlib.metadata import EntryPoint

    point = EntryPoint("mine", "tests.unit.test_loggers:Broken", kinds.GROUP)
    monkeypatch.setattr(plugins, "entry_points", lambda group: [point] if group == kinds.GROUP else [])
    assert kinds.logger_class("mine") is Broken
