"""The Ray job: Hydra's entry, what is checked before Ray starts, and Ray's start and stop.

rlhf utility=linear align.kl_coef=0.1      one run
rlhf -m utility=lsc,linear                 a sweep
rlhf --cfg job                             the composed configuration
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from rlhf.config import Config, typed

IN_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for the entry point of a submitted job


def main() -> None:
    """The console script. Exits with 1 and one line on a user's error."""
    os.environ.setdefault("RLHF_OUTPUT_DIR", _default_output())
    signal.signal(
        signal.SIGTERM, lambda number, _: sys.exit(128 + number)
    )  # ends what was started, then exits
    _run()


def _default_output() -> str:
    """`outputs` here; in a submitted job, whose working directory is a temporary copy, in the home directory."""
    return str(Path.home() / "rlhf-outputs") if IN_JOB in os.environ else "outputs"


@hydra.main(version_base=None, config_path="pkg://conf", config_name="config")
def _run(values: DictConfig) -> None:
    try:
        run(
            typed(values),
            Path(HydraConfig.get().runtime.output_dir).absolute(),
            OmegaConf.to_yaml(values, resolve=True),
        )
    except ValueError as error:
        sys.exit(f"error: {_reason(error)}")


def _reason(error: BaseException) -> str:
    """A user's error in one line; of an error in an actor, the actor and its own words."""
    from ray.exceptions import RayTaskError

    if isinstance(error, RayTaskError):
        where = error.function_name
        cause: BaseException = error.cause
        while isinstance(cause, RayTaskError):
            cause = cause.cause
        return f"{cause} (in {where})"
    return str(error)


def run(config: Config, folder: Path, resolved: str) -> None:
    """One run, into `folder`.

    Raises:
        ValueError: what the user gave cannot work; most of it is found before Ray starts.
    """
    from actors.artifacts import Artifacts
    from actors.cluster import Cluster
    from actors.preflight import preflight
    from rlhf.progress import View
    from rlhf.store import Store, link, write_atomic
    from rlhf.versions import versions

    started = time.perf_counter()
    view = View(config.logging.live)
    root = Path(config.output_dir).expanduser().absolute()
    view.line(f"run {folder}")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / "config.yaml", resolved)
    write_atomic(folder / "versions.json", json.dumps(versions(), indent=1))
    store = Store(root / "store")
    data = preflight(config, store)
    artifacts = Artifacts(config, data, store)
    with ThreadPoolExecutor(1) as background:
        cluster = None if artifacts.complete() else background.submit(Cluster, config)
        from actors.roles import Roles  # seconds of imports, while Ray starts
        from actors.stages import Job

        job = Job(
            config, data, artifacts, Roles(config, artifacts, cluster, view.line), folder, view, started
        )
        try:
            job.execute()
        finally:
            job.roles.stop()
    link(root / "latest", folder)
