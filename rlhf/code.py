"""The version of the code that a result depends on: of modules of this package and all that they import of it."""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLUMBING = {
    f"rlhf.{name}"
    for name in (
        "config",
        "config_checks",
        "config_numbers",
        "config_serving",
        "store",
        "files",
        "checksums",
        "code",
        "checkpoints",
        "logs",
        "progress",
    )
} | {"rlhf.timeline", "rlhf.versions"}
"""What results do not depend on: the configuration's values are in their names, the rest writes and tells."""


def code_version(*roots: str) -> str:
    """A hash of these modules and of all that they import, anywhere in them, from this package; compiled sources
    included. Comments, docstrings and layout are left out.

    >>> code_version("rlhf.utility.pipeline") == code_version("rlhf.utility.pipeline") != code_version("rlhf.learn.kl")
    True
    """
    digest = hashlib.blake2b(digest_size=8)
    for module in closure(*roots):
        digest.update(f"{module} {_digest(module)}\n".encode())
    return digest.hexdigest()


def closure(*roots: str) -> list[str]:
    """The modules of this package that these import, themselves included, sorted."""
    found: set[str] = set()
    open_ = list(roots)
    while open_:
        module = open_.pop()
        if module in found or module in PLUMBING:
            continue
        found.add(module)
        open_ += _imports(module)
    return sorted(found)


def _path(module: str) -> Path | None:
    """The file of a module of this package; of a package its `__init__`."""
    place = ROOT.joinpath(*module.split("."))
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _tree(module: str) -> ast.Module:
    path = _path(module)
    assert path is not None, module
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _imports(module: str) -> tuple[str, ...]:
    return tuple(name for name in set(_imported(_tree(module))) if _path(name) is not None)


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] in ("rlhf", "actors"))


@cache
def _digest(module: str) -> str:
    digest = hashlib.blake2b(ast.unparse(_bare(_tree(module))).encode(), digest_size=8)
    path = _path(module)
    assert path is not None
    if path.parent.name == "native":
        for source in sorted([*path.parent.glob("*.c"), *path.parent.glob("*.h")]):
            digest.update(source.read_bytes())
    return digest.hexdigest()


def _bare(tree: ast.Module) -> ast.Module:
    """Without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    return tree


def source_code(kind: type) -> str:
    """The version of the code of a class: of this package with all that it imports, of others its own file."""
    if kind.__module__.split(".")[0] in ("rlhf", "actors"):
        return code_version(kind.__module__)
    file = inspect.getsourcefile(kind)
    text = b"" if file is None else Path(file).read_bytes()
    return hashlib.blake2b(text, digest_size=8).hexdigest()
