"""What transforms and combinations there are, what they take and what they mean. Imports no torch.

The configuration is checked against this catalogue, and so are the registries of `rlhf.utility.transforms` and
`rlhf.utility.combine`: a name is in both or in neither.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf.utility.expression import parse
from rlhf.utility.scales import NUMBER

REWARD = "reward"  # any number, in units of its own
PROBABILITY = "probability"  # within [0, 1]
LOG_PROBABILITY = "log_probability"  # 0 or less, in nats


@dataclass(frozen=True)
class TransformKind:
    """What a transform's values are, and what it takes."""

    kind: str
    parameters: tuple[str, ...] = ()
    needs_samples: bool = False  # the base policy's rewards of the prompt, each of them
    needs_base: bool = (
        False  # the base policy's rewards of the prompt in some form: their samples, moments or range
    )
    of_log_odds: bool = False  # of (r - r_ref) in nats of preference odds, else of the number as it is

    @property
    def claims_probability(self) -> bool:
        """Whether it takes the rewards for log-odds, which a number in a unit of its own is not."""
        return self.of_log_odds and self.kind != REWARD


@dataclass(frozen=True)
class CombinationKind:
    """Which kinds of utilities a combination takes, and what besides."""

    kinds: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    weighted: bool = False  # else every weight must be 1
    needs_pairs: bool = False  # log P and log(1 - P) of each model, besides the utilities


TRANSFORM_KINDS: dict[str, TransformKind] = {
    "linear": TransformKind(REWARD),
    "centered_linear": TransformKind(REWARD, of_log_odds=True),
    "lsc": TransformKind(LOG_PROBABILITY, of_log_odds=True),
    "log_sigmoid": TransformKind(LOG_PROBABILITY, of_log_odds=True),
    "sigmoid": TransformKind(PROBABILITY, of_log_odds=True),
    "par": TransformKind(PROBABILITY, needs_samples=True, of_log_odds=True, needs_base=True),
    "quantile_rank": TransformKind(PROBABILITY, needs_samples=True, needs_base=True),
    "zscore": TransformKind(REWARD, needs_base=True),
    "zscore_global": TransformKind(REWARD, needs_base=True),
    "min_max": TransformKind(REWARD, needs_base=True),
    "clip": TransformKind(REWARD, ("low", "high"), of_log_odds=True),
    "tanh": TransformKind(REWARD, ("scale",), of_log_odds=True),
    "inada": TransformKind(REWARD, ("scale", "aversion"), of_log_odds=True),
}

_ANY = (REWARD, PROBABILITY, LOG_PROBABILITY)
_OF_PROPERTIES = (PROBABILITY, LOG_PROBABILITY)

COMBINATION_KINDS: dict[str, CombinationKind] = {
    "weighted_sum": CombinationKind(_ANY, weighted=True),
    "min": CombinationKind(_ANY),
    "softmin": CombinationKind(_ANY, ("temperature",)),
    "product": CombinationKind((PROBABILITY,)),
    "and": CombinationKind(_OF_PROPERTIES),
    "or": CombinationKind(_OF_PROPERTIES, needs_pairs=True),
}
EXPRESSION = CombinationKind(_OF_PROPERTIES, needs_pairs=True)

_WITHIN = {"scale": (1e-6, 1e6), "temperature": (1e-6, 1e6), "aversion": (0.0, 4.0)}
"""Inclusive bounds of parameters, where float32 has room for what is made of them."""


def is_expression(combine: str) -> bool:
    """Whether utility.combine is an expression over the models, rather than the name of a combination.

    >>> is_expression("and"), is_expression("helpful & harmless")
    (False, True)
    """
    return combine not in COMBINATION_KINDS


def combination_kind(combine: str) -> CombinationKind:
    """Of a named combination or an expression."""
    return COMBINATION_KINDS.get(combine, EXPRESSION)


def check_utility(
    transform: str,
    combine: str,
    parameters: Mapping[str, float],
    weights: Mapping[str, float],
    scales: Mapping[str, str] | None = None,
) -> None:
    """Refuses a transformation and combination of reward models that cannot be, or that would mislead.

    Args:
        parameters: of the transform and the combination together, by name.
        weights: of the reward models, by name.
        scales: of the reward models, by name (`rlhf.utility.scales`); those that are not named: bradley_terry.

    Raises:
        ValueError: it names the key (utility.transform, utility.combine, utility.parameters.NAME or
            reward_models.NAME.weight) and says what to do.
    """
    if transform not in TRANSFORM_KINDS:
        raise ValueError(f"utility.transform={transform} is not one of {', '.join(TRANSFORM_KINDS)}")
    _check_combine(transform, combine, weights)
    _check_weights(combine, weights)
    _check_parameters(transform, combine, parameters)
    for name, scale in (scales or {}).items():
        if scale == NUMBER and TRANSFORM_KINDS[transform].claims_probability:
            others = ", ".join(n for n, kind in TRANSFORM_KINDS.items() if not kind.claims_probability)
            raise ValueError(
                f"reward_models.{name}.scale={scale} has no P(good), which utility.transform={transform} takes: say "
                f"what its numbers mean by another scale, or choose a utility.transform without ({others})"
            )


def _check_combine(transform: str, combine: str, weights: Mapping[str, float]) -> None:
    if is_expression(combine):
        try:
            parse(combine, tuple(weights))
        except ValueError as error:
            raise ValueError(
                f"utility.combine: {error} (an expression over the reward models is taken, or one of "
                f"{', '.join(COMBINATION_KINDS)})"
            ) from error
    accepted = combination_kind(combine).kinds
    if TRANSFORM_KINDS[transform].kind not in accepted:
        suitable = ", ".join(name for name, kind in TRANSFORM_KINDS.items() if kind.kind in accepted)
        instead = "and" if combine == "product" and transform in ("lsc", "log_sigmoid") else "weighted_sum"
        raise ValueError(
            f"utility.combine={combine} needs a transform to {' or '.join(accepted)} ({suitable}), not "
            f"{transform}: choose such a utility.transform, or utility.combine={instead}"
        )


def _check_weights(combine: str, weights: Mapping[str, float]) -> None:
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"reward_models.{name}.weight={weight} must be a finite number")
        if weight != 1 and not combination_kind(combine).weighted:
            raise ValueError(
                f"reward_models.{name}.weight={weight}: utility.combine={combine} takes weights of 1; "
                "use utility.combine=weighted_sum"
            )


def _check_parameters(transform: str, combine: str, parameters: Mapping[str, float]) -> None:
    takes = TRANSFORM_KINDS[transform].parameters + combination_kind(combine).parameters
    for name in parameters:
        if name not in takes:
            raise ValueError(
                f"utility.parameters.{name} is unknown to utility.transform={transform} and "
                f"utility.combine={combine}, which take {', '.join(takes) or 'none'}: remove it"
            )
    for name in takes:
        if name not in parameters:
            raise ValueError(
                f"utility.parameters.{name} is missing: utility.transform={transform} and "
                f"utility.combine={combine} take {', '.join(takes)}"
            )
        _check_value(name, parameters[name])
    if "low" in takes and not parameters["low"] < parameters["high"]:
        raise ValueError(
            f"utility.parameters.low={parameters['low']} must be below "
            f"utility.parameters.high={parameters['high']}"
        )


def _check_value(name: str, value: float) -> None:
    key = f"utility.parameters.{name}={value}"
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{key} must be a finite number")
    low, high = _WITHIN.get(name, (-math.inf, math.inf))
    if not low <= value <= high:
        raise ValueError(f"{key} must be within [{low:g}, {high:g}]")
