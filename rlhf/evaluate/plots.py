"""The report's figures, each a list of panels. No text of users is drawn: only names, numbers and units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from rlhf.evaluate.svg import COLOUR, SERIES, Panel, panel
from rlhf.evaluate.wins import JOINT
from rlhf.evaluate.words import duration, percent

Metrics = Sequence[Mapping[str, float]]
Lines = Sequence[tuple[str, str, str]]
"""(metric key, label, colour name) of each line of a panel."""

BASE_AND_ALIGNED = (("base", "base"), ("aligned", "aligned"))
PHASES = ("generate", "reward", "learn", "publish")


def win_bars(wins: Mapping[str, Any]) -> list[Panel]:
    """Share of winning responses of both policies, by property, with 95 % intervals."""
    names = shown_properties(wins)

    def paint(axes: Axes) -> None:
        top = max(wins["win_rate_ci"][n][k][1] for n in names for k in ("base", "aligned"))
        for row, name in enumerate(names):
            for offset, policy in ((-0.2, "base"), (0.2, "aligned")):
                rate = wins["win_rate"][name][policy]
                low, high = wins["win_rate_ci"][name][policy]
                axes.barh(row + offset, rate, height=0.36, color=COLOUR[policy])
                for colour, width in (("surface", 3.4), ("ink", 1.4)):
                    axes.plot([low, high], [row + offset] * 2, color=COLOUR[colour], linewidth=width)
                place = (max(high, rate), row + offset)
                axes.annotate(percent(rate), place, (5, 0), textcoords="offset points", va="center")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params("y", labelcolor=COLOUR["ink"])
        axes.set_ylim(len(names) - 0.45, -0.55)
        axes.set_xlim(0, min(1.12, max(0.05, top * 1.2)))
        axes.set_xlabel("responses that win (%)")
        axes.xaxis.set_major_formatter(PercentFormatter(1, symbol=""))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
        axes.grid(False)
        axes.grid(True, axis="x")

    return [panel("Win rate", paint, width=400, height=56 + 54 * len(names), legend=BASE_AND_ALIGNED)]


def shown_properties(wins: Mapping[str, Any]) -> list[str]:
    """The joint rate first, then the properties; with one property the joint rate says nothing more."""
    properties = list(wins["properties"])
    return [JOINT, *properties] if len(properties) > 1 else properties


def curves(metrics: Metrics, models: Sequence[str]) -> list[Panel]:
    """KL, rewards, utility, its slopes, P(good) and length over the steps; keys that were not logged are not drawn."""
    colours = {model: f"series-{i % SERIES}" for i, model in enumerate(models)}
    panels = [curve(metrics, "KL from the base policy", "nats a response", [("kl", "KL", "ink")])]
    for model in models:
        lines = [(f"reward/{model}/mean", "mean", colours[model]), (f"r_ref/{model}", "r_ref", "muted")]
        panels.append(curve(metrics, f"Raw reward: {model}", "nats", lines, band=f"reward/{model}/std"))
    utilities: list[tuple[str, str, str]] = [(f"utility/{m}", m, colours[m]) for m in models]
    combined = [("utility/combined", "combined", "ink")] if len(models) > 1 else []
    panels.append(curve(metrics, "Utility", "nats", [*utilities, *combined]))
    probabilities = [(f"p_good/{m}", m, colours[m]) for m in models]
    panels.append(curve(metrics, "P(good)", "probability", probabilities, limits=(0, 1)))
    slopes = [(f"slope/{m}", m, colours[m]) for m in models]
    panels.append(curve(metrics, "What one more unit of reward is worth", "utility a nat", slopes))
    panels.append(curve(metrics, "Response length", "tokens", [("response_tokens", "mean", "ink")]))
    panels.append(curve(metrics, "Gradient norm", "norm before clipping", [("grad_norm", "norm", "ink")]))
    finished = [("finished", "share", "ink")]
    panels.append(curve(metrics, "Finished responses", "share", finished, limits=(0, 1)))
    return [p for p in panels if p is not None]


def curve(
    metrics: Metrics,
    title: str,
    unit: str,
    lines: Lines,
    band: str = "",
    limits: tuple[float, float] | None = None,
    mark: float | None = None,
) -> Panel | None:
    """Lines over steps; `band` names the standard deviation to shade around the first line, `mark` is a step."""
    drawn = [line for line in lines if any(line[0] in row for row in metrics)]
    if not drawn:
        return None

    def paint(axes: Axes) -> None:
        for index, (key, label, colour) in enumerate(drawn):
            steps, values = _column(metrics, key)
            dashed, dot = "--" if label == "r_ref" else "-", "o" if len(steps) < 8 else ""
            axes.plot(steps, values, dashed, color=COLOUR[colour], marker=dot, markersize=3.5)
            spread = _column(metrics, band)[1]
            if index == 0 and len(spread) == len(values):
                low, high = values - spread, values + spread
                axes.fill_between(steps, low, high, color=COLOUR[colour], alpha=0.16, linewidth=0)
        if mark is not None:
            axes.axvline(mark, color=COLOUR["muted"], linewidth=1.2, linestyle=(0, (3, 2)))
        axes.set_xlabel("step")
        axes.set_ylabel(unit)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if limits is not None:
            axes.set_ylim(limits[0] - 0.02, limits[1] + 0.02)
            axes.set_yticks(np.linspace(*limits, 5))

    legend = tuple((label, colour) for _, label, colour in drawn)
    if band:
        legend = ((f"{legend[0][0]} ± standard deviation", legend[0][1]), *legend[1:])
    return panel(title, paint, legend=legend if len(legend) > 1 else ())


def _column(metrics: Metrics, key: str) -> tuple[np.ndarray, np.ndarray]:
    rows = [(row.get("step", i), row[key]) for i, row in enumerate(metrics) if key in row]
    return np.array([r[0] for r in rows]), np.array([r[1] for r in rows], float)


def distributions(baseline: Mapping[str, Mapping[str, Any]]) -> list[list[Panel]]:
    """For each example prompt one panel a reward model: base rewards, r_ref, and the aligned samples."""
    count = min((len(d["prompts"]) for d in baseline.values()), default=0)
    panels: list[list[Panel]] = [[] for _ in range(count)]
    for name, data in baseline.items():
        base, aligned, r_ref = (np.asarray(data[k], float) for k in ("samples", "aligned", "r_ref"))
        everything = np.concatenate([base.ravel(), aligned.ravel(), r_ref])
        everything = everything[np.isfinite(everything)]
        if not len(everything):  # it applies to none of these
            continue
        margin = 0.04 * float(np.ptp(everything)) or 1.0
        span = (float(everything.min()) - margin, float(everything.max()) + margin)
        for row in np.flatnonzero(np.isfinite(aligned[:count]).any(axis=1)).tolist():
            panels[row].append(_distribution(name, base[row], aligned[row], float(r_ref[row]), span))
    return panels


def _distribution(
    name: str, base: np.ndarray, aligned: np.ndarray, r_ref: float, span: tuple[float, float]
) -> Panel:
    def paint(axes: Axes) -> None:
        counts, edges = np.histogram(base[np.isfinite(base)], bins=36, range=span)
        axes.stairs(counts / max(1, counts.max()), edges, fill=True, color=COLOUR["base"])
        found = aligned[np.isfinite(aligned)]
        heights = -0.14 - 0.16 * (np.arange(len(found)) % 2)
        axes.scatter(found, heights, s=20, color=COLOUR["aligned"], alpha=0.75, linewidths=0)
        axes.plot([r_ref, r_ref], [-0.4, 1.05], color=COLOUR["ink"], linewidth=1.4, linestyle=(0, (3, 2)))
        axes.set(xlim=span, ylim=(-0.42, 1.08), yticks=[], xlabel=f"{name} reward (nats)")
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.grid(False)

    return panel(name, paint, width=370, height=122)


def improvement(wins: Mapping[str, Any]) -> list[Panel]:
    """Change of every prompt's mean judged score, sorted: one waterfall a property."""
    return [_waterfall(name, rows["difference"]) for name, rows in wins["per_prompt"].items()]


