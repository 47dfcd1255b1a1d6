"""Writes a study's comparison: comparison.html and comparison.md for people, summary.json for programs, pareto.svg and
pareto.png.

comparison.html is one file without scripts or anything from elsewhere; it follows the reader's light or dark theme.
summary.json has "title", "figures", the list of `CellFigures` as JSON, and "comparison", what `compare` returns.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf.evaluate import comparison_plots as plots
from rlhf.evaluate import comparison_words as words
from rlhf.evaluate import svg
from rlhf.evaluate.cells import BEST_OF, CellFigures
from rlhf.evaluate.comparison import AT, compare
from rlhf.evaluate.comparison_words import as_table
from rlhf.evaluate.page import template
from rlhf.evaluate.pareto import write_pareto
from rlhf.evaluate.words import duration
from rlhf.files import write_atomic

__all__ = ["as_table", "html", "write_comparison"]

JUDGES = ("gold", "evaluator")
FAMILIES = ("left_behind", "lower_tail", "reward_gain", "overoptimisation", "hacking")
ABLATED = (
    words.MAIN,
    "win/evaluator/joint",
    "left_behind/joint",
    "hacking/repeated_sentence",
    "hacking/length",
)


def write_comparison(
    figures: Sequence[CellFigures],
    folder: Path,
    title: str,
    reference_arm: str = "lsc",
    at: Sequence[float] = AT,
    expected: Iterable[tuple[str, int, int]] | None = None,
) -> dict[str, Any]:
    """Writes the five files into `folder` and returns the summary; arguments as those of `compare`.

    Raises:
        ValueError: as `compare`.
    """
    summary = compare(figures, reference_arm, at, expected)
    page = html(summary, title)
    folder.mkdir(parents=True, exist_ok=True)
    content = {"title": title, "figures": [f.to_json() for f in figures], "comparison": summary}
    text = json.dumps(content, indent=1, sort_keys=True, allow_nan=False)
    write_atomic(folder / "summary.json", text + "\n")
    write_atomic(folder / "comparison.html", page)
    write_atomic(folder / "comparison.md", words.as_markdown(summary))
    write_pareto(summary, folder)
    return summary


def html(summary: Mapping[str, Any], title: str) -> str:
    """The page; every text from outside is escaped by the template."""
    main, ablations = plots.main_arms(summary), plots.ablation_arms(summary)
    by_family = {family: [m for m in summary["metrics"] if m.startswith(f"{family}/")] for family in FAMILIES}
    helpers = (duration, words.amount, words.count, words.describe, words.favours, words.level)
    return template("comparison.html.j2", helpers).render(
        title=title,
        s=summary,
        verdict=words.verdict(summary),
        notes=words.notes(summary),
        light=svg.css(0),
        dark=svg.css(1),
        legend=plots.legend(summary, main),
        trained=plots.legend(summary, [arm for arm in main if arm != BEST_OF]),
        ablation_legend=plots.legend(summary, ablations),
        wins=[_judged(summary, main, "win", judge) for judge in JUDGES],
        versus=[_judged(summary, main, "versus", judge) for judge in JUDGES],
        gaps=plots.differences(summary, main[1:], words.MAIN),
        panels_of={family: plots.over_kl(summary, main, by_family[family]) for family in FAMILIES},
        ablated=plots.over_kl(summary, ablations, ABLATED) if summary["ablations"] else [],
        ablation_gaps=plots.differences(summary, summary["ablations"], words.MAIN),
        metrics=words.shown_metrics(summary),
        unmoved=[words.describe(m).label for m in by_family["hacking"] if words.still(summary, m)],
        kls=[f"{kl:g}" for kl in summary["at"]],
        tables=[arm for arm in summary["arms"] if summary["differences"].get(arm)],
        closed=set(summary["ablations"]),
    )


def _judged(summary: Mapping[str, Any], arms: Sequence[str], family: str, judge: str) -> list[svg.Panel]:
    """The joint rate first, then the properties."""
    names = sorted((m for m in summary["metrics"] if m.startswith(f"{family}/{judge}/")), key=_not_joint)
    return plots.over_kl(summary, arms, names)


def _not_joint(metric: str) -> bool:
    return not metric.endswith("/joint")
