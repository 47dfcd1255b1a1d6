"""MLflow: a tracking server, or offline a SQLite file of one's own."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.config import LoggingConfig
from rlhf.loggers.logger import Run, Unreachable, choose, flat, library, without_secret

KIND = "mlflow"
LONGEST = 500  # characters of a parameter, which every version takes
AT_ONCE = 100  # parameters of one request, at most; of metrics 1000
_REMOTE = re.compile(r"https?://|databricks")
_NAME = re.compile(r"[^\w./ -]")


class MlflowLogger:
    """Uses the client alone, not `mlflow.start_run`, which would add the command's name and the user's."""

    later = "the same command with stages=[report]"

    def __init__(self, settings: LoggingConfig, outputs: Path) -> None:
        self._all, self._own, self._outputs = settings, settings.mlflow, outputs
        self._client: Any = None
        self._id = ""
        self._finished = False

    @property
    def _uri(self) -> str:
        if self._own.mode == "offline":
            return self._own.uri or f"sqlite:///{self._outputs / 'mlflow.db'}"
        return self._own.uri or os.environ.get("MLFLOW_TRACKING_URI", "")

    def check(self) -> None:
        own = self._own
        choose("logging.mlflow.mode", own.mode, ("online", "offline"))
        without_secret(
            "logging.mlflow.uri",
            own.uri,
            "MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD",
        )
        remote = _REMOTE.match(self._uri)
        if own.mode == "online" and not remote:
            raise ValueError(
                f"logging.mlflow.uri={own.uri} must be the address of a tracking server (or set MLFLOW_TRACKING_URI); "
                "or set logging.mlflow.mode=offline"
            )
        if own.mode == "offline" and not self._uri.startswith("sqlite:///"):
            raise ValueError(
                f"logging.mlflow.uri={own.uri} must be a file, sqlite:///FILE, with logging.mlflow.mode=offline"
            )
        self._open()
        if own.mode == "offline":
            library(KIND, "sqlalchemy", "mlflow")
            library(KIND, "alembic", "mlflow")
            return
        from mlflow.exceptions import MlflowException

        retries = os.environ.get("MLFLOW_HTTP_REQUEST_MAX_RETRIES")
        os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"  # someone waits for the answer
        try:
            self._client.search_experiments(max_results=1)
        except MlflowException as error:
            if error.get_http_status_code() in (401, 403):
                raise ValueError(
                    "logging.mlflow: the server refuses the key (MLFLOW_TRACKING_TOKEN, or MLFLOW_TRACKING_USERNAME "
                    f"and MLFLOW_TRACKING_PASSWORD): {error}"
                ) from None
            raise Unreachable(str(error)) from None
        finally:
            if retries is None:
                del os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"]
            else:
                os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = retries

    def _open(self) -> None:
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        client = library(KIND, "mlflow-skinny", "mlflow", "mlflow.tracking").MlflowClient
        self._client = client(self._uri)

    def begin(self, run: Run) -> int:
        self._outputs.mkdir(parents=True, exist_ok=True)
        self._open()
        kept = run.kept(KIND)
        if kept is None:
            self._id = self._create(run)
            run.keep(KIND, {"id": self._id})
            return 0
        self._id = kept["id"]
        self._client.update_run(self._id, status="RUNNING")
        return int(self._client.get_run(self._id).data.metrics.get("step", 0))

    def _create(self, run: Run) -> str:
        from mlflow.entities import Param

        name = self._own.experiment or self._all.project
        found = self._client.get_experiment_by_name(name)
        if found is None:
            artifacts = (self._outputs / "mlflow").as_uri() if self._own.mode == "offline" else None
            experiment = self._client.create_experiment(name, artifact_location=artifacts)
        else:
            experiment = found.experiment_id
        tags = {"tags": ", ".join(self._all.tags)} if self._all.tags else {}
        made = self._client.create_run(experiment, run_name=self._all.run or run.name, tags=tags).info.run_id
        values = flat(run.config).items()
        parameters = [Param(_NAME.sub("_", key), str(value)[:LONGEST]) for key, value in values]
        for start in range(0, len(parameters), AT_ONCE):
            self._client.log_batch(made, params=parameters[start : start + AT_ONCE])
        return made

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self._id, metrics=[Metric(k, float(v), now, step) for k, v in metrics.items()])

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        self.write(step, figures)
        self._finished = True

    def close(self) -> None:
        """A run without its final figures has not ended."""
        if self._finished:
            self._client.set_terminated(self._id)
