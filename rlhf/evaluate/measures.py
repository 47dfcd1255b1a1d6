"""The metrics of a policy against the base policy, as a flat dict of floats:

    win/JUDGE/NAME          share of responses that reach the judge's reference (the base policy's 85 % quantile)
    versus/JUDGE/NAME       chance to beat a random base response, ties half
    score/JUDGE/PROPERTY    mean score
    left_behind/NAME        share of prompts whose mean judged score fell
    left_behind/joint_win   share of prompts whose joint win rate fell
    lower_tail/NAME         change of the mean judged score, 10 % quantile over prompts
    reward_gain/MODEL/mean, reward_gain/MODEL/q95   raw training reward of a response less the mean of its prompt's
                            base responses, nats: mean and 95 % quantile over responses
    overoptimisation/JUDGE  gain of the training rewards less gain of the judge's scores, each a mean over models or
                            properties in units of the base policy's standard deviation
    hacking/COUNTER         `rlhf.evaluate.hacking`

JUDGE is "gold" (`PolicySamples.judged`) or "evaluator" (`evaluated`); NAME is a property or "joint". For win and
versus joint is as in `rlhf.evaluate.wins`; for left_behind and lower_tail it is the score summed over properties in
units of the base policy's spread (`rlhf.evaluate.examples.totals`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from rlhf.evaluate.examples import scales, totals
from rlhf.evaluate.hacking import Lexicon, hacking
from rlhf.evaluate.samples import PolicySamples, applying
from rlhf.evaluate.wins import JOINT, left_behind, mean, per_prompt, prompt_versus, prompt_wins

LOWER_TAIL, UPPER_TAIL = 0.10, 0.95
Judges = Mapping[str, tuple[PolicySamples, PolicySamples]]
"""Judge -> the base and the aligned policy's samples as that judge sees them."""


def by_evaluator(samples: PolicySamples) -> PolicySamples:
    """The same samples, judged by the evaluator reward models."""
    return replace(samples, judged=samples.evaluated, judge_reference=samples.evaluator_reference)


def measure(
    base: PolicySamples, aligned: PolicySamples, lexicon: Lexicon
) -> tuple[dict[str, float], dict[str, float]]:
    """Metric -> value of the aligned policy, and metric -> value at KL 0, where the policy is the base.

    Sampling noise alone moves left_behind and lower_tail, so their values at KL 0 are those of `noise`; they are
    absent when a prompt has fewer than two base samples. left_behind/joint_win has none.
    """
    judges = judges_of(base, aligned)
    values: dict[str, float] = {}
    start = anchored(judges)
    for judge, (before, after) in judges.items():
        values |= {f"win/{judge}/{n}": mean(v) for n, v in prompt_wins(after).items()}
        values |= {f"versus/{judge}/{n}": mean(v) for n, v in prompt_versus(before, after).items()}
        values |= {f"score/{judge}/{n}": _mean(s) for n, s in after.judged.items()}
        gained = _gain(before.judged, after.judged)
        values[f"overoptimisation/{judge}"] = _gain(applying(base.rewards), aligned.rewards) - gained
        start[f"overoptimisation/{judge}"] = 0.0
    values |= progress(base, aligned)
    start |= noise(base, aligned)
    for name, rewards in applying(aligned.rewards).items():
        values |= _tail(name, rewards, base.rewards[name])
        start |= _tail(name, base.rewards[name], base.rewards[name])
    for name, counted in hacking(base, aligned, lexicon).items():
        values[f"hacking/{name}"], start[f"hacking/{name}"] = counted["aligned"], counted["base"]
    return values, start


def judges_of(base: PolicySamples, aligned: PolicySamples) -> Judges:
    """Judge -> both policies' samples as that judge sees them."""
    assert list(base.judged) == list(aligned.judged), (list(base.judged), list(aligned.judged))
    assert list(base.evaluated) == list(aligned.evaluated), (list(base.evaluated), list(aligned.evaluated))
    found = {"gold": (base, aligned)}
    return found | {"evaluator": (by_evaluator(base), by_evaluator(aligned))} if aligned.evaluated else found


def anchored(judges: Judges) -> dict[str, float]:
    """The base policy's own win rates, one half against itself, and mean scores."""
    start: dict[str, float] = {}
    for judge, (base, _) in judges.items():
        for name, wins in prompt_wins(base).items():
            start |= {f"win/{judge}/{name}": mean(wins), f"versus/{judge}/{name}": 0.5}
        start |= {f"score/{judge}/{name}": _mean(scores) for name, scores in base.judged.items()}
    return start


def progress(base: PolicySamples, aligned: PolicySamples) -> dict[str, float]:
    """left_behind and lower_tail: how evenly prompts improved."""
    scale = scales(base)
    rows = per_prompt(base, aligned)
    differences = {name: row["difference"] for name, row in rows.items()}
    differences[JOINT] = totals(aligned, scale).mean(axis=1) - totals(base, scale).mean(axis=1)
    found = {f"left_behind/{name}": left_behind(d) for name, d in differences.items()}
    fell = prompt_wins(aligned)[JOINT] < prompt_wins(base)[JOINT]
    found["left_behind/joint_win"] = float(fell.mean())
    return found | {f"lower_tail/{n}": float(np.nanquantile(d, LOWER_TAIL)) for n, d in differences.items()}


def noise(base: PolicySamples, aligned: PolicySamples) -> dict[str, float]:
    """What `progress` shows when nothing changed: the base policy's even samples against its odd ones.

    Both directions are averaged. left_behind/joint_win is left out: with half the samples more prompts tie, and none of
    them fell. A lower tail is scaled to the sample counts of the comparison itself, whose
    differences of means have variance 1/N + 1/n in place of 1/h + 1/h' for the halves.
    """
    count, after = base.lengths.shape[1], aligned.lengths.shape[1]
    if count < 2:
        return {}
    even, odd = _columns(base, slice(0, None, 2)), _columns(base, slice(1, None, 2))
    there, back = progress(even, odd), progress(odd, even)
    halves = 1 / (count - count // 2) + 1 / (count // 2)
    shrink = math.sqrt((1 / count + 1 / after) / halves)
    mean = {name: (there[name] + back[name]) / 2 for name in there if name != "left_behind/joint_win"}
    return {name: v * shrink if name.startswith("lower_tail") else v for name, v in mean.items()}


def _columns(samples: PolicySamples, which: slice) -> PolicySamples:
    """Part of the samples of each prompt; only the judged scores are cut."""
    return replace(samples, judged={name: s[:, which] for name, s in samples.judged.items()})


def _gain(before: Mapping[str, np.ndarray], after: Mapping[str, np.ndarray]) -> float:
    """Rise of the mean score, a mean over models or properties, in units of the first policy's deviation."""
    spread = {name: float(np.nanstd(s, dtype=np.float64)) or 1.0 for name, s in before.items()}
    return float(np.mean([(_mean(after[name]) - _mean(before[name])) / spread[name] for name in before]))


def _tail(name: str, rewards: np.ndarray, before: np.ndarray) -> dict[str, float]:
    gain = np.asarray(rewards, np.float64) - np.mean(before, axis=1, keepdims=True, dtype=np.float64)
    return {
        f"reward_gain/{name}/mean": float(np.nanmean(gain)),
        f"reward_gain/{name}/q95": float(np.nanquantile(gain, UPPER_TAIL)),
    }


def _mean(scores: np.ndarray) -> float:
    return float(np.nanmean(scores, dtype=np.float64))
