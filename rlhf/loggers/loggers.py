"""The loggers of a configuration: checked before the run, told of its steps, and of its figures at its end."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from rlhf.config import LoggingConfig
from rlhf.loggers.channel import Channel
from rlhf.loggers.kinds import make_loggers
from rlhf.loggers.logger import KEPT, Run, Unreachable, file_name
from rlhf.store import fingerprint

Say = Callable[[str], None]


def check_loggers(settings: LoggingConfig, outputs: Path, begun: bool, say: Say) -> None:
    """
    Args:
        begun: the run goes on; then a service that does not answer is told of only.

    Raises:
        ValueError: one of them cannot work; it names the key.
    """
    for kind, logger in make_loggers(settings, outputs).items():
        try:
            logger.check()
        except Unreachable as error:
            if not begun:
                raise ValueError(
                    f"logging.loggers: {kind} does not answer ({error}); leave it out, or set it to mode=offline"
                ) from None
            say(f"{kind} does not answer: metrics stay in align/metrics.jsonl until it does")


class Loggers:
    """Those of an alignment, while it runs. Used in a `with` block, which closes them however it is left."""

    def __init__(self, settings: LoggingConfig, outputs: Path, run: Run, say: Say) -> None:
        self._channels = [
            Channel(kind, logger, run, say, settings.patience)
            for kind, logger in make_loggers(settings, outputs).items()
        ]

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        for channel in self._channels:
            channel.write(step, metrics)

    def __enter__(self) -> Loggers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with ExitStack() as stack:
            for channel in self._channels:
                stack.callback(channel.close)


def send_figures(
    settings: LoggingConfig, outputs: Path, run: Run, figures: Mapping[str, float], say: Say
) -> None:
    """Sends the figures of a run that has ended, and the steps that a logger lacks of it; once."""
    for kind, logger in make_loggers(settings, outputs).items():
        mark = run.folder / KEPT / f"{file_name(kind)}-{fingerprint(dict(figures))}.sent"
        if mark.exists():
            continue
        channel = Channel(kind, logger, run, say, settings.patience)
        channel.finish(run.step, figures)
        channel.close()
        if not channel.failed:
            mark.parent.mkdir(exist_ok=True)
            mark.touch()


def final_figures(summary: Mapping[str, Any]) -> dict[str, float]:
    """The figures of summary.json that tell how a run went, by names as metrics have them.

    >>> final_figures({"kl": 2.5, "win_rate": {"joint": {"base": 0.1, "aligned": 0.3}}, "prompts": 8, "notes": []})
    {'final/win_rate/joint/base': 0.1, 'final/win_rate/joint/aligned': 0.3, 'final/kl': 2.5, 'final/prompts': 8}
    """
    found: dict[str, float] = {}
    for name in FIGURES:
        if name in summary:
            _add(found, f"final/{name}", summary[name])
    return found


FIGURES = (
    "win_rate",
    "win_rate_ci",
    "win_vs_random",
    "kl",
    "kl_standard_error",
    "left_behind",
    "hacking",
    "steps_left_out",
    "chosen_step",
    "prompts",
    "samples",
)


def _add(found: dict[str, float], name: str, value: Any) -> None:
    if isinstance(value, Mapping):
        for key, part in value.items():
            _add(found, f"{name}/{key}", part)
    elif isinstance(value, list | tuple):  # an interval
        for key, part in zip(("low", "high"), value, strict=True):
            _add(found, f"{name}/{key}", part)
    elif value is not None:
        found[name] = value
