"""What a run was made with."""

from __future__ import annotations

import subprocess
from importlib.metadata import version
from pathlib import Path
from platform import python_version

from rlhf import __version__

PACKAGES = ("ray", "torch", "transformers", "deepspeed", "datasets", "hydra-core", "numpy")


def versions() -> dict[str, str]:
    """Versions of Python, of this package and of those that matter, and the commit of this code."""
    found = {name: version(name) for name in PACKAGES}
    return {"rlhf": __version__, "python": python_version(), "commit": _commit(), **found}


def _commit() -> str:
    """The commit of the checkout this file is tracked in ("-dirty" if changed), or why there is none."""
    folder, name = Path(__file__).resolve().parent, Path(__file__).name
    git = ["git", "-C", str(folder)]
    try:
        subprocess.run([*git, "ls-files", "--error-unmatch", name], capture_output=True, check=True)
        described = [*git, "describe", "--always", "--dirty", "--abbrev=12"]
        return subprocess.run(described, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not in a git checkout"
