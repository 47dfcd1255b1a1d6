"""The kinds of loggers. Imports no library of theirs."""

from __future__ import annotations

from pathlib import Path

from rlhf.config import LoggingConfig
from rlhf.loggers.logger import Logger
from rlhf.plugins import named_object

GROUP = "rlhf.loggers"  # of entry points: other packages' kinds, by name

KINDS = {
    "tensorboard": "rlhf.loggers.tensorboard:TensorBoardLogger",
    "wandb": "rlhf.loggers.wandb:WandbLogger",
    "mlflow": "rlhf.loggers.mlflow:MlflowLogger",
    "trackio": "rlhf.loggers.trackio:TrackioLogger",
}
METHODS = ("check", "begin", "write", "finish", "close")


def logger_class(kind: str) -> type[Logger]:
    """The class of a kind: one of `KINDS`, of an installed package's entry points, or "package.module:Class".

    Raises:
        ValueError: there is none.
    """
    found = named_object(f"logging.loggers: {kind}", kind, KINDS, GROUP)
    lacking = [method for method in (*METHODS, "later") if not hasattr(found, method)]
    if not isinstance(found, type) or lacking:
        raise ValueError(
            f"logging.loggers: {kind} is no logger (rlhf.loggers.logger.Logger): it lacks "
            f"{', '.join(lacking) or 'a class'}"
        )
    return found


def make_loggers(settings: LoggingConfig, outputs: Path) -> dict[str, Logger]:
    """Those of a configuration, by kind."""
    return {kind: logger_class(kind)(settings, outputs) for kind in settings.loggers}
