"""Combinations against 50-digit arithmetic and against counting worlds; their algebra by property."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from random import Random

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from rlhf.utility import combine as module
from rlhf.utility.combine import COMBINATIONS, Terms, combine, evaluate
from rlhf.utility.expression import And, Expression, Model, Not, Or, names
from rlhf.utility.kinds import COMBINATION_KINDS, CombinationKind
from rlhf.utility.transforms import Pair
from tests.unit.test_expression import NAMES, trees

mpmath.mp.dps = 50

Leaf = tuple[mpmath.mpf, mpmath.mpf]  # P and 1 - P, so that neither cancels

logits = st.one_of(st.floats(-8, 8, width=32), st.floats(-100, 100, width=32), st.floats(-1e4, 1e4, width=32))
rows = st.lists(logits, min_size=1, max_size=5)
few_rows = st.lists(logits, min_size=5, max_size=5)


def pair_of(x: torch.Tensor) -> Pair:
    return logsigmoid(x), logsigmoid(-x)


def terms(x: torch.Tensor, kind: str) -> Terms:
    """Of properties with these log-odds, float32 [..., M]."""
    utilities = x.sigmoid() if kind == "probability" else logsigmoid(x)
    return Terms(kind, utilities, torch.ones(x.shape[-1]), [pair_of(column) for column in x.unbind(-1)])


def plain(utilities: torch.Tensor, weights: torch.Tensor | None = None) -> Terms:
    return Terms("reward", utilities, torch.ones(utilities.shape[-1]) if weights is None else weights)


def exact_leaf(x: float) -> Leaf:
    p, q = (1 / (1 + mpmath.exp(-sign * mpmath.mpf(x))) for sign in (1, -1))
    return p, q


def exact(tree: Expression, leaves: dict[str, Leaf]) -> tuple[Leaf, dict[str, mpmath.mpf]]:
    """(P, 1 - P) and dP / dx of each model's log-odds x; sums of positive terms and products only."""
    if isinstance(tree, Model):
        p, q = leaves[tree.name]
        return (p, q), {tree.name: p * q}
    if isinstance(tree, Not):
        (p, q), slopes = exact(tree.operand, leaves)
        return (q, p), {name: -slope for name, slope in slopes.items()}
    ((pa, qa), left), ((pb, qb), right) = (exact(side, leaves) for side in (tree.left, tree.right))
    if isinstance(tree, And):
        value, factors = (pa * pb, qa + pa * qb), (pb, pa)
    else:
        value, factors = (pa + qa * pb, qa * qb), (qb, qa)
    slopes = [
        {name: slope * factor for name, slope in side.items()}
        for side, factor in zip((left, right), factors, strict=True)
    ]
    return value, slopes[0] | slopes[1]


def log(p: mpmath.mpf, q: mpmath.mpf) -> float:
    return float(mpmath.log(p) if p < q else mpmath.log1p(-q))


def slope_error(x: torch.Tensor) -> float:
    """Relative: a slope is a ratio of probabilities, and its log has the rounding errors of their logs."""
    return 1e-4 + 4 * 2**-23 * x.detach().abs().max().item()


@given(trees(), few_rows)
def test_expressions_and_their_slopes_are_exact(tree: Expression, row: list[float]) -> None:
    models = sorted(names(tree))
    x = torch.tensor(row[: len(models)], requires_grad=True)
    leaves = {name: pair_of(x[i]) for i, name in enumerate(models)}
    (p, q), slopes = exact(tree, {name: exact_leaf(x[i].item()) for i, name in enumerate(models)})
    for value, of, sign in zip(evaluate(tree, leaves), ((p, q), (q, p)), (1, -1), strict=True):
        assert value.item() == pytest.approx(log(*of), rel=2e-5, abs=1e-37)
        (slope,) = torch.autograd.grad(value, x, retain_graph=True)
        expected = [float(sign * slopes[name] / of[0]) for name in models]
        assert slope.tolist() == pytest.approx(expected, rel=slope_error(x), abs=1e-37)


def true_in(tree: Expression, world: dict[str, bool]) -> bool:
    if isinstance(tree, Model):
        return world[tree.name]
    if isinstance(tree, Not):
        return not true_in(tree.operand, world)
    return (all if isinstance(tree, And) else any)(true_in(side, world) for side in (tree.left, tree.right))


@given(trees(), st.lists(st.floats(0.01, 0.99), min_size=5, max_size=5))
def test_an_expression_is_the_probability_of_the_worlds_where_it_is_true(
    tree: Expression, probabilities: list[float]
) -> None:
    models = sorted(names(tree))
    share = 0.0
    for world in itertools.product([False, True], repeat=len(models)):
        if true_in(tree, dict(zip(models, world, strict=True))):
            share += math.prod(p if true else 1 - p for p, true in zip(probabilities, world, strict=False))
    p = torch.tensor(probabilities[: len(models)], dtype=torch.float64)
    x = (p / (1 - p)).log().float()
    for kind, expected in (("probability", share), ("log_probability", math.log(share))):
        combined = combine(str(tree), models, terms(x, kind), {}).item()
        assert combined == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("kind", ["probability", "log_probability"])
