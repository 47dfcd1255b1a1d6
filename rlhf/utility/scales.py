"""What the number of a reward source means: how it becomes P(good), or that it does not. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

BRADLEY_TERRY, LOG_ODDS, PROBABILITY, VERDICT, NUMBER = (
    "bradley_terry",
    "log_odds",
    "probability",
    "verdict",
    "number",
)
SCALES = {
    BRADLEY_TERRY: "known up to a constant of the prompt: P(good) = sigmoid((r - r_ref) / temperature)",
    LOG_ODDS: "P(good) = sigmoid(r)",
    PROBABILITY: "of being good, of which error_rate is wrong: P(good) = error_rate + (1 - 2 error_rate) r",
    VERDICT: "1 or 0, of which error_rate is wrong: as a probability",
    NUMBER: "in a unit of its own: there is no P(good)",
}
REFERENCES = ("quantile", "canned", "mean", "constant", "column")
REFERRED = (BRADLEY_TERRY, NUMBER)  # the scales whose zero is a reference
WRONG = (PROBABILITY, VERDICT)  # the scales that have an error rate
ZERO = {LOG_ODDS: 0.0, PROBABILITY: 0.5, VERDICT: 0.5}  # of the others: where good and bad are equally likely


@dataclass(frozen=True)
class Scale:
    """
    >>> Scale("verdict", error_rate=0.05).has_probability, Scale("number").has_probability
    (True, False)
    """

    kind: str
    error_rate: float = 0.0  # of a verdict or a probability, below 1/2
    temperature: float = 1.0  # of a Bradley-Terry reward: its unit, in nats of preference odds

    def __post_init__(self) -> None:
        assert self.kind in SCALES, self.kind
        assert 0 <= self.error_rate < 0.5
        assert self.temperature > 0

    @property
    def has_probability(self) -> bool:
        return self.kind != NUMBER


BT = Scale(BRADLEY_TERRY)


def check_scale(key: str, source: Any) -> None:
    """Refuses a scale, or what does not go with it, of a `rlhf.sources.source.Source`.

    Raises:
        ValueError: names the key and says what to do.
    """
    scale, reference = source.scale, source.reference
    if scale is None:
        raise ValueError(f"{key}.scale is missing: say what its numbers mean, {_choices()}")
    if scale not in SCALES:
        raise ValueError(f"{key}.scale={scale} is not one of {', '.join(SCALES)}")
    if reference is not None and reference not in REFERENCES:
        raise ValueError(f"{key}.reference={reference} is not one of {', '.join(REFERENCES)}")
    if reference is not None and scale not in REFERRED:
        why = "a quantile of verdicts is no reference: " if scale == VERDICT else ""
        raise ValueError(
            f"{key}.reference={reference}: {why}{key}.scale={scale} says P(good) by itself; set {key}.reference=null"
        )
    if scale == VERDICT and source.error_rate == 0:
        raise ValueError(
            f"{key}.error_rate=0: a verdict that is never wrong has a log-probability of minus infinity; give the "
            "share of its verdicts that are wrong"
        )
    if reference == "canned" and not source.canned:
        raise ValueError(f"{key}.reference=canned needs {key}.canned, a list of responses")
    for text in source.canned:
        if any("\ud800" <= character <= "\udfff" for character in text):
            raise ValueError(f"{key}.canned: {text!r} holds half of a surrogate pair, which is no character")
    if reference == "column" and source.column is None:
        raise ValueError(f"{key}.reference=column needs {key}.column, a column of the prompts' data set")
    if source.temperature is not None and scale != BRADLEY_TERRY:
        raise ValueError(f"{key}.temperature={source.temperature} is for scale=bradley_terry, not {scale}")
    if source.calibration is not None and scale != BRADLEY_TERRY:
        raise ValueError(f"{key}.calibration is for scale=bradley_terry, not {scale}")
    if source.calibration is not None and source.temperature is not None:
        raise ValueError(f"give {key}.calibration or {key}.temperature, not both")


def _choices() -> str:
    return "; ".join(f"{name} ({meaning})" for name, meaning in SCALES.items())
