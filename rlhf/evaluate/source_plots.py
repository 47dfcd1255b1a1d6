"""The panels of `rlhf.evaluate.sources`: reliability on held-out pairs, and how training moved it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes

from rlhf.evaluate.plots import curve
from rlhf.evaluate.sources import RewardFacts
from rlhf.evaluate.svg import COLOUR, Panel, panel


def calibration_panels(facts: Sequence[RewardFacts]) -> list[Panel]:
    """For each reward with pairs its reliability, and its curve if it was trained here."""
    panels: list[Panel | None] = []
    for f in facts:
        if f.calibration is None:
            continue
        panels.append(_reliability(f.name, f.calibration))
        points = f.calibration.get("curve", [])
        if len(points) > 1:
            lines = [("log_loss", "log loss", "ink"), ("accuracy", "accuracy", "series-0")]
            title = f"{f.name}, on held-out pairs"
            panels.append(curve(points, title, "nats, share", lines, mark=f.calibration["step"]))
    return [p for p in panels if p is not None]


def _reliability(name: str, calibration: Mapping[str, Any]) -> Panel:
    def paint(axes: Axes) -> None:
        axes.plot([0.5, 1], [0.5, 1], color=COLOUR["muted"], linewidth=1.2, linestyle=(0, (3, 2)))
        for when, colour in (("before", "base"), ("after", "aligned")):
            bins = calibration[when]["reliability"]
            points = [(b["confidence"], b["accuracy"]) for b in bins]
            axes.plot(*zip(*points, strict=True), "o-", color=COLOUR[colour], markersize=3.5)
        axes.set(xlim=(0.48, 1.02), xlabel="claimed: sigmoid(|margin| / T)", ylabel="right, share of pairs")

    legend = (("as it is", "base"), ("with its temperature", "aligned"))
    return panel(f"{name}: claimed and right", paint, legend=legend)
