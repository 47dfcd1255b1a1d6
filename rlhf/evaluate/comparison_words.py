"""What a comparison of arms says, in plain sentences and as a table for the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.evaluate.cells import BEST_OF
from rlhf.evaluate.hacking import COUNTERS
from rlhf.evaluate.words import Verdict, signed

MAIN = "win/gold/joint"
NOT_TOLD = "not told apart"
_MARKDOWN = (
    MAIN,
    "win/evaluator/joint",
    "left_behind/joint",
    "hacking/repeated_sentence",
    "hacking/length",
    "overoptimisation/gold",
)
_UNITS = {"share": "points"}
_HEADLINE = (MAIN, "win/evaluator/joint", "left_behind/joint")
JUDGES = {"gold": "gold judge", "evaluator": "evaluator models"}
_FAMILIES = {  # label, unit, whether more is better (1), worse (-1) or neither (0)
    "win": ("Win rate", "share", 1),
    "versus": ("Beats a random base response", "share", 1),
    "score": ("Mean score", "score", 1),
    "left_behind": ("Prompts left behind", "share", -1),
    "lower_tail": ("Change of score, worst tenth", "score", 1),
    "reward_gain": ("Training reward above base", "nats", 0),
    "overoptimisation": ("Reward gain beyond judged gain", "base std", -1),
}


@dataclass(frozen=True)
class Metric:
    """How a metric is told; `better`: 1 when more is better, -1 when less is, 0 when it depends."""

    label: str
    unit: str
    better: int


def describe(metric: str) -> Metric:
    """
    >>> describe("win/evaluator/joint").label, describe("left_behind/joint_win").better
    ('Win rate, joint (evaluator models)', -1)
    """
    family, *rest = metric.split("/")
    if family == "hacking":
        counter = COUNTERS[rest[0]]
        return Metric(counter.label, counter.unit, {"length": 0, "distinct_2": 1}.get(rest[0], -1))
    label, unit, better = _FAMILIES[family]
    if family == "reward_gain":
        tail = rest[1] == "q95"
        return Metric(f"{label}, {rest[0]}: {'95 % quantile' if tail else 'mean'}", unit, -1 if tail else 0)
    if metric == "left_behind/joint_win":
        return Metric("Prompts whose joint win rate fell", unit, better)
    judge = f" ({JUDGES[rest[0]]})" if rest[0] in JUDGES else ""
    name = f", {rest[-1]}" if rest[-1] not in JUDGES else ""
    return Metric(f"{label}{name}{judge}", unit, better)


def verdict(summary: Mapping[str, Any]) -> Verdict:
    """The page's first words: the joint win rate against each baseline, averaged over the common KL range."""
    arm, found = summary["reference_arm"], summary["differences"]
    groups: dict[str, list[str]] = {}
    for other in summary["baselines"]:
        row = found[other].get(MAIN)
        groups.setdefault(row["average"]["verdict"] if row and row["average"] else NOT_TOLD, []).append(other)
    parts = [f"higher than {_join(groups['higher'])}’s"] if "higher" in groups else []
    parts += [f"lower than {_join(groups['lower'])}’s"] if "lower" in groups else []
    parts += [f"not told apart from {_join(groups[NOT_TOLD])}’s"] if NOT_TOLD in groups else []
    outcome = "unclear"
    if ("higher" in groups) != ("lower" in groups):
        outcome = "better" if "higher" in groups else "worse"
    headline = f"At equal KL, {arm}’s joint win rate is {'; '.join(parts)}."
    if not parts:
        headline = f"No baseline was measured beside {arm}."
    return Verdict(outcome, headline, tuple(_against(summary, other) for other in summary["baselines"]))


