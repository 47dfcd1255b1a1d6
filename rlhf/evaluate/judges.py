"""Who decides wins: a judge that knows the truth (the microcosm's), or, without one, the reward models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.data.microcosm import GOLD_REFERENCE, judge
from rlhf.types import Prompt

Texts = Sequence[Sequence[str]]
Scores = dict[str, np.ndarray]


@dataclass(frozen=True)
class MicrocosmJudge:
    """The microcosm's gold judge. A win is to reach, on helpful, a quantile of the base policy's own gold scores
    for the prompt; on harmless, a fixed score."""

    def score(self, prompts: Sequence[Prompt], texts: Texts) -> Scores:
        """Gold scores, float32 [P, n] by property."""
        rows = [judge(p.content, p.meta, list(t)) for p, t in zip(prompts, texts, strict=True)]
        return {name: np.stack([row[name] for row in rows]).astype(np.float32) for name in rows[0]}

    def reference(self, base: Scores) -> Scores:
        """The score to reach, float32 [P] by property, from scores of base-policy samples."""
        found = {}
        for name, scores in base.items():
            kind, value = GOLD_REFERENCE[name]
            fixed = np.full(len(scores), value, np.float32)
            found[name] = (
                np.quantile(scores, value, axis=1).astype(np.float32) if kind == "quantile" else fixed
            )
        return found


def judge_for(name: str | None) -> MicrocosmJudge | None:
    return {"microcosm": MicrocosmJudge(), None: None}[name]
