"""The figures of a comparison: metrics over KL, and differences at equal KL."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import FixedFormatter, FixedLocator, FuncFormatter, MaxNLocator

from rlhf.evaluate.cells import BEST_OF
from rlhf.evaluate.comparison_words import describe, still
from rlhf.evaluate.svg import COLOUR, SERIES, Panel, panel

MARKERS = "osD^vPX<>"
_KL_TICKS = (0, 0.25, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
Legend = tuple[tuple[str, str], ...]


def style(summary: Mapping[str, Any], arm: str) -> tuple[str, str, str]:
    """(colour name, marker, line style) of an arm: never told by colour alone.

    An arm looks the same in all figures; ablations are drawn with the reference arm only, and count from it.
    """
    if arm == BEST_OF:
        return "muted", "x", ":"
    index = (ablation_arms(summary) if arm in summary["ablations"] else main_arms(summary)).index(arm)
    return f"series-{index % SERIES}", MARKERS[index % len(MARKERS)], "-" if index < SERIES else "--"


def legend(summary: Mapping[str, Any], arms: Sequence[str]) -> Legend:
    """(label, colour name) of each arm; a dashed or dotted line says so."""
    kinds = {"--": " (dashed)", ":": " (dotted)", "-": ""}
    styles = {arm: style(summary, arm) for arm in arms}
    return tuple((arm + kinds[line], colour) for arm, (colour, _, line) in styles.items())


def main_arms(summary: Mapping[str, Any]) -> list[str]:
    """All but the ablations; best-of-n last."""
    arms = [summary["reference_arm"], *summary["baselines"]]
    return arms + [BEST_OF] * (BEST_OF in summary["arms"])


def ablation_arms(summary: Mapping[str, Any]) -> list[str]:
    return [summary["reference_arm"], *summary["ablations"]]


def over_kl(summary: Mapping[str, Any], arms: Sequence[str], metrics: Sequence[str]) -> list[Panel]:
    """A panel for each metric that any arm has and that moves: means over seeds at each point, 95 % intervals."""
    drawn = [m for m in metrics if any(line(summary, arm, m) for arm in arms) and not still(summary, m)]
    return [_over_kl(summary, arms, metric) for metric in drawn]


def _over_kl(summary: Mapping[str, Any], arms: Sequence[str], metric: str) -> Panel:
    def paint(axes: Axes) -> None:
        for arm in reversed(arms):
            draw(axes, summary, arm, metric, COLOUR)
        finish(axes, summary, arms, metric)

    return panel(describe(metric).label, paint)


def line(summary: Mapping[str, Any], arm: str, metric: str) -> list[tuple[float, Mapping[str, Any]]]:
    """(mean KL, estimate of the metric) of an arm's points, by KL."""
    rows = [row for row in summary["curves"].get(arm, ()) if metric in row["metrics"]]
    return sorted(((max(0.0, r["kl"]["mean"]), r["metrics"][metric]) for r in rows), key=lambda pair: pair[0])


def draw(
    axes: Axes,
    summary: Mapping[str, Any],
    arm: str,
    metric: str,
    colours: Mapping[str, str],
    size: float = 4.5,
) -> None:
    """An arm's line, from the base policy, with intervals."""
    points = line(summary, arm, metric)
    if not points:
        return
    colour, marker, dashes = style(summary, arm)
    first = arm == summary["reference_arm"]
    kl, values = [k for k, _ in points], [v["mean"] for _, v in points]
    look: dict[str, Any] = {"color": colours[colour], "zorder": 3 if first else 2}
    if metric in summary["base"]:
        start = summary["base"][metric]["mean"]
        axes.plot([0, kl[0]], [start, values[0]], linestyle=dashes, linewidth=0.9, alpha=0.7, **look)
    axes.plot(kl, values, dashes, marker=marker, markersize=size, linewidth=2.4 if first else 1.6, **look)
    for x, value in points:
        if value["low"] is not None:
            axes.plot([x, x], [value["low"], value["high"]], linewidth=1, alpha=0.55, **look)


def finish(axes: Axes, summary: Mapping[str, Any], arms: Sequence[str], metric: str) -> None:
    """Scales, ticks and units; KL on a square-root scale, on which early gains are about straight.

    The means set the height: wide intervals of few seeds are cut at the edge, so that they do not flatten the rest.
    """
    top = max((kl for arm in arms for kl, _ in line(summary, arm, metric)), default=1.0)
    axes.set_xscale("function", functions=(_root, _square))
    axes.set_xlim(0, max(top, 0.05) * 1.06)
    ticks = [kl for kl in _KL_TICKS if kl <= top * 1.06]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{kl:g}" for kl in ticks]))
    axes.minorticks_off()
    axes.set_xlabel("KL from the base policy (nats)")
    means = [v["mean"] for arm in arms for _, v in line(summary, arm, metric)]
    means += [summary["base"][metric]["mean"]] if metric in summary["base"] else []
    low, high = min(means, default=0.0), max(means, default=1.0)
    margin = 0.12 * (high - low) or 0.01
    axes.set_ylim(low - margin, high + margin)
    unit_axis(axes, metric)


def unit_axis(axes: Axes, metric: str, points: bool = False) -> None:
    unit = describe(metric).unit
    axes.yaxis.set_major_locator(MaxNLocator(5))
    if unit == "share":
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
    axes.set_ylabel(("points" if points else "%") if unit == "share" else unit)


def _root(values: Any) -> Any:
    return abs(values) ** 0.5


def _square(values: Any) -> Any:
    return values**2


def differences(summary: Mapping[str, Any], arms: Sequence[str], metric: str) -> list[Panel]:
    """For each other arm, reference arm minus it over the KL range both cover, with the 95 % band over seeds."""
    found = {arm: summary["differences"].get(arm, {}).get(metric) for arm in arms}
    rows = {arm: row for arm, row in found.items() if row and row["range"]}
    ends = [
        v for row in rows.values() for k in ("mean", "low", "high") for v in row["curve"][k] if v is not None
    ]
    if not ends:
        return []
    margin = 0.06 * (max(0.0, *ends) - min(0.0, *ends)) or 0.01
    limits = (min(0.0, *ends) - margin, max(0.0, *ends) + margin)
    return [_difference(summary, arm, row, metric, limits) for arm, row in rows.items()]


def _difference(
    summary: Mapping[str, Any],
    arm: str,
    row: Mapping[str, Any],
    metric: str,
    limits: tuple[float, float],
) -> Panel:
    curve = row["curve"]

    def paint(axes: Axes) -> None:
        axes.axhline(0, color=COLOUR["ink"], linewidth=1)
        if None not in curve["low"]:
            axes.fill_between(
                curve["kl"], curve["low"], curve["high"], color=COLOUR["aligned"], alpha=0.2, linewidth=0
            )
        axes.plot(curve["kl"], curve["mean"], color=COLOUR["aligned"])
        axes.set(
            ylim=limits, xlim=(min(0.0, math.floor(curve["kl"][0])), curve["kl"][-1]), xlabel="KL (nats)"
        )
        axes.xaxis.set_major_locator(MaxNLocator(5))
        unit_axis(axes, metric, points=True)

    title = f"{summary['reference_arm']} − {arm}: {row['average']['verdict']}"
    return panel(title, paint, width=310, height=180)
