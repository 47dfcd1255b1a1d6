"""Weights & Biases. Offline, files are written that `wandb sync` sends."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

from rlhf.config import LoggingConfig
from rlhf.loggers.logger import Run, Unreachable, choose, library
from rlhf.loggers.wandb_file import last_step, wait_for_end

KIND = "wandb"


class WandbLogger:
    """Sends the metrics, the figures and the run's configuration, and nothing else: no code, no console, no command
    line, which may hold what is nobody's business."""

    def __init__(self, settings: LoggingConfig, outputs: Path) -> None:
        self._all, self._own = settings, settings.wandb
        self._root = Path(os.environ.get("WANDB_DIR") or outputs)
        self._run: Any = None

    @property
    def later(self) -> str:
        return (
            f"wandb sync --include-online {self._root / 'wandb'}, then the same command with stages=[report]"
        )

    def check(self) -> None:
        choose("logging.wandb.mode", self._own.mode, ("online", "offline"))
        wandb = library(KIND, "wandb", "wandb")
        if self._own.mode == "offline":
            return
        advice = "set WANDB_API_KEY, or call wandb login; or set logging.wandb.mode=offline"
        try:
            wandb.Api(timeout=10)
        except wandb.errors.UsageError:
            raise ValueError(f"logging.wandb.mode=online needs a key: {advice}") from None
        except wandb.errors.AuthenticationError as error:
            if _refused(error):
                raise ValueError(
                    f"logging.wandb.mode=online: the key is refused ({error}): {advice}"
                ) from None
            raise Unreachable(str(error)) from None

    def begin(self, run: Run) -> int:
        import wandb

        kept = run.kept(KIND) or {"id": uuid4().hex[:12], "name": self._all.run or run.name}
        run.keep(KIND, kept)
        self._root.mkdir(parents=True, exist_ok=True)
        offline = self._own.mode == "offline"
        has = last_step(self._root / "wandb", kept["id"]) if offline else 0
        settings = wandb.Settings(
            root_dir=str(self._root),
            mode="offline" if offline else "online",
            project=self._all.project,
            entity=self._own.entity,
            run_id=kept["id"],
            run_name=kept["name"],
            run_group=self._own.group,
            run_tags=tuple(self._all.tags) or None,
            resume="allow",
            init_timeout=self._all.patience,  # the command's end waits for both
            finish_timeout=self._all.patience,
            console="off",
            silent=True,
            disable_git=True,
            disable_code=True,
            disable_job_creation=True,
            x_disable_meta=True,
            x_save_requirements=False,
        )
        self._run = wandb.init(config=dict(run.config), settings=settings)
        return has if offline else max(0, self._run.starting_step - 1)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        self._run.log(dict(metrics), step=step)

    def finish(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.summary.update(dict(figures))

    def close(self) -> None:
        if self._run is None:
            return
        self._run.finish()
        if self._own.mode == "offline":  # its process may still be writing
            wait_for_end(Path(self._run.settings.sync_file), self._all.patience)


def _refused(error: Exception) -> bool:
    """Whether a key is at fault, not the way to the server: by W&B's own check of its form or the server's answer."""
    cause = error.__cause__
    return cause is None or getattr(getattr(cause, "response", None), "http_status", None) in (401, 403)
