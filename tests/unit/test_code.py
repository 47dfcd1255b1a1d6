"""The version of code: what changes it, and what does not."""

import ast
import subprocess
import sys

import pytest

from rlhf import code
from tests.e2e.command import ROOT


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Modules rlhf.a (which imports b within a function), rlhf.b and rlhf.c, written by name and text."""
    monkeypatch.setattr(code, "ROOT", tmp_path)
    (tmp_path / "rlhf").mkdir()

    def version(**texts: str) -> str:
        for name, text in texts.items():
            (tmp_path / "rlhf" / f"{name}.py").write_text(text)
        for cached in (code._tree, code._imports, code._digest):
            cached.cache_clear()
        return code.code_version("rlhf.a")

    yield version
    for cached in (code._tree, code._imports, code._digest):
        cached.cache_clear()


A = "def f():\n    from rlhf.b import g\n    return g() + 1\n"


def test_changes_of_a_module_and_of_what_it_imports_count(package):
    first = package(a=A, b="def g():\n    return 1\n", c="x = 1\n")
    assert package(c="x = 2\n") == first
    assert package(b='"""Of b."""\n\ndef g():\n    # one\n    return (1)\n') == first
    assert package(b="def g():\n    return 2\n") != first
    assert package(b="def g():\n    return 1\n") == first
    assert package(a=A.replace("+ 1", "+ 2")) != first


def test_what_is_imported_in_fact_is_found():
    """Against the interpreter's own list, of modules that are imported at their top."""
    roots = ["rlhf.utility.pipeline", "rlhf.models.reward", "rlhf.generate.transformers_engine"]
    program = f"import sys, {', '.join(roots)}; print(*(m for m in sys.modules if m.split('.')[0] == 'rlhf'))"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    packages = {"rlhf"} | {
        m for m in done.stdout.split() if (ROOT / m.replace(".", "/") / "__init__.py").is_file()
    }
    assert set(done.stdout.split()) - packages <= set(code.closure(*roots)) | code.PLUMBING
    assert all(ast.parse((ROOT / "rlhf" / "__init__.py").read_text()).body)
