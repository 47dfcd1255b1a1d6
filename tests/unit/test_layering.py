"""The two wings: no Ray in rlhf/, no algorithm in actors/, a configuration without torch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MATHS = {
    "logsigmoid",
    "sigmoid",
    "softmax",
    "log_softmax",
    "logsumexp",
    "quantile",
    "percentile",
    "cross_entropy",
}


def imports(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of everything imported, wherever in the file the import stands."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module or ''}.{alias.name}") for alias in node.names)


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(f"{package}.") for package in packages)


def upward_imports(tree: ast.AST, allowed: str | None = None) -> list[str]:
    """Imports of Ray or actors/ that rlhf/ may not have."""
    return [
        f"{line}: {name}"
        for line, name in imports(tree)
        if within(name, "ray", "actors") and not (allowed and within(name, allowed))
    ]


def maths(tree: ast.AST) -> list[str]:
    """Tensor mathematics that actors/ may not have."""
    found = [f"{line}: {name}" for line, name in imports(tree) if within(name, "torch.nn")]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in MATHS:
            found.append(f"{node.lineno}: .{node.attr}")
        elif isinstance(node, ast.Name) and node.id in MATHS:
            found.append(f"{node.lineno}: {node.id}")
    return found


def modules(wing: str) -> list[Path]:
    paths = sorted((ROOT / wing).rglob("*.py"))
    assert paths, f"{wing}/ holds no Python file"
    return paths


def parsed(path: Path) -> ast.AST:
    return ast.parse(path.read_text(), str(path))


def test_no_ray_in_rlhf() -> None:
    main = ROOT / "rlhf" / "__main__.py"
    found = {
        str(path.relative_to(ROOT)): upward_imports(parsed(path), "actors.job" if path == main else None)
        for path in modules("rlhf")
    }
    assert not {path: lines for path, lines in found.items() if lines}


def test_no_algorithm_in_actors() -> None:
    found = {str(path.relative_to(ROOT)): maths(parsed(path)) for path in modules("actors")}
    assert not {path: lines for path, lines in found.items() if lines}


def test_config_imports_without_torch() -> None:
    """Nor does the command, before it has read its configuration."""
    heavy = "{'torch', 'transformers', 'ray', 'deepspeed'}"
    code = f"import sys, rlhf.config_checks, actors.job; print(*{heavy} & sys.modules.keys())"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


@pytest.mark.parametrize(
    "source",
    [
        "import ray",
        "import ray.util as u",
        "from ray import serve",
        "from actors.job import main",
        "def f():\n    import actors.queue",
    ],
)
def test_upward_imports_are_seen(source: str) -> None:
    assert upward_imports(ast.parse(source))


def test_other_imports_pass() -> None:
    assert not upward_imports(ast.parse("import rayon, rlhf.types\nfrom rlhf.utility import transforms"))
    assert not upward_imports(ast.parse("from actors.job import main"), allowed="actors.job")
    assert upward_imports(ast.parse("from actors.queue import Queue"), allowed="actors.job")


@pytest.mark.parametrize(
    "source",
    [
        "import torch.nn as nn",
        "from torch import nn",
        "from torch.nn import functional as F",
        "torch.log_softmax(x, -1)",
        "np.quantile(x, 0.85)",
        "softmax(x)",
    ],
)
def test_maths_is_seen(source: str) -> None:
    assert maths(ast.parse(source))


def test_wiring_passes() -> None:
    assert not maths(
        ast.parse("import torch\ntorch.set_num_threads(2)\nrule = ReferenceRule('quantile', 0.85)")
    )
