"""The main figure of a comparison on its own: joint win rate and prompts left behind over KL, for a README."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import matplotlib
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf.evaluate.comparison_plots import draw, finish, line, main_arms, style
from rlhf.evaluate.comparison_words import MAIN

PANELS = (
    (MAIN, "Joint win rate (more is better)"),
    ("left_behind/joint", "Prompts left behind (less is better)"),
)
LETTER, LINE, PANEL_WIDTH = (
    8.5,
    17.0,
    330.0,
)  # CSS pixels: an average letter, a line of text, the axes of a panel
COLOURS: Mapping[str, str] = MappingProxyType(
    {
        "series-0": "#0072b2",
        "series-1": "#d55e00",
        "series-2": "#009e73",
        "series-3": "#b0568f",
        "series-4": "#b98500",
        "series-5": "#4a4a4a",
        "muted": "#6f7680",
    }
)
"""Okabe and Ito's colours for the colour-blind, two of them darker so that they can be read as text on white."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "svg.hashsalt": "rlhf",
    "font.family": "DejaVu Sans",
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa2ad",
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": "#e1e5ea",
    "lines.solid_capstyle": "round",
}


def write_pareto(summary: Mapping[str, Any], folder: Path) -> None:
    """Writes folder/pareto.svg and folder/pareto.png, 800 by 400 CSS pixels, the PNG at twice that resolution."""
    figure, svg, png = pareto_figure(summary), io.BytesIO(), io.BytesIO()
    with matplotlib.rc_context(_STYLE):
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
        figure.savefig(png, format="png", dpi=200, metadata={"Software": None})
    (folder / "pareto.svg").write_bytes(svg.getvalue())
    (folder / "pareto.png").write_bytes(png.getvalue())


def pareto_figure(summary: Mapping[str, Any]) -> Figure:
    arms = main_arms(summary)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(8, 4), layout="constrained", facecolor="white")
        shown = list(zip(figure.subplots(1, len(PANELS)), PANELS, strict=True))
        for axes, (metric, title) in shown:
            for arm in reversed(arms):
                draw(axes, summary, arm, metric, COLOURS, size=5)
            finish(axes, summary, arms, metric)
            axes.set_title(title)
            ends = [
                line(summary, arm, metric)[-1][0] / _free(arm) ** 2
                for arm in arms
                if line(summary, arm, metric)
            ]
            axes.set_xlim(0, max(ends, default=1.0))
        figure.canvas.draw()
        for axes, (metric, _) in shown:
            name_lines(axes, summary, [arm for arm in arms if line(summary, arm, metric)], metric)
    return figure


def _free(name: str) -> float:
    """The share of a panel's width that a name of so many letters, put at a line's end, leaves to the line."""
    return 1 - min(0.6, (LETTER * len(name) + 12) / PANEL_WIDTH)


def name_lines(axes: Axes, summary: Mapping[str, Any], arms: Sequence[str], metric: str) -> None:
    """Each arm's name beside its last point, moved up or down until no two names touch."""
    scale = axes.figure.dpi / 100
    ends = {arm: line(summary, arm, metric)[-1] for arm in arms}
    places = {arm: axes.transData.transform((kl, v["mean"])) / scale for arm, (kl, v) in ends.items()}
    taken: list[tuple[float, float, float]] = []  # left, right, middle
    for arm in sorted(arms, key=lambda a: places[a][1]):
        left, middle = float(places[arm][0]) + 7, float(places[arm][1])
        right = left + LETTER * len(arm)
        for start, end, other in sorted(taken, key=lambda box: box[2]):
            if start < right and left < end and middle < other + LINE:
                middle = other + LINE
        taken.append((left, right, middle))
        colour = COLOURS[style(summary, arm)[0]]
        kl, value = ends[arm]
        points = 72 / 100
        axes.annotate(
            arm,
            (kl, value["mean"]),
            (7 * points, (middle - float(places[arm][1])) * points),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold" if arm == summary["reference_arm"] else "normal",
            parse_math=False,
            annotation_clip=False,
            path_effects=[patheffects.withStroke(linewidth=3, foreground="white")],
            zorder=5,
            in_layout=False,
        )
