"""Combinations of several models' utilities into the one that is maximised.

Adding a named one is a function and a line in `kinds.py`. Any other `utility.combine` is an expression over the models
(`expression.py`). `and`, `or`, `product` and expressions take the properties to be independent given the response,
as arXiv 2402.00742 does. `rlhf.utility.kinds.check_utility` says what goes with what; here it is taken for granted.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from rlhf.utility.expression import And, Expression, Model, Not, parse
from rlhf.utility.kinds import (
    COMBINATION_KINDS,
    LOG_PROBABILITY,
    PROBABILITY,
    combination_kind,
    is_expression,
)
from rlhf.utility.transforms import Pair, log_complement

Leaf = tuple[Pair, torch.Tensor | None]
"""A pair, and where it applies, bool [...]; None: everywhere."""


@dataclass(frozen=True)
class Terms:
    """What is combined: the utilities of M models, in one order."""

    kind: str  # of the utilities: "reward", "probability" or "log_probability" (rlhf.utility.kinds)
    utilities: torch.Tensor  # float32 [..., M]
    weights: torch.Tensor  # [M]
    pairs: Sequence[Pair] = ()  # (log p, log(1 - p)) of each, float32 [...], where the combination needs them
    present: torch.Tensor | None = None  # bool [..., M]: which apply; the others are left out. None: all do

    def filled(self, neutral: float) -> torch.Tensor:
        """The utilities, with a value that changes nothing for those that do not apply."""
        if self.present is None:
            return self.utilities
        return torch.where(self.present, self.utilities, neutral)

    def leaves(self) -> list[Leaf]:
        """For each model the pair and where it applies."""
        applies = [None] * len(self.pairs) if self.present is None else self.present.unbind(-1)
        return [_leaf(pair, where) for pair, where in zip(self.pairs, applies, strict=True)]


Combination = Callable[..., torch.Tensor]
"""f(terms, **parameters): the combined utility, float32 [...]."""

COMBINATIONS: dict[str, Combination] = {}


def register(name: str) -> Callable[[Combination], Combination]:
    """Adds a named combination, which must be in the catalogue and new."""
    assert name in COMBINATION_KINDS, f"{name} is not in rlhf.utility.kinds.COMBINATION_KINDS"
    assert name not in COMBINATIONS, f"{name} is registered twice"

    def add(function: Combination) -> Combination:
        COMBINATIONS[name] = function
        return function

    return add


def combine(
    combination: str, models: Sequence[str], terms: Terms, parameters: Mapping[str, float]
) -> torch.Tensor:
    """The combined utility by a named combination or an expression over the models, float32 [...].

    >>> p = torch.tensor([0.5, 0.5])
    >>> pairs = [(p.log()[i], (1 - p).log()[i]) for i in range(2)]
    >>> combine("a & ~b", ["a", "b"], Terms("probability", p, torch.ones(2), pairs), {}).item()
    0.25
    """
    assert terms.utilities.shape[-1:] == terms.weights.shape == (len(models),)
    assert terms.kind in combination_kind(combination).kinds, (combination, terms.kind)
    if is_expression(combination):
        leaves = dict(zip(models, terms.leaves(), strict=True))
        return _utility(_evaluate(parse(combination, models), leaves)[0], terms.kind)
    return COMBINATIONS[combination](terms, **parameters)


def evaluate(expression: Expression, leaves: Mapping[str, Pair]) -> Pair:
    """(log P, log(1 - P)) that an expression of independent properties is true, float32, from its leaves' pairs.

    The relative error of both is below 1e-5, however near 0. That of their slopes is too, or 1e-7 times the
    greatest log among the leaves if that is more.
    """
    return _evaluate(expression, {name: (pair, None) for name, pair in leaves.items()})[0]


def _evaluate(expression: Expression, leaves: Mapping[str, Leaf]) -> Leaf:
    """As if the models that do not apply were not in the expression."""
    if isinstance(expression, Model):
        return leaves[expression.name]
    if isinstance(expression, Not):
        pair, applies = _evaluate(expression.operand, leaves)
        return _not(pair), applies
    join = _and if isinstance(expression, And) else _or
    return _joined(join, _evaluate(expression.left, leaves), _evaluate(expression.right, leaves))


def _joined(join: Callable[[Pair, Pair], Pair], a: Leaf, b: Leaf) -> Leaf:
    (left, in_left), (right, in_right) = a, b
    both = join(left, right)
    if in_left is None and in_right is None:
        return both, None
    in_left = torch.ones_like(both[0], dtype=torch.bool) if in_left is None else in_left
    in_right = torch.ones_like(both[0], dtype=torch.bool) if in_right is None else in_right

    def chosen(joined: torch.Tensor, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
        return torch.where(in_left & in_right, joined, torch.where(in_left, one, other))

    found = (chosen(both[0], left[0], right[0]), chosen(both[1], left[1], right[1]))
    return found, in_left | in_right


def _leaf(pair: Pair, applies: torch.Tensor | None) -> Leaf:
    """Where it does not apply there is any pair: it is not chosen, and its slope must be a number."""
    if applies is None:
        return pair, None
    even = torch.tensor(math.log(0.5))
    return (torch.where(applies, pair[0], even), torch.where(applies, pair[1], even)), applies


def _not(a: Pair) -> Pair:
    return a[1], a[0]


def _and(a: Pair, b: Pair) -> Pair:
    """P = Pa Pb, so log P = log Pa + log Pb, and 1 - P = (1 - Pa) + Pa (1 - Pb), a sum of positive terms.

    That sum has full precision while P is above 1/2, so Pa and Pb are too; below it, log(1 - P) comes from log P.
    """
    log_p = a[0] + b[0]
    return log_p, log_complement(log_p, torch.logaddexp(a[1], a[0] + b[1]))


def _or(a: Pair, b: Pair) -> Pair:
    """The dual of AND (De Morgan): 1 - P = (1 - Pa) (1 - Pb)."""
    return _not(_and(_not(a), _not(b)))


def _utility(pair: Pair, kind: str) -> torch.Tensor:
    """log P for transforms that are log-probabilities, P for those that are probabilities."""
    return pair[0] if kind == LOG_PROBABILITY else pair[0].exp()


@register("weighted_sum")
def weighted_sum(terms: Terms) -> torch.Tensor:
    """sum_i w_i u_i, in the units of the weighted utilities. Slope w_i."""
    return (terms.filled(0.0) * terms.weights.to(terms.utilities)).sum(-1)


@register("and")
def logical_and(terms: Terms) -> torch.Tensor:
    """Good in every property (arXiv 2402.00742): log prod_i p_i = sum_i u_i for u_i = log p_i, else prod_i p_i."""
    return terms.filled(0.0).sum(-1) if terms.kind == LOG_PROBABILITY else product(terms)


@register("or")
def logical_or(terms: Terms) -> torch.Tensor:
    """Good in at least one property: log(1 - prod_i (1 - p_i)), or 1 - prod_i (1 - p_i) for probabilities."""
    return _utility(functools.reduce(partial(_joined, _or), terms.leaves())[0], terms.kind)


@register("product")
def product(terms: Terms) -> torch.Tensor:
    """prod_i p_i, within [0, 1]: the probability of being good in every property. Slope prod_(j != i) p_j."""
    assert terms.kind == PROBABILITY, terms.kind
    return terms.filled(1.0).prod(-1)


@register("min")
def worst_case(terms: Terms) -> torch.Tensor:
    """min_i u_i: the worst property. Slope 1 for the least, 0 for the others; equal ones share it."""
    return terms.filled(math.inf).amin(-1)


@register("softmin")
def softmin(terms: Terms, *, temperature: float) -> torch.Tensor:
    """-T log sum_i exp(-u_i / T), T = temperature in the utilities' units. Slope softmax(-u / T).

    A smooth lower bound of min_i u_i, below it by at most T log M.
    """
    utilities = terms.filled(math.inf)
    least = utilities.detach().amin(-1, keepdim=True)
    excess = (utilities - least) / temperature
    return least.squeeze(-1) - temperature * torch.logsumexp(-excess, -1)


assert COMBINATIONS.keys() == COMBINATION_KINDS.keys(), COMBINATIONS.keys() ^ COMBINATION_KINDS.keys()
