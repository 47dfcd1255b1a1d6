"""Ray's start and stop: a cluster that is there, or one of this run's own on this machine."""

from __future__ import annotations

import logging
import os
import secrets
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import ray

from actors.address import check_cluster, given_address
from actors.leftovers import guard
from actors.resources import check_offer
from rlhf.config import Config
from rlhf.models.source import TRUST

NEEDED = ("gcs_server", "raylet")  # processes of Ray without which nothing goes on
STOPPED = 8.0  # seconds after which a stopped process is not waited for
ENDS = 10.0  # seconds, at most, for killed processes to be gone
IN_WORDS = (Exception, RuntimeError, ConnectionError)  # what `ray.init` raises when it says what is wrong
SOCKET = 107  # bytes of a socket's path, at most
IN_FOLDER = "session_2026-01-01_00-00-00_000000_4194304/sockets/plasma_store"  # the longest that Ray makes


class Cluster:
    """A connection to Ray for one run: to the cluster that is asked for, or to one that is started here.

    Raises:
        ValueError: there is no such cluster, or it has less than the roles ask for.
    """

    def __init__(self, config: Config) -> None:
        started = time.perf_counter()
        given = given_address(config.resources)
        self.own = given is None
        self._stopped: dict[str, float] = {}  # since when processes are seen to be stopped
        logging.getLogger("ray").setLevel(logging.ERROR)
        options: dict[str, Any] = {}
        if given is None:
            port = config.resources.dashboard_port
            _settle(dashboard=port is not None)
            options = {"include_dashboard": port is not None, "dashboard_port": port, "_temp_dir": folder()}
        else:
            check_cluster(*given)
        try:
            ray.init(
                address="local" if given is None else given[1],
                logging_level=logging.ERROR,
                log_to_driver=False,
                configure_logging=False,
                runtime_env={"env_vars": {TRUST: "1"}} if config.trust_remote_code else None,
                **options,
            )
        except Exception as error:
            if type(error) not in IN_WORDS:
                raise
            where = "Ray does not start on this machine" if given is None else "=".join(given)
            raise ValueError(f"{where}: {error}") from error
        if self.own:
            guard(Path(ray._private.worker._global_node.get_session_dir_path()))
        check_offer(config, _nodes())
        self.seconds = time.perf_counter() - started

    def describe(self) -> str:
        offer = ray.cluster_resources()
        where = "on this machine" if self.own else "on the given cluster"
        return f"{offer.get('CPU', 0):g} CPUs, {offer.get('GPU', 0):g} GPUs {where}"

    def fault(self) -> str | None:
        """Which process of a Ray of this run's own has ended, or is stopped for good; None: none. Asks the system, as
        calls of `ray` wait for a dead head for a minute and then end the process that made them."""
        if not self.own:
            return None
        now = time.monotonic()
        for name, process in _processes():
            if process.poll() is not None:
                return f"Ray's {name} ended with status {process.returncode}"
            try:
                stopped = psutil.Process(process.pid).status() == psutil.STATUS_STOPPED
            except psutil.NoSuchProcess:
                return f"Ray's {name} has ended"
            if not stopped:
                self._stopped.pop(name, None)
            elif now - self._stopped.setdefault(name, now) > STOPPED:
                return f"Ray's {name} is stopped"
        return None

    def stop(self, by_force: bool = False) -> None:
        """Disconnects; a Ray that this run started ends with all its processes: by force, or if one of them has ended
        or is stopped, whatever state they are in."""
        if self.own and (by_force or self._stopped or self.fault() is not None):
            _end_processes()
        ray.shutdown()


class Births:
    """The processes that a start of Ray makes, while it lasts. Made before it."""

    def __init__(self) -> None:
        self._before = {child.pid for child in psutil.Process().children()}
        self._seen: set[int] = set()  # ended, by the last look

    def ended(self) -> dict[int, str]:
        """Names of those that have ended and were not waited for. (Ray does not look: it waits for what they would have
        done.)"""
        found = {}
        for child in psutil.Process().children():
            with suppress(psutil.NoSuchProcess):
                if child.pid not in self._before and child.status() == psutil.STATUS_ZOMBIE:
                    found[child.pid] = child.name()
        return found

    def dead(self) -> str | None:
        """Which of them had ended before the last look too; None: none."""
        found = self.ended()
        lasting, self._seen = self._seen & found.keys(), set(found)
        return f"{found[min(lasting)]} ended while Ray was started" if lasting else None


def _nodes() -> list[dict[str, float]]:
    """The CPUs and GPUs of each node of the cluster."""
    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [{kind: offer.get(kind, 0.0) for kind in ("CPU", "GPU")} for offer in alive]


def _processes() -> list[tuple[str, subprocess.Popen]]:
    """What Ray has started in this process, by name."""
    node = ray._private.worker._global_node
    every = {} if node is None else node.all_processes
    return [(name, info.process) for name, infos in every.items() for info in infos if name in NEEDED]


def _end_processes() -> None:
    """First of all: a `ray.shutdown` waits for a raylet that is stopped for ever."""
    found = []
    for _, process in _processes():
        with suppress(psutil.NoSuchProcess):
            started = psutil.Process(process.pid)
            found += [*started.children(recursive=True), started]
    for each in found:
        with suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(found, timeout=ENDS)


def _settle(dashboard: bool) -> None:
    """A single machine's Ray listens on 127.0.0.1 only, and leaves out what a short run does not need. Its workers get
    the priority of any other process: by default they yield to all, and ranks then wait for each other."""
    os.environ.setdefault("RAY_worker_niceness", "0")
    os.environ.setdefault("RAY_SERVE_CONTROL_LOOP_INTERVAL_S", "1")  # 0.1 takes 3 % of a core
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")  # a thread's own arena gives back what is soon used again
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    os.environ.setdefault("RAY_enable_metrics_collection", "0")
    os.environ.setdefault("RAY_event_stats", "0")
    if not dashboard:
        os.environ.setdefault("RAY_task_events_report_interval_ms", "0")  # the list of tasks
        # of this run alone: Ray would keep one in the home folder, which may be read-only, or none
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")


def folder() -> str | None:
    """Where a Ray of this run's own keeps its files; null: where it would by itself, by RAY_TMPDIR or TMPDIR. If that
    makes its sockets' paths too long, as in batch systems, or cannot be written: where it would without them.

    Raises:
        ValueError: that cannot be written either.
    """
    name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
    asked = os.environ.get(name, "/tmp")
    for place in (asked, "/tmp"):
        path = Path(place, "ray").absolute()
        if len(os.fsencode(path / IN_FOLDER)) <= SOCKET and _writable(path):
            return str(path) if place != asked else None
    raise ValueError(
        f"{name}={asked} is too long for Ray's sockets ({SOCKET} bytes with what Ray adds) or cannot be written, and "
        "/tmp cannot be written; set RAY_TMPDIR to a short folder"
    )


def _writable(path: Path) -> bool:
    """Whether Ray can make its folder there. (Its rights alone say nothing of a read-only file system.)"""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return True
    except OSError:
        return False
