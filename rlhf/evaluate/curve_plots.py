"""The panels of `rlhf.evaluate.curve`: win rates by each judge, KL and hacking counters over the steps."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.evaluate.curve import APART, OPTIMISED, OWN, Point
from rlhf.evaluate.hacking import COUNTERS
from rlhf.evaluate.plots import Lines, curve
from rlhf.evaluate.svg import SERIES, Panel
from rlhf.evaluate.wins import JOINT

JUDGES = {OPTIMISED: "reward models", OWN: "judge", APART: "evaluators"}
_COLOURS = {OPTIMISED: "series-0", OWN: "ink", APART: "series-1"}


def evaluation_curves(points: Sequence[Point], chosen: int | None) -> list[Panel]:
    """Win rates (jointly by all judges, then by property for each judge), KL, and what was counted; the chosen step
    has a line."""
    rows = [_row(p) for p in points]
    judges = [j for j in JUDGES if any(j in p.win_rate for p in points)]
    names = [n for n in points[-1].win_rate[OPTIMISED] if n != JOINT]
    joint = [(f"{j}/{JOINT}", JUDGES[j], _COLOURS[j]) for j in judges]
    panels = [curve(rows, "Joint win rate", "share", joint, mark=chosen)]
    for judge in judges if len(names) > 1 else []:
        lines = [(f"{judge}/{n}", n, f"series-{i % SERIES}") for i, n in enumerate(names)]
        panels.append(curve(rows, f"Win rate by the {JUDGES[judge]}", "share", lines, mark=chosen))
    panels.append(
        curve(rows, "KL from the base policy", "nats a response", [("kl", "KL", "ink")], mark=chosen)
    )
    shares = [n for n, counter in COUNTERS.items() if counter.unit == "share"]
    lines = [(n, COUNTERS[n].label, f"series-{i % SERIES}") for i, n in enumerate(shares)]
    panels.append(curve(rows, "Signs of hacking", "share", lines, mark=chosen))
    for name in (n for n in COUNTERS if n not in shares):
        line: Lines = [(name, COUNTERS[name].label, "ink")]
        panels.append(curve(rows, COUNTERS[name].label, COUNTERS[name].unit, line, mark=chosen))
    return [p for p in panels if p is not None]


def _row(point: Point) -> dict[str, float]:
    """A point as a flat row, by keys of the lines."""
    rates = {f"{judge}/{n}": rate for judge, of in point.win_rate.items() for n, rate in of.items()}
    return {"step": float(point.step), "kl": point.kl, **rates, **point.hacking}
