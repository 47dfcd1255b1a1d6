"""Prompts and responses to look at, chosen by rule and never by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.data.messages import said
from rlhf.evaluate.samples import PolicySamples
from rlhf.types import Content


@dataclass(frozen=True)
class Fallen:
    """A prompt that was left behind in a property."""

    prompt: str
    topic: str
    name: str
    base: float
    aligned: float
    difference: float


@dataclass(frozen=True)
class Shown:
    """One response; `scores` has (property, judged score, whether it wins)."""

    text: str
    tokens: int
    finished: bool
    scores: tuple[tuple[str, float, bool], ...]


@dataclass(frozen=True)
class Example:
    """A prompt with a typical response of each policy. `group`: best, median or worst, by its change."""

    group: str
    prompt: str
    topic: str
    change: float
    base: Shown
    aligned: Shown


def prompt_text(content: Content) -> str:
    """A prompt as one text; messages are told apart by their roles when there is more than one.

    >>> prompt_text([{"role": "user", "content": "Hi"}])
    'Hi'
    >>> prompt_text([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}])
    'system: Be brief.\\nuser: Hi'
    """
    if isinstance(content, str):
        return content
    if len(content) == 1:
        return said(content[0])
    return "\n".join(f"{message['role']}: {said(message)}" for message in content)


def scales(base: PolicySamples) -> dict[str, float]:
    """Property -> standard deviation of the base policy's scores: what makes properties comparable."""
    return {name: float(np.nanstd(scores, dtype=np.float64)) or 1.0 for name, scores in base.judged.items()}


def worst_prompts(
    base: PolicySamples, aligned: PolicySamples, wins: Mapping[str, Any], count: int = 12
) -> list[Fallen]:
    """The prompts and properties whose mean score fell most, in units of `scales`."""
    scale = scales(base)
    fallen = [
        (float(rows["difference"][p]) / scale[name], p, name)
        for name, rows in wins["per_prompt"].items()
        for p in np.flatnonzero(rows["left_behind"])
    ]
    chosen = sorted(fallen, key=lambda item: item[:2])[:count]
    return [_fallen(aligned, wins["per_prompt"][name], int(p), name) for _, p, name in chosen]


def _fallen(samples: PolicySamples, rows: Mapping[str, np.ndarray], p: int, name: str) -> Fallen:
    return Fallen(
        prompt=prompt_text(samples.prompts[p]),
        topic=str(samples.meta[p].get("topic", "")),
        name=name,
        base=float(rows["base"][p]),
        aligned=float(rows["aligned"][p]),
        difference=float(rows["difference"][p]),
    )


def before_after(base: PolicySamples, aligned: PolicySamples, each: int = 4) -> list[Example]:
    """`each` prompts with the best, the median and the worst change, with a typical response of each policy.

    A response's total is the sum over properties of (score - reference) in units of `scales`; a prompt's
    change is the difference of its mean totals; a typical response has its prompt's (lower) median total.
    """
    scale = scales(base)
    before, after = totals(base, scale), totals(aligned, scale)
    changes = after.mean(axis=1) - before.mean(axis=1)
    order = np.argsort(-changes, kind="stable")
    middle = max(0, (len(order) - each) // 2)
    groups = (("best", order[:each]), ("worst", order[-each:]), ("median", order[middle : middle + each]))
    taken: dict[int, str] = {}
    for group, prompts in groups:
        for p in prompts:
            taken.setdefault(int(p), group)
    return [
        Example(
            group=taken[p],
            prompt=prompt_text(aligned.prompts[p]),
            topic=str(aligned.meta[p].get("topic", "")),
            change=float(changes[p]),
            base=_shown(base, p, before[p]),
            aligned=_shown(aligned, p, after[p]),
        )
        for p in map(int, order)
        if p in taken
    ]


def totals(samples: PolicySamples, scale: Mapping[str, float]) -> np.ndarray:
    """float64 [P, n]: how far responses are above their references, over all properties."""
    parts = [
        (np.asarray(scores, np.float64) - samples.judge_reference[name][:, None]) / scale[name]
        for name, scores in samples.judged.items()
    ]
    return np.nansum(parts, axis=0)  # what does not apply adds nothing


def _shown(samples: PolicySamples, p: int, total: np.ndarray) -> Shown:
    row = int(np.argsort(total, kind="stable")[(len(total) - 1) // 2])
    scores = tuple(
        (name, float(values[p, row]), bool(values[p, row] >= samples.judge_reference[name][p]))
        for name, values in samples.judged.items()
        if not np.isnan(values[p, row])
    )
    return Shown(samples.texts[p][row], int(samples.lengths[p, row]), bool(samples.finished[p, row]), scores)
