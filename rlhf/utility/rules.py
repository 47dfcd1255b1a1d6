"""How a reference reward comes about."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

KINDS = ("quantile", "canned", "mean", "constant", "column")
SAMPLED = ("quantile", "mean")  # the kinds made from samples of the base policy
ESTIMATORS = ("empirical", "gaussian")


@dataclass(frozen=True)
class ReferenceRule:
    """How r_ref(x) of one reward model comes about, and what its standard error is (`rlhf.utility.errors`).

    - quantile: the `level` quantile of the base policy's rewards of x. The `estimator` is empirical (linear
      interpolation of the sorted rewards, numpy's default) or gaussian (mean + z(level) * std).
    - mean: the mean of the base policy's rewards of x; std / sqrt(m).
    - canned: the mean reward of the canned responses to x; 0, for they are chosen, not drawn.
    - constant: `constant`, whatever x; 0.
    - column: a value that came with the data set; 0.
    """

    kind: str
    level: float
    estimator: str
    constant: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"reference '{self.kind}' is not one of {', '.join(KINDS)}")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator '{self.estimator}' is not one of {', '.join(ESTIMATORS)}")
        if not 0 < self.level < 1:
            raise ValueError(f"the level of a quantile must be within (0, 1), not {self.level}")
        if not np.isfinite(self.constant):
            raise ValueError(f"the constant of a reference must be finite, not {self.constant}")

    @property
    def sampled(self) -> bool:
        """Whether it takes samples of the base policy."""
        return self.kind in SAMPLED
