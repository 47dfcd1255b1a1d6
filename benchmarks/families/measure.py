"""One row of the table: what a family gives here, held to plain `transformers`."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import PurePath
from typing import Any

from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES

from benchmarks.families import ours, plain
from benchmarks.families.configurations import REASONS, chooses, make
from benchmarks.families.ours import Distance

FLOAT32 = 1e-4
"""Nats that a log-probability or a reward may be away from the plain float32 pass."""
BFLOAT16 = 1.5
"""How many times further from it than the model's own bfloat16 pass, by root mean square and by maximum."""
ROUNDS = 4
"""Sets of prompts, counted together, before a distance is over its limit.

Where a model chooses experts or tokens by their scores, two that are equal to rounding are chosen either way, and all
that follows in the sequence is another: a tie. Sets in which that happened are left out, up to half of them.
"""
DTYPES = ("float32", "bfloat16")


@dataclass
class Row:
    """A family's cells, by format; or why there are none."""

    name: str
    outcome: str = "equal"  # or "refused: ...", "not a causal text model: ...", "FAILS: ..."
    sampler: dict[str, str] = field(default_factory=dict)
    learner: dict[str, str] = field(default_factory=dict)
    policy: dict[str, float] = field(default_factory=dict)  # float32: nats; bfloat16: over the model's own
    reward: dict[str, float] = field(default_factory=dict)
    reward_path: str = ""
    ties: int = 0

    @property
    def fails(self) -> bool:
        return self.outcome.startswith("FAILS")


def row(name: str, dtypes: Sequence[str] = DTYPES) -> Row:
    """Measures a row; whatever goes wrong is told in its outcome, as one line."""
    found = Row(name)
    family = name.partition(": ")[0]
    if family in REASONS:
        found.outcome = f"not a causal text model: {REASONS[family]}"
        return found
    try:
        config = make(name)
        model = plain.build(config)
        own = plain.unfit(model, ours.prompts())
    except Exception as error:
        found.outcome = f"not a causal text model: plain transformers raises {_words(error)}"
        return found
    parts = [(dtype, partial(_policy, found, model, dtype)) for dtype in dtypes]
    if config.model_type in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES:
        parts += [(dtype, partial(_reward, found, config, dtype)) for dtype in dtypes]
    refused: dict[str, list[str]] = {}  # by reason, the formats
    faults: list[str] = []
    for dtype, part in parts:
        try:
            faults += part()
        except Exception as error:  # a row tells what was raised, and the table goes on
            if _refuses(error, type(model).__name__):
                refused.setdefault(str(error), []).append(dtype)
            else:
                faults.append(f"{dtype}: {_words(error)}")
    told = [_refusal(reason, formats, dtypes) for reason, formats in refused.items()]
    if faults:
        found.outcome = f"FAILS: {'; '.join([*faults, *told])}"
    elif told:
        found.outcome = "; ".join(told)
    elif found.ties:
        found.outcome = f"equal but for ties in {found.ties} sets of prompts"
    if own is not None and found.outcome != "equal":
        found.outcome += f" (plain transformers: {own})"
    return found


def _refuses(error: Exception, model: str) -> bool:
    """Whether the error is meant: a ValueError that names the policy, the reward model or the model's class."""
    named = ("policy", "reward model", model)
    return isinstance(error, ValueError) and any(name in str(error) for name in named)


def _refusal(reason: str, formats: Sequence[str], dtypes: Sequence[str]) -> str:
    return f"refused: {reason}" if set(formats) == set(dtypes) else f"refused in {formats[0]}: {reason}"


def _words(error: Exception) -> str:
    """An error as one line, with the place that raised it."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    text = " ".join(str(error).split())[:300]
    return f"{type(error).__name__}: {text} ({PurePath(where.filename).name}, {where.name})"


def _policy(found: Row, model: PreTrainedModel, dtype: str) -> Iterator[str]:
    """Fills the row's cells of a policy in a format; what is over the limits."""
    policy = ours.Policy(model, dtype)
    sampled, learnt, own = _measure(found, policy.measure, chooses(model.config))
    found.sampler[dtype], found.learner[dtype] = policy.sampler, policy.learner
    found.policy[dtype] = max(_cell(sampled, own), _cell(learnt, own))
    yield from _fault(f"sampler in {dtype} ({policy.sampler})", sampled, own)
    yield from _fault(f"learner in {dtype} ({policy.learner})", learnt, own)


def _reward(found: Row, config: Any, dtype: str) -> Iterator[str]:
    """The same of a reward model."""
    reward = ours.Reward(config, dtype)
    scored, own = _measure(found, reward.measure, chooses(config))
    found.reward_path, found.reward[dtype] = reward.path, _cell(scored, own)
    yield from _fault(f"reward in {dtype} ({reward.path})", scored, own)


def _measure(found: Row, measure: Callable[[int], tuple[Distance, ...]], ties: bool) -> tuple[Distance, ...]:
    """Distances over as many sets of prompts as it takes; the last is the model's own."""
    sets = []
    while len(sets) < ROUNDS:
        sets.append(measure(len(sets)))
        if _within(_together(sets)):
            return _together(sets)
    apart = [one for one in sets if not _within(one)]
    if not ties or 2 * len(apart) > len(sets):
        return _together(sets)
    found.ties += len(apart)
    return _together([one for one in sets if _within(one)])


def _together(sets: Sequence[tuple[Distance, ...]]) -> tuple[Distance, ...]:
    return tuple(sum(column[1:], column[0]) for column in zip(*sets, strict=True))


def _within(distances: tuple[Distance, ...]) -> bool:
    return all(over(one, distances[-1]) <= 1 for one in distances)


def over(found: Distance, own: Distance) -> float:
    """A distance over its limit; `own` is 0 in float32."""
    if not own.largest:
        return found.largest / FLOAT32
    return max(found.largest / own.largest, found.mean / own.mean) / BFLOAT16


def _cell(found: Distance, own: Distance) -> float:
    return found.largest if not own.largest else max(found.largest / own.largest, found.mean / own.mean)


def _fault(what: str, found: Distance, own: Distance) -> Iterator[str]:
    if over(found, own) > 1:
        beside = f", the model's own pass {own.largest:.2g}" if own.largest else ""
        yield f"{what} is {found.largest:.2g} away{beside}"