def _against(summary: Mapping[str, Any], other: str) -> str:
    """Of one baseline: wins and prompts left behind with their numbers, then the signs of hacking that moved."""
    rows = summary["differences"][other]
    main = rows.get(MAIN)
    if main is None or main["average"] is None:
        return f"{other}: no KL that both arms cover in all common seeds, so nothing is compared."
    low, high = main["range"]
    compared = [m for m in rows if rows[m]["average"] and not still(summary, m)]
    said = [_said(m, rows[m]["average"]) for m in _HEADLINE if m in compared]
    within = main["within"]
    if within and within["average"]["verdict"] != main["average"]["verdict"]:
        start, end = within["range"]
        told = f"{within['average']['verdict']}, {amount(MAIN, within['average'])}"
        said.append(f"joint win rate between measured points only ({start:.1f} to {end:.1f} nats): {told}")
    signs = [m for m in compared if m.startswith("hacking/")]
    moved = [m for m in signs if rows[m]["average"]["verdict"] != NOT_TOLD]
    said += [_said(m, rows[m]["average"]) for m in moved]
    same = [_lower(describe(m).label) for m in signs if m not in moved]
    said += [f"{NOT_TOLD}: {', '.join(same)}"] if same else []
    return f"Against {other} (KL {low:.1f} to {high:.1f} nats, {count(len(main['seeds']), 'seed')}): {'; '.join(said)}."


def _said(metric: str, average: Mapping[str, Any]) -> str:
    unit = "" if describe(metric).unit in ("share", "score") else f" ({describe(metric).unit})"
    return f"{_lower(describe(metric).label)}{unit}: {average['verdict']}, {amount(metric, average)}"


def _lower(text: str) -> str:
    return f"{text[0].lower()}{text[1:]}"


def still(summary: Mapping[str, Any], metric: str) -> bool:
    """Whether a metric is the same at every point of every arm, such as a feature that no response has."""
    rows = [row["metrics"] for rows in summary["curves"].values() for row in rows]
    return len({row[metric]["mean"] for row in rows if metric in row}) < 2


def amount(metric: str, found: Mapping[str, Any], unit: bool = True) -> str:
    """A difference with its interval: "+3.1 points (+1.0 to +5.2)"."""
    share = describe(metric).unit == "share"
    scale, digits = (100, 1) if share else (1, 2)
    text = signed(scale * found["mean"], digits) + (" points" if share and unit else "")
    if found["low"] is None:
        return text
    return f"{text} ({signed(scale * found['low'], digits)} to {signed(scale * found['high'], digits)})"


def level(metric: str, found: Mapping[str, Any]) -> str:
    """A value with half its interval: "31.4 ± 2.0 %"."""
    share = describe(metric).unit == "share"
    scale, digits = (100, 1) if share else (1, 2)
    half = "" if found["low"] is None else f" ± {scale * (found['high'] - found['low']) / 2:.{digits}f}"
    return f"{scale * found['mean']:.{digits}f}{half}" + ("\u00a0%" if share else "")


def favours(metric: str, found: Mapping[str, Any]) -> str:
    """Whom a difference that is told apart speaks for: "better" (the reference arm), "worse", or ""."""
    side = {"higher": 1, "lower": -1}.get(found["verdict"], 0) * describe(metric).better
    return {1: "better", -1: "worse"}.get(side, "")


def shown_metrics(summary: Mapping[str, Any]) -> list[str]:
    """The page's metrics: rates and spreads first, signs of hacking last; mean scores are in the JSON only."""
    families = ("win", "versus", "left_behind", "lower_tail", "reward_gain", "overoptimisation", "hacking")
    moving = [m for m in summary["metrics"] if not still(summary, m)]
    return [m for f in families for m in moving if m.split("/")[0] == f]


def table_metrics(summary: Mapping[str, Any]) -> list[str]:
    """The console's metrics: of every family the joint one, and by the gold judge also each property."""
    keep = ("win/gold/", "hacking/", "overoptimisation/")
    return [
        m
        for m in shown_metrics(summary)
        if m.startswith(keep) or m.endswith(("/joint", "/joint_win", "/q95"))
    ]


