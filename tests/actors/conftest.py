"""One local Ray for the session, and small jobs on it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from rlhf.config import Config
from rlhf.config_checks import typed

if TYPE_CHECKING:
    from actors.session import Session
    from actors.stages.job import Job

TINY = [
    "data=files",
    "data.eval_size=4",
    "rollout.max_new_tokens=8",
    "rollout.prompts_per_item=2",
    "baseline.samples=4",
    "align.steps=3",
    "evaluate.judge_samples=4",
    "align.prompts_per_step=4",
    "align.samples_per_prompt=3",
    "align.learning_rate=0.01",
    "evaluate.samples=2",
    "evaluate.best_of=[2]",
    "resources.generators={count: 2, cpus: 0.1, gpus: 0}",
    "resources.learner={count: 1, cpus: 0.1, gpus: 0}",
    "resources.reward={count: 1, cpus: 0.1, gpus: 0}",
    "logging={live: 'off', loggers: []}",
]


def composed(*overrides: str) -> Config:
    """The configuration of a command line."""
    from hydra import compose, initialize_config_module

    with initialize_config_module("conf", version_base=None):
        return typed(compose("config", overrides=list(overrides)))


@pytest.fixture(scope="session")
def cluster() -> Iterator[object]:
    from actors.cluster import Cluster

    running = Cluster(composed("resources.generators.count=1"))
    yield running
    running.stop()


@pytest.fixture(scope="session")
def prompts_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import json

    words = ["tea", "bread", "lock", "yes", "no", "good", "bad", "the"]
    rows = [{"prompt": [{"role": "user", "content": f"what is {a} {b} ?"}]} for a in words for b in words[:3]]
    path = tmp_path_factory.mktemp("data") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def session_on(cluster: object) -> Session:
    """A session of its own on the tests' Ray; who makes one releases it, or later tests wait for its CPUs."""
    from actors.session import Session

    session = Session()
    session.hold(cluster)
    return session


def run(job: Job, name: str) -> None:
    """Runs one stage."""
    (stage,) = [s for s in job.stages.configured() if s.name == name]
    stage.execute(job)


class Jobs:
    """Makes jobs of tiny models. They share the first one's processes and its baseline, unless they are `apart`."""

    def __init__(self, cluster: object, folder: Path, given: list[str]) -> None:
        self.cluster, self.folder, self.given = cluster, folder, given
        self.count = 0
        self.apart: list[Session] = []
        self.session = session_on(cluster)
        self.warm = self.make(bare=True)
        run(self.warm, "baseline")

    def make(self, *overrides: str, apart: bool = False, bare: bool = False) -> Job:
        """apart: with processes of its own; bare: without a baseline."""
        from actors.preflight import preflight
        from actors.stages.job import Job
        from actors.stages.stage import Stages
        from rlhf.progress import View
        from rlhf.store import Store

        folder = self.folder / f"job{self.count}"
        self.count += 1
        config = composed(*TINY, *self.given, f"output_dir={folder}", *overrides)
        store = Store(folder / "store")
        data = preflight(config, store)
        stages = Stages(config, data, store)
        session = self.session
        if apart:
            session = session_on(self.cluster)
            self.apart.append(session)
        if not bare:
            shutil.copytree(self.warm.stages.store.root / "baseline", store.root / "baseline")
        return Job(stages, session, folder, View("off"), time.perf_counter())


@pytest.fixture
def jobs(shared_jobs: Jobs) -> Iterator[Jobs]:
    """Jobs; the processes of those that are apart end with the test."""
    yield shared_jobs
    while shared_jobs.apart:
        shared_jobs.apart.pop().release()


@pytest.fixture(scope="session")
def shared_jobs(cluster, prompts_file, policy_folder, reward_folders, tmp_path_factory) -> Iterator[Jobs]:
    given = [
        f"data.prompts={prompts_file}",
        f"policy.path={policy_folder}",
        *(f"reward_models.{name}.path={path}" for name, path in reward_folders.items()),
        "reward_models.harmless.canned=['no .', 'i do no bad .']",
    ]
    made = Jobs(cluster, tmp_path_factory.mktemp("jobs"), given)
    yield made
    made.session.release()