def _waterfall(name: str, difference: np.ndarray) -> Panel:
    ordered = np.sort(difference[~np.isnan(difference)])
    edges = np.linspace(0, 100, len(ordered) + 1)

    def paint(axes: Axes) -> None:
        axes.stairs(np.minimum(ordered, 0), edges, fill=True, color=COLOUR["worse"])
        axes.stairs(np.maximum(ordered, 0), edges, fill=True, color=COLOUR["better"])
        axes.axhline(0, color=COLOUR["muted"], linewidth=0.8)
        axes.set(xlim=(0, 100), ylabel="change of mean score")
        axes.set_xlabel(f"prompts, worst first (% of {len(ordered)})")
        axes.yaxis.set_major_locator(MaxNLocator(5))

    legend = (("mean score fell: left behind", "worse"), ("rose", "better"))
    return panel(name, paint, width=370, height=210, legend=legend)


def time_bars(seconds: Mapping[str, float], metrics: Metrics) -> list[Panel]:
    """Seconds of the stages, and of the phases inside align."""
    stages = {name: s for name, s in seconds.items() if name != "total" and s > 0}
    other = seconds.get("total", 0) - sum(stages.values())
    if other > 0.01 * seconds.get("total", 0):
        stages["other"] = other
    phases = {p: float(_column(metrics, f"seconds/{p}")[1].sum()) for p in PHASES}
    phases = {name: s for name, s in phases.items() if s > 0}
    wall = float(_column(metrics, "seconds")[1].sum())
    if phases and wall - sum(phases.values()) > 0.01 * wall:
        phases["waiting"] = wall - sum(phases.values())
    bars = (("Stages of the run", stages), ("Inside align", phases))
    return [_stack(title, parts) for title, parts in bars if parts]


def _stack(title: str, parts: Mapping[str, float]) -> Panel:
    idle = {"other", "waiting"}
    colours = {n: "base" if n in idle else f"series-{i % SERIES}" for i, n in enumerate(parts)}

    def paint(axes: Axes) -> None:
        left = 0.0
        for name, value in parts.items():
            axes.barh(0, value, left=left, height=0.8, color=COLOUR[colours[name]], linewidth=1)
            left += value
            axes.axvline(left, color=COLOUR["surface"], linewidth=1.6)
        axes.set(xlim=(0, left), ylim=(-0.4, 0.4), yticks=[], xlabel="seconds")
        axes.grid(False)

    total = sum(parts.values())
    legend = tuple((f"{n} {duration(s)} ({percent(s / total)})", colours[n]) for n, s in parts.items())
    return panel(title, paint, width=400, height=80, legend=legend)
