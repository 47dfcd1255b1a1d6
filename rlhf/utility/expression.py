"""Logical expressions over reward models: "helpful & ~(verbose | sycophantic)". Pure Python, no torch.

`&` is AND, `|` is OR, `~` is NOT, with Python's precedence (~ before & before |) and parentheses. Every model
occurs exactly once. The value of an expression takes the properties to be independent given the response; a model
that occurred twice would be taken as two independent ones ("a | a" would be likelier than a), so that is refused.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

MAX_LENGTH = 1000  # characters
MAX_DEPTH = 50  # of the tree, so that walking it is no matter of Python's recursion limit

_CHARACTERS = re.compile(r"[\w\s&|~()]*")


@dataclass(frozen=True)
class Model:
    """The response is good by this reward model."""

    name: str

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Not:
    operand: Expression

    def __str__(self) -> str:
        return f"~{_within(self.operand, _BINDING[Not])}"


@dataclass(frozen=True)
class And:
    left: Expression
    right: Expression

    def __str__(self) -> str:
        return f"{_within(self.left, _BINDING[And])} & {_within(self.right, _BINDING[And] + 1)}"


@dataclass(frozen=True)
class Or:
    left: Expression
    right: Expression

    def __str__(self) -> str:
        return f"{_within(self.left, _BINDING[Or])} | {_within(self.right, _BINDING[Or] + 1)}"


Expression = Model | Not | And | Or
"""An immutable tree. Its `str` is the canonical text: equal trees have equal texts, and it parses back to the tree."""

_BINDING: dict[type, int] = {Or: 1, And: 2, Not: 3, Model: 4}
_OPERATORS: dict[type, type[And] | type[Or]] = {ast.BitAnd: And, ast.BitOr: Or}


def _within(operand: Expression, binding: int) -> str:
    return str(operand) if _BINDING[type(operand)] >= binding else f"({operand})"


def parse(text: str, models: Sequence[str]) -> Expression:
    """The expression that `text` says, over all of `models`.

    >>> str(parse("~(verbose|curt) & (helpful)", ["helpful", "verbose", "curt"]))
    '~(verbose | curt) & helpful'

    Raises:
        ValueError: `text` is no expression of &, |, ~, parentheses and names; or it is too long or too deep; or one
            of its names is no model, or occurs twice; or it leaves out a model.
    """
    expression = _convert(_parsed(text), text, 1)
    counts = Counter(names(expression))
    unknown = [name for name in counts if name not in models]
    if unknown:
        raise ValueError(
            f"{_quoted(text)} names {_listed(unknown)}, not one of the reward models {_listed(models)}"
        )
    repeated = [name for name, count in counts.items() if count > 1]
    if repeated:
        raise ValueError(
            f"{_quoted(text)} names {_listed(repeated)} more than once, which would count as independent "
            "properties: rewrite it so that each model occurs once"
        )
    missing = [name for name in models if name not in counts]
    if missing:
        raise ValueError(
            f"{_quoted(text)} leaves out {_listed(missing)}: name every one of reward_models, or remove it there"
        )
    return expression


def names(expression: Expression) -> Iterator[str]:
    """The models of an expression from left to right, each as often as it occurs."""
    if isinstance(expression, Model):
        yield expression.name
    elif isinstance(expression, Not):
        yield from names(expression.operand)
    else:
        yield from names(expression.left)
        yield from names(expression.right)


def _parsed(text: str) -> ast.expr:
    """Python's own tree of `text`; only characters that an expression has reach Python's parser."""
    if len(text) > MAX_LENGTH:
        raise ValueError(f"{_quoted(text)} has {len(text)} characters: {MAX_LENGTH} is the limit")
    if not text.strip():
        raise ValueError("the expression is empty: join the reward models with &, | and ~")
    found = _CHARACTERS.match(text)
    assert found is not None
    if found.end() < len(text):
        raise ValueError(
            f"{_quoted(text)} has '{text[found.end()]}': only names, &, |, ~ and () are understood"
        )
    try:
        return ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise ValueError(f"{_quoted(text)} is no expression of names, &, |, ~ and (): {error.msg}") from error


def _convert(node: ast.expr, text: str, depth: int) -> Expression:
    if depth > MAX_DEPTH:
        raise ValueError(f"{_quoted(text)} is nested deeper than {MAX_DEPTH}")
    if isinstance(node, ast.Name):
        return Model(node.id)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Invert):
        return Not(_convert(node.operand, text, depth + 1))
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = (_convert(side, text, depth + 1) for side in (node.left, node.right))
        return _OPERATORS[type(node.op)](left, right)
    raise ValueError(
        f"{_quoted(text)} has '{ast.unparse(node)}': only names joined by & (and), | (or), ~ (not) and () are "
        "understood"
    )


def _quoted(text: str) -> str:
    return f"'{text}'" if len(text) <= 80 else f"'{text[:77]}...'"


def _listed(items: Sequence[str]) -> str:
    return ", ".join(items)
