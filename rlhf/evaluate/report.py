"""Writes a run's report: report.html for people, summary.json for programs.

report.html is one file without scripts or styles from elsewhere; it follows the reader's light or dark theme.

summary.json (keys sorted, no NaN):
    win_rate.NAME.{base, aligned}       share of winning responses; NAME is a judged property, or "joint"
    win_rate_ci.NAME.{base, aligned, change}    [low, high], 95 %, by clusters; change is aligned - base
    win_vs_random.NAME                  chance to beat a random base response to the same prompt; ties half
    win_vs_random_ci.NAME               [low, high]
    kl, kl_standard_error               nats a response, aligned from base policy
    best_of.N.{kl, win_rate.NAME, versus.NAME}  best-of-N of the base policy, by the utility that was maximised;
                                        versus is empty where N is every sample there is
    left_behind.PROPERTY                share of prompts whose mean judged score fell
    hacking.COUNTER.{base, aligned}     counters of `rlhf.evaluate.hacking`
    evaluations                         a list, by step: the points of `rlhf.evaluate.curve`
    steps_left_out                      steps whose loss or gradient was not finite
    chosen_step, stopped_early          which of them the aligned policy is, or null; why training ended early, or ""
    rewards.NAME.{kind, scale, error_rate, temperature, reference}    what its numbers mean
    rewards.NAME.spread                 median over prompts of the base samples' deviation, in its unit
    rewards.NAME.absent                 share of evaluation prompts that it does not apply to
    rewards.NAME.calibration            pairs, temperature, standard_error, fault; before and after: accuracy,
                                        log_loss, error (rlhf.utility.calibration); absent without pairs
    agreement.NAME NAME                 share of pairs of base responses that both put in one order
    warnings                            what is to be feared of a reward, in words
    judge                               "own", or "reward_models" when they judged themselves
    prompts, samples, clusters, cluster_by      evaluation prompts, responses to each of them by the aligned
                                        policy, and what the intervals draw: topics or prompts
    seconds.{STAGE, total}, skipped, versions.PACKAGE
    notes                               slower ways that were taken, and why
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.evaluate import plots, sources, svg, words
from rlhf.evaluate.curve_plots import evaluation_curves
from rlhf.evaluate.examples import before_after, prompt_text, worst_prompts
from rlhf.evaluate.hacking import COUNTERS, Lexicon, hacking
from rlhf.evaluate.page import template
from rlhf.evaluate.record import RunRecord
from rlhf.evaluate.source_plots import calibration_panels
from rlhf.evaluate.wins import win_rates
from rlhf.files import write_atomic
from rlhf.timeline import WAITS

Counts = Mapping[str, Mapping[str, float]]
"""Counter -> {"base", "aligned"}."""

_SUMMARY = (
    "win_rate",
    "win_rate_ci",
    "win_vs_random",
    "win_vs_random_ci",
    "kl",
    "kl_standard_error",
    "left_behind",
    "prompts",
    "samples",
    "clusters",
    "cluster_by",
)


def write_report(run: RunRecord, directory: Path, lexicon: Lexicon | None = None) -> dict[str, Any]:
    """Writes `directory`/report.html and summary.json, and returns what is in that; `lexicon`: what is a refusal or a
    stock phrase.

    Raises:
        ValueError: a judged score or a number of the summary is not finite.
    """
    wins = win_rates(run.base, run.aligned)
    counters = hacking(run.base, run.aligned, lexicon or Lexicon())
    found = summary(run, wins, counters)
    page = html(run, wins, counters)
    directory.mkdir(parents=True, exist_ok=True)
    text = json.dumps(found, indent=1, sort_keys=True, allow_nan=False)
    write_atomic(directory / "summary.json", text + "\n")
    write_atomic(directory / "report.html", page)
    return found


def summary(run: RunRecord, wins: Mapping[str, Any], counters: Counts) -> dict[str, Any]:
    """The content of summary.json; refuses numbers that are not finite."""
    found = {name: wins[name] for name in _SUMMARY} | {
        "best_of": {
            str(b.n): {"kl": b.kl, "win_rate": dict(b.win_rate), "versus": dict(b.versus)}
            for b in run.best_of
        },
        "hacking": counters,
        "evaluations": [asdict(p) for p in run.points],
        "steps_left_out": _left_out(run),
        "chosen_step": run.choice.step if run.choice is not None else None,
        "stopped_early": run.stopped,
        "judge": "reward_models" if words.judged_by_rewards(run.aligned) else "own",
        "seconds": dict(run.seconds),
        "skipped": list(dict.fromkeys(run.skipped)),
        **sources.summary(run.rewards, sources.agreement(run.base.rewards)),
        "notes": list(run.notes),
        "versions": dict(run.versions),
    }
    for key, value in _leaves(found):
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"summary.json: {key} is {value}")
    return found


def _left_out(run: RunRecord) -> int:
    return int(sum(row.get("skipped", 0.0) for row in run.metrics))


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part, key)
    else:
        yield key, value


def html(run: RunRecord, wins: Mapping[str, Any], counters: Counts) -> str:
    """The page; every text from outside is escaped by the template."""
    own_judge = not words.judged_by_rewards(run.aligned)
    prompts = [prompt_text(p) for p in next(iter(run.baseline.values()), {"prompts": ()})["prompts"]]
    helpers = (words.percent, words.interval, words.signed, words.duration)
    return template("report.html.j2", helpers).render(
        run=run,
        wins=wins,
        names=plots.shown_properties(wins),
        main=plots.shown_properties(wins)[0],
        own_judge=own_judge,
        verdict=words.verdict(wins, own_judge),
        light=svg.css(0),
        dark=svg.css(1),
        win_bars=plots.win_bars(wins),
        rewards=run.rewards,
        agreement=sources.agreement(run.base.rewards),
        calibration=calibration_panels(run.rewards),
        curves=plots.curves(run.metrics, list(run.aligned.rewards)),
        evaluations=evaluation_curves(run.points, run.choice.step) if run.choice is not None else [],
        distributions=list(zip(prompts, plots.distributions(run.baseline), strict=True)),
        improvement=plots.improvement(wins),
        worst=worst_prompts(run.base, run.aligned, wins),
        counters=[_counter_row(name, values) for name, values in counters.items()],
        examples=before_after(run.base, run.aligned),
        waits=WAITS,
        left_out=_left_out(run),
        time_bars=plots.time_bars(run.seconds, run.metrics),
    )


def _counter_row(name: str, values: Mapping[str, float]) -> dict[str, str]:
    """A row of the counter table, as text."""
    counter = COUNTERS[name]
    base, aligned = values["base"], values["aligned"]
    if counter.unit == "share":
        moved = f"{words.signed(100 * (aligned - base), 1)} points"
        return {
            "label": counter.label,
            "base": words.percent(base),
            "aligned": words.percent(aligned),
            "change": moved,
        }
    label = f"{counter.label} ({counter.unit})"
    ratio = f" ({words.signed(100 * (aligned / base - 1))}\u00a0%)" if base else ""
    moved = words.signed(aligned - base, 2) + ratio
    return {"label": label, "base": f"{base:.2f}", "aligned": f"{aligned:.2f}", "change": moved}
