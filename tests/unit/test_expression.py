"""Expressions against Python's own operators, and the catalogue's checks by what they refuse."""

import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rlhf.utility.expression import MAX_DEPTH, MAX_LENGTH, And, Expression, Model, Not, Or, names, parse
from rlhf.utility.kinds import COMBINATION_KINDS, TRANSFORM_KINDS, check_utility, is_expression

ROOT = Path(__file__).resolve().parents[2]
YAMLS = sorted((ROOT / "conf/utility").glob("*.yaml"))
NAMES = ("a", "b", "c", "d", "e")
TWO = {"helpful": 1.0, "harmless": 1.0}


@st.composite
def trees(draw: st.DrawFn, most: int = len(NAMES)) -> Expression:
    """Any tree in which the first few of NAMES occur once each, in any order and grouping."""
    parts: list[Expression] = [Model(name) for name in NAMES[: draw(st.integers(1, most))]]
    parts = draw(st.permutations(parts))
    while True:
        parts = [Not(part) if draw(st.booleans()) else part for part in parts]
        if len(parts) == 1:
            return parts[0]
        at = draw(st.integers(0, len(parts) - 2))
        parts[at : at + 2] = [draw(st.sampled_from([And, Or]))(parts[at], parts[at + 1])]


def truth(tree: Expression, world: dict[str, np.ndarray]) -> np.ndarray:
    if isinstance(tree, Model):
        return world[tree.name]
    if isinstance(tree, Not):
        return np.logical_not(truth(tree.operand, world))
    join = np.logical_and if isinstance(tree, And) else np.logical_or
    return join(truth(tree.left, world), truth(tree.right, world))


