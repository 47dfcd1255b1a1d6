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
"""Sets of prompts, all counted together, before a bfloat16 distance is over the limit: where rounding changes the
choice of an expert, few tokens make up the distance."""
TIES = 1e-3
"""Share of tokens that may be further away in float32 where a model chooses experts or tokens by their scores: two that
are equal to rounding are chosen either way, in whole passes and in steps."""
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
        found.outcome = f"equal but for ties ({found.ties})"
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
    *both, own = _measure(policy.measure)
    if dtype == "float32":
        both = [_untied(found, one, model.config) for one in both]
    sampled, learnt = both
    found.sampler[dtype], found.learner[dtype] = policy.sampler, policy.learner
    found.policy[dtype] = max(_cell(sampled, own), _cell(learnt, own))
    yield from _fault(f"sampler in {dtype} ({policy.sampler})", sampled, own)
    yield from _fault(f"learner in {dtype} ({policy.learner})", learnt, own)


def _reward(found: Row, config: Any, dtype: str) -> Iterator[str]:
    """The same of a reward model."""
    reward = ours.Reward(config, dtype)
    scored, own = _measure(reward.measure, 4 * ROUNDS)  # a set has few rewards
    found.reward_path, found.reward[dtype] = reward.path, _cell(scored, own)
    yield from _fault(f"reward in {dtype} ({reward.path})", scored, own)


def _measure(measure: Callable[[int], tuple[Distance, ...]], rounds: int = ROUNDS) -> tuple[Distance, ...]:
    """Distances over as many sets of prompts as it takes; the last is the model's own."""
    found = measure(0)
    for seed in range(1, rounds):
        if all(over(one, found[-1]) <= 1 for one in found):
            break
        found = tuple(a + b for a, b in zip(found, measure(seed), strict=True))
    return found


def _untied(found: Row, one: Distance, config: Any) -> Distance:
    """The distance without ties, which are counted in the row."""
    far = one.apart > FLOAT32
    if chooses(config) and far.sum() <= TIES * len(far):
        found.ties += int(far.sum())
        return Distance(one.apart[~far])
    return one


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
