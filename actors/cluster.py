"""Ray's start and stop: a cluster that is there, or one of this run's own on this machine."""

from __future__ import annotations

import logging
import os
import time

import ray

from actors.resources import check_offer
from rlhf.config import Config
from rlhf.models.source import TRUST


class Cluster:
    """A connection to Ray for one run. An address wins over RAY_ADDRESS; without both, Ray is started here."""

    def __init__(self, config: Config) -> None:
        started = time.perf_counter()
        address = config.resources.address or os.environ.get("RAY_ADDRESS")
        self.own = address is None
        logging.getLogger("ray").setLevel(logging.ERROR)
        port = config.resources.dashboard_port
        if self.own:
            _settle(dashboard=port is not None)
        dashboard = {"include_dashboard": port is not None, "dashboard_port": port}
        ray.init(
            address=address or "local",
            logging_level=logging.ERROR,
            log_to_driver=False,
            configure_logging=False,
            runtime_env={"env_vars": {TRUST: "1"}} if config.trust_remote_code else None,
            **(dashboard if self.own else {}),
        )
        offer = ray.cluster_resources()
        check_offer(config, {kind: offer.get(kind, 0.0) for kind in ("CPU", "GPU")})
        self.seconds = time.perf_counter() - started

    def describe(self) -> str:
        offer = ray.cluster_resources()
        where = "on this machine" if self.own else "on the given cluster"
        return f"{offer.get('CPU', 0):g} CPUs, {offer.get('GPU', 0):g} GPUs {where}"

    def stop(self) -> None:
        """Disconnects; a Ray that this run started ends with all its processes."""
        ray.shutdown()


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
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