@given(row=rows)
def test_and_or_product_and_their_slopes_are_exact(kind: str, row: list[float]) -> None:
    x = torch.tensor(row, requires_grad=True)
    leaves = {NAMES[i]: exact_leaf(value) for i, value in enumerate(x.tolist())}
    models = list(leaves)
    for name, join in (("and", And), ("or", Or), ("product", And)):
        if kind not in COMBINATION_KINDS[name].kinds:
            continue
        tree: Expression = Model(models[0])
        for model in models[1:]:
            tree = join(tree, Model(model))
        (p, q), slopes = exact(tree, leaves)
        value = combine(name, models, terms(x, kind), {})
        (slope,) = torch.autograd.grad(value, x)
        unit = 1 if kind == "probability" else p
        assert value.item() == pytest.approx(
            float(p) if kind == "probability" else log(p, q), rel=2e-5, abs=1e-37
        )
        # The slope of sigmoid has the error of a unit in the last place of 1.
        error = 2e-7 if kind == "probability" and name != "or" else 1e-37
        expected = [float(slopes[model] / unit) for model in models]
        assert slope.tolist() == pytest.approx(expected, rel=slope_error(x), abs=error)


def test_extreme_log_odds() -> None:
    x = torch.tensor([[-1e4, 1e4], [1e4, 1e4], [-1e4, -1e4]])
    either = -1e4 + math.log(2)  # log(2 exp(-1e4))
    for text, expected in {
        "and": [-1e4, 0.0, -2e4],
        "a & b": [-1e4, 0.0, -2e4],
        "or": [0.0, 0.0, either],
        "~(a & b)": [0.0, either, 0.0],
        "~a & ~b": [-1e4, -2e4, 0.0],
    }.items():
        log_p, p = (combine(text, ["a", "b"], terms(x, k), {}) for k in ("log_probability", "probability"))
        assert log_p.tolist() == pytest.approx(expected, rel=1e-7)
        assert p.tolist() == [float(value == 0) for value in expected]


@given(rows)
def test_and_is_at_most_the_least_and_or_at_least_the_greatest(row: list[float]) -> None:
    for kind in ("probability", "log_probability"):
        of = terms(torch.tensor(row), kind)
        models = NAMES[: len(row)]
        # One model's utility and its log-probability may differ in the last places, where P is exp(log P).
        slack = 3e-6 * of.utilities.abs()
        assert combine("and", models, of, {}) <= of.utilities.min()
        assert combine("or", models, of, {}) >= (of.utilities - slack).max()


@given(trees(), few_rows)
def test_double_negation_and_de_morgan_hold_to_the_bit(tree: Expression, row: list[float]) -> None:
    leaves = {name: pair_of(torch.tensor(row[i])) for i, name in enumerate(NAMES)}
    value = evaluate(tree, leaves)
    assert value == evaluate(Not(Not(tree)), leaves)
    assert value == evaluate(pushed_down(Not(tree)), leaves)[::-1]


def pushed_down(tree: Expression) -> Expression:
    """The same by De Morgan's laws, NOT applied to models only."""
    if isinstance(tree, Model):
        return tree
    if isinstance(tree, And | Or):
        return type(tree)(pushed_down(tree.left), pushed_down(tree.right))
    inner = tree.operand
    if isinstance(inner, Model):
        return tree
    if isinstance(inner, Not):
        return pushed_down(inner.operand)
    dual = Or if isinstance(inner, And) else And
    return dual(pushed_down(Not(inner.left)), pushed_down(Not(inner.right)))


@pytest.mark.parametrize("join", [And, Or])
@given(row=few_rows, random=st.randoms())
def test_order_and_grouping_do_not_matter(join: type, row: list[float], random: Random) -> None:
    leaves = {name: pair_of(torch.tensor(row[i])) for i, name in enumerate(NAMES)}

    def grouped(parts: Sequence[str]) -> Expression:
        if len(parts) == 1:
            return Model(parts[0])
        at = random.randint(1, len(parts) - 1)
        return join(grouped(parts[:at]), grouped(parts[at:]))

    one, other = (
        [value.item() for value in evaluate(grouped(random.sample(NAMES, 5)), leaves)] for _ in range(2)
    )
    assert one == pytest.approx(other, rel=2e-5, abs=1e-37)