def worlds(models: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Every combination of truth values, one an element."""
    table = np.array(list(itertools.product([False, True], repeat=len(models))))
    return dict(zip(models, table.T, strict=True))


@given(trees())
def test_the_canonical_text_parses_back_to_the_tree(tree: Expression) -> None:
    models = sorted(names(tree))
    assert parse(str(tree), models) == tree
    assert str(parse(str(tree), models)) == str(tree)


@given(trees())
def test_the_canonical_text_means_to_python_what_the_tree_means(tree: Expression) -> None:
    world = worlds(tuple(sorted(names(tree))))
    assert np.array_equal(eval(str(tree), {"__builtins__": {}}, world), truth(tree, world))


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("a", "a"),
        ("  ( a )\t", "a"),
        ("~~a", "~~a"),
        ("(a&b)", "a & b"),
        ("a | b & ~c", "a | b & ~c"),
        ("a | (b & (~(c)))", "a | b & ~c"),
        ("(a | b) & c", "(a | b) & c"),
        ("~(a | b) & c", "~(a | b) & c"),
        ("(a & b) & c", "a & b & c"),
        ("a & (b & c)", "a & (b & c)"),
        ("(a\n| b)", "a | b"),
    ],
)
def test_canonical_text(text: str, canonical: str) -> None:
    models = tuple(m for m in NAMES if m in text)
    tree = parse(text, models)
    assert str(tree) == canonical
    world = worlds(models)
    flat = " ".join(text.split())
    assert np.array_equal(truth(tree, world), eval(flat, {"__builtins__": {}}, world)), "Python's precedence"


def test_trees_are_values() -> None:
    tree = parse("a & ~b", ["a", "b"])
    assert tree == And(Model("a"), Not(Model("b")))
    assert len({tree, parse("(a) & (~b)", ["a", "b"])}) == 1
    with pytest.raises(AttributeError):
        tree.left = Model("c")  # type: ignore[union-attr, misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", r"expression is empty"),
        ("  \n ", r"expression is empty"),
        ("a + b", r"has '\+': only names, &, \|, ~ and \(\)"),
        ("a && b", r"is no expression of names"),
        ("a ^ b", r"has '\^'"),
        ("a - b", r"has '-'"),
        ("!a & b", r"has '!'"),
        ("a, b", r"has ','"),
        ("a.b", r"has '\.'"),
        ("a == b", r"has '='"),
        ("a # b", r"has '#'"),
        ("a['b']", r"has '\['"),
        ("a\0b", r"has '\x00'"),
        ("a and b", r"has 'a and b': only names joined by & \(and\)"),
        ("a & (b or c)", r"has 'b or c': only names joined"),
        ("not a", r"has 'not a'"),
        ("a(b)", r"has 'a\(b\)'"),
        ("a is b", r"has 'a is b'"),
        ("a if b else c", r"has 'a if b else c'"),
        ("a & 1", r"has '1'"),
        ("a & True", r"has 'True'"),
        ("a b", r"is no expression of names"),
        ("a &", r"is no expression of names"),
        ("(a & b", r"is no expression of names"),
        ("a ~ b", r"is no expression of names"),
        ("()", r"has '\(\)'"),
        ("a & b & honest", r"names honest, not one of the reward models a, b, c"),
        ("a & b", r"leaves out c: name every one of reward_models"),
        ("a", r"leaves out b, c"),
        ("a & b & c & ~a", r"names a more than once"),
        ("a | a | b | b | c", r"names a, b more than once"),
        ("a & b &" + " " * MAX_LENGTH + "c", rf"'a & b & .*\.\.\.' has {MAX_LENGTH + 8} characters"),
        ("~" * (MAX_DEPTH + 1) + "a", rf"nested deeper than {MAX_DEPTH}"),
        ("~" * (MAX_LENGTH - 1) + "a", rf"nested deeper than {MAX_DEPTH}"),
        ("(" * 400 + "a" + ")" * 400, r"is no expression of names"),
        ("&".join("a" * (MAX_LENGTH // 2)), rf"nested deeper than {MAX_DEPTH}"),
    ],
)
def test_what_is_no_expression_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse(text, ["a", "b", "c"])


@given(st.text(alphabet="ab&|~() \n+.1_", max_size=30))
def test_any_text_is_an_expression_or_a_value_error(text: str) -> None:
    try:
        tree = parse(text, ["a", "b"])
    except ValueError:
        return
    assert parse(str(tree), ["a", "b"]) == tree


def test_the_deepest_expression_that_is_taken() -> None:
    tree = parse("~" * (MAX_DEPTH - 1) + "a", ["a"])
    assert str(tree) == "~" * (MAX_DEPTH - 1) + "a"


def test_a_combination_is_a_name_or_an_expression() -> None:
    assert not any(is_expression(name) for name in COMBINATION_KINDS)
    assert is_expression("helpful")
    assert is_expression("helpful & harmless")


@pytest.mark.parametrize("path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_is_accepted(path: Path) -> None:
    group = OmegaConf.load(path)
    assert set(group) == {"transform", "combine", "parameters", "calibrated"}
    check_utility(group.transform, group.combine, group.parameters, TWO)


def test_every_transform_has_a_yaml_of_its_name() -> None:
    assert TRANSFORM_KINDS.keys() <= {path.stem for path in YAMLS}
    for name in TRANSFORM_KINDS:
        assert OmegaConf.load(ROOT / f"conf/utility/{name}.yaml").transform == name


@pytest.mark.parametrize(
    ("transform", "combine", "parameters", "weights"),
    [
        ("linear", "weighted_sum", {}, {"helpful": 2.0, "harmless": -0.5}),
        ("lsc", "weighted_sum", {}, {"helpful": 0.0, "harmless": 1}),
        ("lsc", "or", {}, TWO),
        ("par", "and", {}, TWO),
        ("quantile_rank", "product", {}, TWO),
        ("linear", "min", {}, TWO),
        ("tanh", "softmin", {"scale": 1, "temperature": 0.5}, TWO),
        ("log_sigmoid", "helpful & ~harmless", {}, TWO),
        ("sigmoid", "~helpful", {}, {"helpful": 1.0}),
    ],
)
def test_what_goes_together_is_accepted(transform, combine, parameters, weights) -> None:
    check_utility(transform, combine, parameters, weights)


@pytest.mark.parametrize(
    ("transform", "combine", "parameters", "weights", "message"),
    [
        ("cube", "and", {}, TWO, r"utility.transform=cube is not one of linear, .*lsc"),
        ("lsc", "mean", {}, TWO, r"utility.combine: 'mean' names mean, not one .*or one of weighted_sum,"),
        ("lsc", "helpful", {}, TWO, r"utility.combine: 'helpful' leaves out harmless"),
        ("lsc", "helpful and harmless", {}, TWO, r"utility.combine: .* has 'helpful and harmless'"),
        ("lsc", "", {}, TWO, r"utility.combine: the expression is empty"),
        (
            "linear",
            "and",
            {},
            TWO,
            r"utility.combine=and needs .*\(lsc, .*\), not linear: .* utility.transform",
        ),
        ("zscore", "or", {}, TWO, r"utility.combine=or needs a transform to probability or log_probability"),
        ("clip", "product", {"low": 0, "high": 1}, TWO, r"utility.combine=product needs .*, not clip"),
        ("lsc", "product", {}, TWO, r"product needs .*\(sigmoid, .*\), not lsc: .* utility.combine=and$"),
        (
            "min_max",
            "helpful | harmless",
            {},
            TWO,
            r"utility.combine=helpful \| harmless needs .* not min_max",
        ),
        (
            "lsc",
            "and",
            {},
            {"helpful": 1.0, "harmless": 0.5},
            r"reward_models.harmless.weight=0.5: .*=and takes",
        ),
        ("lsc", "min", {}, {"helpful": 2.0}, r"reward_models.helpful.weight=2.0: utility.combine=min takes"),
        ("lsc", "softmin", {"temperature": 1}, {"a": 3.0}, r"reward_models.a.weight=3.0: .*=softmin takes"),
        ("lsc", "~a", {}, {"a": 0.0}, r"reward_models.a.weight=0.0: utility.combine=~a takes weights of 1"),
        ("lsc", "and", {}, {"a": float("nan")}, r"reward_models.a.weight=nan must be a finite number"),
        ("linear", "weighted_sum", {}, {"a": float("inf")}, r"reward_models.a.weight=inf must be a finite"),
        ("lsc", "and", {"scale": 1.0}, TWO, r"utility.parameters.scale is unknown to .* which take none"),
        (
            "clip",
            "weighted_sum",
            {"low": 0, "hihg": 1},
            TWO,
            r"utility.parameters.hihg is unknown .* low, high",
        ),
        ("clip", "weighted_sum", {"low": 0}, TWO, r"utility.parameters.high is missing"),
        ("clip", "weighted_sum", {"low": 1, "high": 1}, TWO, r"parameters.low=1 must be below .*high=1"),
        ("clip", "weighted_sum", {"low": -1, "high": float("inf")}, TWO, r"high=inf must be a finite number"),
        ("lsc", "softmin", {}, TWO, r"utility.parameters.temperature is missing"),
        (
            "lsc",
            "softmin",
            {"temperature": 0.0},
            TWO,
            r"utility.parameters.temperature=0.0 must be within \[1e-06",
        ),
        ("tanh", "weighted_sum", {"scale": -1.0}, TWO, r"utility.parameters.scale=-1.0 must be within"),
        ("tanh", "weighted_sum", {"scale": "3"}, TWO, r"utility.parameters.scale=3 must be a finite number"),
        ("tanh", "weighted_sum", {"scale": True}, TWO, r"utility.parameters.scale=True must be a finite"),
        ("inada", "weighted_sum", {"scale": 1, "aversion": 5}, TWO, r"aversion=5 must be within \[0, 4\]"),
    ],
)
def test_what_does_not_go_together_is_refused_by_key(
    transform, combine, parameters, weights, message
) -> None:
    with pytest.raises(ValueError, match=message):
        check_utility(transform, combine, parameters, weights)


def test_parameters_of_transforms_and_combinations_do_not_share_names() -> None:
    for one, other in itertools.product(TRANSFORM_KINDS.values(), COMBINATION_KINDS.values()):
        assert not set(one.parameters) & set(other.parameters)


def test_the_catalogue_needs_no_torch() -> None:
    code = "import sys, rlhf.utility.kinds; assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
