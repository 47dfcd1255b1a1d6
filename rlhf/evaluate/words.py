"""What the numbers say, in plain sentences, and how numbers are written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.evaluate.samples import PolicySamples, applying
from rlhf.evaluate.wins import JOINT

FEW_CLUSTERS = 10  # below this, an interval by clusters is rough


@dataclass(frozen=True)
class Verdict:
    """`outcome`: better, worse or unclear, by the interval of the change."""

    outcome: str
    headline: str
    details: tuple[str, ...]


def verdict(wins: Mapping[str, Any], own_judge: bool) -> Verdict:
    """The page's first words. A change counts as one when its 95 % interval leaves out zero."""
    properties = list(wins["properties"])
    main = JOINT if len(properties) > 1 else properties[0]
    kl = f"at KL {wins['kl']:.1f} nats"
    subject = "Joint win rate" if main == JOINT else f"Win rate ({main})"
    details = [] if main != JOINT else [f"{name}: win rate {change(wins, name)}." for name in properties]
    behind = [f"{percent(share)} in {name}" for name, share in wins["left_behind"].items()]
    details.append(f"Prompts whose mean score fell: {', '.join(behind)}.")
    if not own_judge:
        details.append(
            "The judges are the reward models that were trained on: part of a gain can be over-optimisation."
        )
    if wins["clusters"] < FEW_CLUSTERS:
        details.append(f"With {wins['clusters']} {wins['cluster_by']}s only, the intervals are rough.")
    return Verdict(outcome(wins, main), f"{subject} {change(wins, main)} {kl}.", tuple(details))


def outcome(wins: Mapping[str, Any], name: str) -> str:
    low, high = wins["win_rate_ci"][name]["change"]
    return "better" if low > 0 else "worse" if high < 0 else "unclear"


def change(wins: Mapping[str, Any], name: str) -> str:
    """How a win rate moved: "rose from 12 % to 41 % (95 % CI of the change +20 to +37 points)"."""
    before, after = (percent(wins["win_rate"][name][policy]) for policy in ("base", "aligned"))
    low, high = wins["win_rate_ci"][name]["change"]
    interval = f"95\u00a0% CI of the change {signed(100 * low)} to {signed(100 * high)} points"
    moved = {
        "better": f"rose from {before} to {after}",
        "worse": f"fell from {before} to {after}",
        "unclear": f"did not change measurably: {before} before, {after} after",
    }
    return f"{moved[outcome(wins, name)]} ({interval})"


def judged_by_rewards(samples: PolicySamples) -> bool:
    """Whether the reward models themselves decided the wins."""
    return samples.judged.keys() == applying(samples.rewards).keys() and all(
        np.array_equal(scores, samples.rewards[name], equal_nan=True)
        for name, scores in samples.judged.items()
    )


def percent(share: float) -> str:
    """A share in per cent: one decimal below ten, none above, with a no-break space.

    >>> percent(0.413).replace(chr(160), " "), percent(0.0214).replace(chr(160), " ")
    ('41 %', '2.1 %')
    """
    digits = 1 if 0 < abs(share) < 0.0995 else 0
    return f"{100 * share:.{digits}f}\u00a0%"


def interval(ends: tuple[float, float]) -> str:
    """
    >>> interval((0.154, 0.25)).replace(chr(160), " ")
    '15–25 %'
    """
    low, high = percent(ends[0]), percent(ends[1])
    return f"{low.split()[0]}–{high}"


def signed(value: float, digits: int = 0) -> str:
    """With its sign, a true minus, and no minus zero.

    >>> signed(3.2), signed(-12.0), signed(-0.2)
    ('+3', '−12', '0')
    """
    text = f"{value:+.{digits}f}"
    return f"{0:.{digits}f}" if float(text) == 0 else text.replace("-", "−")


def duration(seconds: float) -> str:
    """
    >>> duration(7.31).replace(chr(160), " "), duration(4000).replace(chr(160), " ")
    ('7.3 s', '1 h 06 min')
    """
    if seconds < 60:
        return f"{seconds:.1f}\u00a0s"
    minutes, rest = divmod(int(seconds), 60)
    if minutes < 60:
        return f"{minutes}\u00a0min {rest:02d}\u00a0s"
    return f"{minutes // 60}\u00a0h {minutes % 60:02d}\u00a0min"
