"""The rewards of a run: what their numbers mean, how far they are to be trusted, and what is to be warned of."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.evaluate.samples import PolicySamples
from rlhf.evaluate.words import percent
from rlhf.sources.source import Source
from rlhf.utility.calibration import POOR
from rlhf.utility.scales import BRADLEY_TERRY, REFERRED, VERDICT, Scale

NATS = (
    1.0,
    3.0,
)  # within which the base samples' spread of a reward in nats of preference odds is to be expected


@dataclass(frozen=True)
class RewardFacts:
    """Of one reward.

    `calibration` is what its calibration.json holds (`rlhf.utility.calibration.Calibration`, and "step" and "curve" of
    a model that was trained here: a list of step, accuracy, log_loss and error on held-out pairs); None without pairs.
    """

    name: str
    kind: str  # of its source
    place: str  # a path, an address; of a model that was trained here ""
    scale: Scale  # as the utility takes it: with the temperature that it is divided by
    reference: str | None  # what r_ref is; None: the scale has a zero of its own
    calibration: Mapping[str, Any] | None
    spread: (
        float | None
    )  # median over prompts of the base samples' standard deviation, in its unit; None: one sample
    absent: float  # share of the evaluation prompts that it does not apply to

    @property
    def warnings(self) -> list[str]:
        found = []
        c = self.calibration
        if c is not None and c["before"]["accuracy"] < POOR:
            accuracy = percent(c["before"]["accuracy"])
            found.append(
                f"{self.name}: accuracy {accuracy} on {c['pairs']} pairs it was not trained on: it says little of what "
                "is preferred, and alignment to it is in vain"
            )
        if c is not None and c["fault"]:
            found.append(f"{self.name}: no temperature could be fitted: {c['fault']}")
        if self.scale.kind == BRADLEY_TERRY and c is None and self.spread is not None:
            low, high = NATS
            if not low <= self.spread <= high:
                saturates = "saturates too early" if self.spread > high else "hardly bends"
                found.append(
                    f"{self.name}: responses to a prompt spread by {self.spread:.2g} (expected {low:g} to {high:g} "
                    f"nats of preference odds), so log sigmoid {saturates}: give pairs (calibration) or a temperature"
                )
        if self.scale.kind == VERDICT and self.spread == 0:
            found.append(
                f"{self.name}: for half of the prompts or more all base responses have one verdict: it tells little"
            )
        return found


def reward_facts(
    rewards: Mapping[str, tuple[Source, Scale]],
    calibrations: Mapping[str, Mapping[str, Any]],
    base: PolicySamples,
) -> list[RewardFacts]:
    """Of all rewards, in order. `calibrations`: by reward, of those that have pairs."""
    return [
        RewardFacts(
            name,
            source.kind,
            "" if source.trains() else source.place,
            scale,
            (source.reference or "quantile") if scale.kind in REFERRED else None,
            calibrations.get(name),
            _spread(base.rewards[name], scale.temperature),
            float(np.isnan(base.rewards[name]).all(axis=1).mean()),
        )
        for name, (source, scale) in rewards.items()
    ]


def _spread(rewards: np.ndarray, unit: float) -> float | None:
    known = rewards[~np.isnan(rewards).all(axis=1)]
    if rewards.shape[1] < 2 or not len(known):
        return None
    return float(np.median(known.std(axis=1, ddof=1, dtype=np.float64))) / unit


def agreement(rewards: Mapping[str, np.ndarray]) -> dict[tuple[str, str], float]:
    """For each two rewards, float [P, n] each, of the pairs of responses to a prompt that both tell apart the share
    that they put in the same order; those with no such pair are left out.

    >>> agreement({"a": np.array([[1.0, 2, 3]]), "b": np.array([[1.0, 3, 2]])})
    {('a', 'b'): 0.6666666666666666}
    """
    orders = {name: np.sign(r[:, :, None] - r[:, None, :]) for name, r in rewards.items()}
    found = {}
    for a, b in itertools.combinations(orders, 2):
        both = orders[a] * orders[b]
        told = np.abs(both) == 1  # False for NaN
        if told.any():
            found[a, b] = float((both[told] > 0).mean())
    return found


def summary(facts: Sequence[RewardFacts], agreed: Mapping[tuple[str, str], float]) -> dict[str, Any]:
    """As summary.json has it."""
    rewards: dict[str, Any] = {}
    for f in facts:
        rewards[f.name] = {
            "kind": f.kind,
            "scale": f.scale.kind,
            "error_rate": f.scale.error_rate,
            "temperature": f.scale.temperature,
            "reference": f.reference,
            "spread": f.spread,
            "absent": f.absent,
        }
        if f.calibration is not None:
            c = f.calibration
            rewards[f.name]["calibration"] = {
                key: c[key] for key in ("pairs", "temperature", "standard_error", "fault")
            } | {
                when: {k: c[when][k] for k in ("accuracy", "log_loss", "error")}
                for when in ("before", "after")
            }
    return {
        "rewards": rewards,
        "agreement": {f"{a} {b}": share for (a, b), share in agreed.items()},
        "warnings": [warning for f in facts for warning in f.warnings],
    }
