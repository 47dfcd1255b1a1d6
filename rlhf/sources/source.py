"""What a reward source is: settings that a person types, and what gives rewards by them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np

from rlhf.config_numbers import ANY, POSITIVE, Range
from rlhf.types import Content, Response
from rlhf.utility.rules import ReferenceRule
from rlhf.utility.scales import ZERO, Scale, check_scale

if TYPE_CHECKING:
    from rlhf.types import Prompt

Rows = Sequence[Sequence[float | None]] | np.ndarray
"""[H][B]: for each reward of a source the rewards of B responses. None: the reward does not apply to that prompt."""


@dataclass(frozen=True)
class Batch:
    """B responses that are to be rewarded. Responses to one prompt are neighbours."""

    prompts: Sequence[Content]  # [B]
    responses: Sequence[Response]  # [B]; several turns only where pairs of a data set are scored
    tokens: Sequence[np.ndarray] | None = (
        None  # [B], int32: the policy's, with the one that ended the response
    )
    finished: np.ndarray | None = None  # bool [B]: ended by the end-of-sequence token, else cut
    columns: Mapping[str, Sequence[Any]] = field(default_factory=dict)  # of the prompts' data set, [B] each

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, rows: Sequence[int]) -> Batch:
        """These responses alone."""
        return Batch(
            [self.prompts[i] for i in rows],
            [self.responses[i] for i in rows],
            None if self.tokens is None else [self.tokens[i] for i in rows],
            None if self.finished is None else self.finished[list(rows)],
            {name: [values[i] for i in rows] for name, values in self.columns.items()},
        )


@dataclass(frozen=True)
class Place:
    """Where a source is opened, and what it is given there."""

    path: str | None = None  # of a model that was trained here
    device: str = "cpu"
    dtype: str = "float32"
    budget: int = 8192  # tokens that go through a model at once


class RewardSource(Protocol):
    """What gives rewards: one for each of its names."""

    notes: list[str]  # what to tell of how it is called
    alone: bool  # whether one call at a time is made; else several, from threads

    def score(self, batch: Batch) -> Rows:
        """
        Raises:
            ValueError: there is a response without a reward; it names the source, the prompt and the response, and
                says what to do.
        """


COMMON_RANGES = {
    "error_rate": Range(0, 0.499),
    "weight": ANY,
    "constant": ANY,
    "temperature": POSITIVE,
}


@dataclass(kw_only=True)
class Source:
    """The settings that every source has; a kind adds its own, and how it is opened.

    Values come from conf/source/KIND.yaml. `key` in the methods is where they are in the configuration
    ("reward_models.helpful").
    """

    kind: str
    scale: str | None  # what its numbers mean: a name in rlhf.utility.scales
    error_rate: float  # of a verdict or a probability: how often it is wrong
    weight: float  # of its utility in the combination
    reference: str | None  # r_ref: quantile | canned | mean | constant | column; null: as the scale asks
    canned: list[str]  # responses whose mean reward is r_ref, for reference=canned
    constant: float  # r_ref, for reference=constant
    column: str | None  # of the prompts' data set, which holds r_ref, for reference=column
    calibration: (
        Any  # pairs, as data.prompts, on which the scale of a bradley_terry reward is fitted; null: none
    )
    temperature: float | None  # of a bradley_terry reward, known beforehand; null: the fitted one, or 1

    ranges: ClassVar[Mapping[str, Range]] = COMMON_RANGES  # of all numbers: a kind adds its own
    data_keys: ClassVar[tuple[str, ...]] = ("calibration",)  # of its keys, those that name data sets
    reads_columns: ClassVar[bool] = False  # whether it is given the columns of the prompts' data set
    uses_device: ClassVar[bool] = (
        False  # whether it is a model, which computes on the GPUs of `resources.reward`
    )

    def names(self, name: str) -> dict[str, Source]:
        """The rewards that the source called `name` gives, in order, each with its settings."""
        return {name: self}

    def trains(self) -> bool:
        """Whether it is a model that is trained here."""
        return False

    def check(self, key: str) -> None:
        """What can be refused by the settings alone; a kind extends it.

        Raises:
            ValueError: names the key and says what to do.
        """
        check_scale(key, self)

    @property
    def place(self) -> str:
        """Where it is, as lines call it."""
        return str(self.own.get("path") or self.own.get("url"))

    @property
    def own(self) -> dict[str, Any]:
        """The keys of its kind alone, and the scale."""
        common = {f.name for f in fields(Source)} - {"scale"}
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in common}

    def identity(self) -> Any:
        """All that its numbers depend on, as JSON can hold it: a name is made of it under which they are kept."""
        return self.own

    def preflight(self, key: str, prompts: Sequence[Prompt]) -> None:
        """What can be refused before Ray starts, with all prompts at hand.

        Raises:
            ValueError: names the key, and the prompt's row.
        """

    def check_texts(self, key: str, pairs: bool) -> None:
        """What can be refused of one that is to reward given texts, not rollouts: canned responses, those that a client
        of `rlhf serve` brings, or `pairs` to calibrate on.

        Raises:
            ValueError: names the key.
        """

    def open(self, name: str, place: Place) -> RewardSource:
        """
        Raises:
            ValueError: it cannot be used; it names the source and says why.
        """
        raise NotImplementedError

    @property
    def unit(self) -> Scale:
        """What its numbers mean, before any calibration."""
        assert self.scale is not None
        return Scale(self.scale, self.error_rate, 1.0 if self.temperature is None else self.temperature)

    def rule(self, level: float, estimator: str) -> ReferenceRule:
        """How its reference comes about; of a scale with a zero of its own that is a constant."""
        assert self.scale is not None
        if self.scale in ZERO:
            return ReferenceRule("constant", level, estimator, ZERO[self.scale])
        return ReferenceRule(self.reference or "quantile", level, estimator, self.constant)


def rewards_of(sources: Mapping[str, Source]) -> dict[str, Source]:
    """The rewards that these sources give, in order, each with its settings."""
    return {reward: own for name, source in sources.items() for reward, own in source.names(name).items()}


def as_columns(rows: Rows) -> np.ndarray:
    """Rewards as float32 [B, H], NaN where they do not apply."""
    if isinstance(rows, np.ndarray):
        return rows.T.astype(np.float32)
    return np.array([[np.nan if r is None else r for r in row] for row in rows], np.float32).T
