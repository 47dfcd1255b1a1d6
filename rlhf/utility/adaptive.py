"""Which prompts need more samples of the base policy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rlhf.utility.rules import ReferenceRule
from rlhf.utility.statistics import BaselineStatistics


@dataclass(frozen=True)
class Progress:
    """Where the sampling of B prompts stands."""

    needs: np.ndarray  # bool [B]: which prompts need more samples
    taken: int  # samples taken, of all prompts together
    saved: int  # less than `maximum` for every prompt; final once no prompt needs any


@dataclass(frozen=True)
class AdaptiveSampling:
    """Takes samples of a prompt until r_ref of every sampled rule has a standard error of `tolerance` at most.

    Each prompt gets `minimum` samples, and `maximum` at most. If no rule is sampled (all are constant, canned
    or a column), `minimum` is enough. Samples are common to the models: of those with a sampled rule the one that holds
    the fewest of a prompt says how many it has.

    Stopping once the error looks small prefers samples that happen to lie close together, so r_ref comes out low.
    Measured on 40 000 normal prompts of std 1, level 0.85, 16 to 128 samples in rounds of 16, tolerances 0.15 to 0.4,
    against a fixed number equal to the mean number taken: 0.018 to 0.030 lower for the empirical quantile, 0.013 to
    0.041 for the gaussian one, up to a seventh of the tolerance; and the root mean square error at equal std is
    up to 17 % larger (5 to 9 % gaussian). The gain is in sampling prompts of different std differently.

    >>> statistics, ids = BaselineStatistics(), np.array([1, 2], np.uint64)
    >>> calm, wild = np.arange(16, dtype=np.float32) / 16, np.arange(16, dtype=np.float32)
    >>> _ = statistics.add_samples("m", np.repeat(ids, 16), np.concatenate([calm, wild]), item=0)
    >>> rules = {"m": ReferenceRule("mean", 0.5, "empirical", 0.0)}
    >>> AdaptiveSampling(tolerance=0.5, minimum=8, maximum=64).progress(statistics, rules, ids)
    Progress(needs=array([False,  True]), taken=32, saved=96)
    """

    tolerance: float  # in the rewards' units
    minimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not self.tolerance > 0:
            raise ValueError(f"the tolerance of a reference reward must be above 0, not {self.tolerance}")
        if not 1 <= self.minimum <= self.maximum:
            raise ValueError(
                f"samples of a prompt must be 1 <= min <= max, not {self.minimum} and {self.maximum}"
            )

    def progress(
        self, statistics: BaselineStatistics, rules: Mapping[str, ReferenceRule], prompt_ids: np.ndarray
    ) -> Progress:
        """Of these prompts, uint64 [B], each given once.

        A standard error that is not known (NaN, as with a single sample) counts as above the tolerance.
        """
        prompt_ids = np.asarray(prompt_ids, np.uint64)
        assert len(np.unique(prompt_ids)) == len(prompt_ids), "a prompt is given twice"
        assert rules
        counted = [model for model, rule in rules.items() if rule.sampled]
        held = np.min([statistics.counts(model, prompt_ids) for model in counted or rules], axis=0)
        needs = held < self.minimum
        for model, rule in rules.items():
            if rule.sampled:
                judged = np.flatnonzero(held > 1)  # one sample has no error
                error = statistics.reference(model, prompt_ids[judged], rule).standard_error
                precise = np.zeros(len(prompt_ids), bool)
                precise[judged] = error <= self.tolerance  # False for NaN
                needs |= ~precise
        needs &= held < self.maximum
        taken = int(held.sum())
        return Progress(needs, taken, self.maximum * len(prompt_ids) - taken)