@given(trees(), few_rows, st.integers(0, 4), st.floats(0.01, 100))
def test_a_better_property_never_hurts_unless_it_is_negated(
    tree: Expression, row: list[float], which: int, more: float
) -> None:
    models = sorted(names(tree))
    which %= len(models)
    better = list(row)
    better[which] += more
    before, after = (
        combine(str(tree), models, terms(torch.tensor(x[: len(models)]), "log_probability"), {}).item()
        for x in (row, better)
    )
    rise = after - before if positive(tree, models[which]) else before - after
    assert rise >= -2e-5 * abs(before) - 1e-37


def positive(tree: Expression, name: str) -> bool:
    """Whether a model is under an even number of NOTs."""
    if isinstance(tree, Not):
        return not positive(tree.operand, name)
    if isinstance(tree, Model):
        return True
    return positive(tree.left if name in names(tree.left) else tree.right, name)


@given(rows, st.floats(0.01, 100))
def test_softmin_and_its_slopes_are_exact_and_it_bounds_the_minimum(
    row: list[float], temperature: float
) -> None:
    u = torch.tensor(row, requires_grad=True)
    value = COMBINATIONS["softmin"](plain(u), temperature=temperature)
    (slope,) = torch.autograd.grad(value, u)
    shares = [mpmath.exp(-mpmath.mpf(x) / temperature) for x in u.tolist()]
    total = mpmath.fsum(shares)
    scale = max(temperature, u.detach().abs().max().item())
    assert value.item() == pytest.approx(float(-temperature * mpmath.log(total)), rel=1e-6, abs=1e-6 * scale)
    # (u - min) / T is rounded before its exponential is taken.
    expected = [float(share / total) for share in shares]
    assert slope.tolist() == pytest.approx(expected, rel=1e-4, abs=1e-30)
    least = u.detach().min().item()
    assert value.item() <= least
    assert value.item() >= least - temperature * math.log(len(row)) - 1e-6 * scale


def test_softmin_of_a_low_temperature_is_the_minimum_and_finite() -> None:
    u = torch.tensor([[-1e4, 1e4, 0.0], [3.0, 1.0, 2.0]], requires_grad=True)
    value = COMBINATIONS["softmin"](plain(u), temperature=1e-6)
    assert value.tolist() == [-1e4, 1.0]
    (slope,) = torch.autograd.grad(value.sum(), u)
    assert slope.tolist() == [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]


def test_min_and_its_slope() -> None:
    u = torch.tensor([[3.0, -1.0, 2.0], [0.5, 4.0, 0.5]], requires_grad=True)
    value = combine("min", ["a", "b", "c"], plain(u), {})
    assert value.tolist() == [-1.0, 0.5]
    (slope,) = torch.autograd.grad(value.sum(), u)
    assert slope.tolist() == [[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]


@given(
    st.lists(st.lists(st.floats(-100, 100, width=32), min_size=3, max_size=3), min_size=1, max_size=5),
    st.lists(st.floats(-4, 4, width=32), min_size=3, max_size=3),
)
def test_weighted_sum_is_the_direct_sum(table: list[list[float]], weights: list[float]) -> None:
    combined = COMBINATIONS["weighted_sum"](plain(torch.tensor(table), torch.tensor(weights)))
    assert combined.dtype == torch.float32
    for value, row in zip(combined.tolist(), table, strict=True):
        direct = math.fsum(u * w for u, w in zip(row, weights, strict=True))
        assert value == pytest.approx(direct, abs=1e-3)


def test_whole_number_weights_and_leading_dimensions() -> None:
    utilities = torch.arange(24.0).reshape(2, 3, 4)
    combined = COMBINATIONS["weighted_sum"](plain(utilities, torch.tensor([1, 0, 0, 2])))
    assert torch.equal(combined, utilities[..., 0] + 2 * utilities[..., 3])
    assert combined.shape == (2, 3)


def test_what_the_check_of_the_configuration_rules_out_is_asserted() -> None:
    with pytest.raises(AssertionError):
        combine("weighted_sum", ["a", "b"], Terms("reward", torch.zeros(5, 2), torch.ones(1)), {})
    for combination in ("and", "or", "product", "a & b"):
        with pytest.raises(AssertionError, match="reward"):
            combine(combination, ["a", "b"], plain(torch.zeros(5, 2)), {})


def test_the_registry_is_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    assert COMBINATIONS.keys() == COMBINATION_KINDS.keys()
    with pytest.raises(AssertionError, match="xor is not in"):
        module.register("xor")
    with pytest.raises(AssertionError, match="registered twice"):
        module.register("and")
    monkeypatch.setitem(COMBINATION_KINDS, "xor", CombinationKind(("probability",)))
    source = Path(module.__file__)
    with pytest.raises(AssertionError, match="xor"):
        exec(compile(source.read_text(), source, "exec"), {"__name__": module.__name__})
