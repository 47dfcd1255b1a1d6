"""Trackio: a local database, which `trackio show` shows; or a Hugging Face Space, or a server of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.config import LoggingConfig
from rlhf.loggers.logger import Run, Unreachable, choose, from_environment, library, without_secret

KIND = "trackio"
_PLACES = ("TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL")


class TrackioLogger:
    """A run is known by its name in the project. The step is not sent as a metric too: its name is Trackio's own."""

    later = "the same command with stages=[report]"

    def __init__(self, settings: LoggingConfig, outputs: Path) -> None:
        self._all, self._own = settings, settings.trackio
        self._run: Any = None

    def check(self) -> None:
        own = self._own
        choose("logging.trackio.mode", own.mode, ("online", "offline"))
        without_secret("logging.trackio.server", own.server, "TRACKIO_WRITE_TOKEN")
        given = own.space or own.server
        if own.mode == "offline" and (given or from_environment(*_PLACES)):
            raise ValueError(
                "logging.trackio.mode=offline keeps metrics on this machine, and "
                f"{'logging.trackio.space or .server' if given else ' or '.join(_PLACES)} names another place: unset "
                "it, or set logging.trackio.mode=online"
            )
        if own.space and own.server:
            raise ValueError("logging.trackio.space and logging.trackio.server: give one of them")
        trackio = library(KIND, "trackio", "trackio")
        if own.mode == "offline":
            return
        if own.server:
            if from_environment("TRACKIO_WRITE_TOKEN") is None:
                raise ValueError("logging.trackio.server needs a token: set TRACKIO_WRITE_TOKEN")
        elif not own.space:
            raise ValueError(
                "logging.trackio.mode=online needs logging.trackio.space or logging.trackio.server"
            )
        self._reach(trackio)

    def _reach(self, trackio: Any) -> None:
        import requests
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

        try:
            if self._own.server:
                requests.get(self._own.server, timeout=20)
            else:
                HfApi().whoami()
        except (LocalTokenNotFoundError, HfHubHTTPError) as error:
            raise ValueError(
                f"logging.trackio.space={self._own.space} needs a token (HF_TOKEN, or hf auth login): {error}"
            ) from None
        except Exception as error:
            raise Unreachable(str(error)) from None

    def begin(self, run: Run) -> int:
        import trackio

        before = run.kept(KIND)
        kept = before or {"name": self._all.run or run.name, "project": self._all.project}
        self._run = trackio.init(
            kept["project"],
            name=kept["name"],
            group=self._own.group,
            space_id=self._own.space,
            server_url=self._own.server,
            config={**run.config, "tags": list(self._all.tags)},
            resume="allow" if before else "never",
            embed=False,
            auto_log_cpu=False,
            auto_log_gpu=False,
        )
        run.keep(KIND, kept)
        return max(0, self._run._next_step - 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log({k: v for k, v in metrics.items() if k != "step"}, step=step)

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        if self._run is not None:
            self._run.finish()