def notes(summary: Mapping[str, Any]) -> list[str]:
    """What a reader has to know to trust the figures no further than they reach."""
    total, apart = summary["comparisons"], summary["apart"]
    said = [
        f"{total} intervals of differences were computed and {apart} leave out zero; with no difference anywhere about "
        f"{0.05 * total:.0f} would, and they depend on each other. They are not corrected for multiplicity.",
        "Intervals are t-intervals over seeds, each seed paired with itself. All cells share the evaluation prompts: "
        "what other prompts would add to the uncertainty is not in them.",
        "Between measured points, and from the base policy at KL 0 to the first, metrics are interpolated linearly in "
        "KL; no arm is judged beyond its largest KL.",
        "Shares of prompts that fell, and the worst tenth, include sampling noise: at KL 0 they are what noise shows "
        "(of the joint win rate that is not known).",
    ]
    if any(len(seeds) == 1 for seeds in summary["seeds"].values()):
        said.append("Where an arm has one seed there is no interval, and nothing can be told apart.")
    if summary["judge"] == "reward_models":
        said.append(
            "Wins called gold are judged by the reward models that were trained on: no independent judge."
        )
    if BEST_OF in summary["arms"]:
        said.append(
            "best_of_n is not trained: expected figures of choosing the best of n base responses by "
            f"{summary['reference_arm']}’s utility, drawn at KL "
            "log n − (n−1)/n, which is exact for continuous utilities and an upper bound otherwise (arXiv 2401.01879)."
        )
    return said


def as_table(summary: Mapping[str, Any]) -> str:
    """The differences and the best points as plain text; * marks an interval that leaves out zero."""
    blocks = [_block(summary, arm) for arm in summary["differences"]]
    rows = [["highest mean over seeds", "metric", "value", "KL"]]
    for arm, found in summary["best"].items():
        rows += [
            [arm, describe(m).label, level(m, v["value"]), f"{v['kl']['mean']:.2f}"] for m, v in found.items()
        ]
    missing = [
        f"not run: {i['arm']} point {i['point']} seed {i['seed']}: {i['why']}" for i in summary["incomplete"]
    ]
    return "\n\n".join([*blocks, aligned_columns(rows), "\n".join([*notes(summary), *missing])]) + "\n"


def as_markdown(summary: Mapping[str, Any]) -> str:
    """The main differences at equal KL as a Markdown table, a row for each other arm."""
    metrics = [m for m in _MARKDOWN if m in summary["metrics"]]
    arm = summary["reference_arm"]
    heads = [f"{arm} minus", "KL, nats"]
    heads += [f"{describe(m).label}, {_UNITS.get(describe(m).unit, describe(m).unit)}" for m in metrics]
    lines = [heads, ["---"] * len(heads)]
    for other, rows in summary["differences"].items():
        span = rows[MAIN]["range"] if MAIN in rows else None
        cells = [
            _markdown(m, rows[m]["average"]) if m in rows and rows[m]["average"] else "–" for m in metrics
        ]
        lines.append([other, "–" if span is None else f"{span[0]:.1f} to {span[1]:.1f}", *cells])
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        table
        + f"\n\nMean over seeds (95 % t-interval); ✓ told apart in favour of {arm}, ✗ in favour of the other.\n"
    )


def _markdown(metric: str, average: Mapping[str, Any]) -> str:
    mark = {"better": " ✓", "worse": " ✗"}.get(favours(metric, average), "")
    return amount(metric, average, unit=False) + mark


def _block(summary: Mapping[str, Any], arm: str) -> str:
    found = summary["differences"][arm]
    kls = [f"{kl:g}" for kl in summary["at"] if any(f"{kl:g}" in row["at"] for row in found.values())]
    rows = [
        [
            f"{summary['reference_arm']} − {arm}",
            "average",
            *(f"KL {kl}" for kl in kls),
            "range",
            "seeds +/−",
        ]
    ]
    for metric in (m for m in table_metrics(summary) if m in found):
        row, average = found[metric], found[metric]["average"]
        cells = [_cell(metric, average), *(_cell(metric, row["at"].get(kl)) for kl in kls)]
        span = "{:.1f}–{:.1f}".format(*row["range"]) if row["range"] else ""
        signs = f"{average['above']}/{average['below']}" if average else ""
        unit = {"share": "points", "score": ""}.get(describe(metric).unit, describe(metric).unit)
        rows.append([describe(metric).label + (f", {unit}" if unit else ""), *cells, span, signs])
    return aligned_columns(rows)


def _cell(metric: str, found: Mapping[str, Any] | None) -> str:
    if found is None:
        return "–"
    return amount(metric, found, unit=False) + ("*" if found["verdict"] != NOT_TOLD else "")


def aligned_columns(rows: Sequence[Sequence[str]]) -> str:
    """
    >>> aligned_columns([["a", "b"], ["long", "1"]])
    'a     b\\nlong  1'
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
    return "\n".join(lines)


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _join(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
