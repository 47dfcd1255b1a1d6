"""The user's command in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


COMMAND = [sys.executable, "-m", "rlhf"]


def environment(**changes: str) -> dict[str, str]:
    """Of a user's shell."""
    found = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}
    found["PATH"] = f"{Path(sys.executable).parent}:{found['PATH']}"
    return found | {"PYTHONPATH": str(ROOT)} | changes


def rlhf(
    *overrides: str, cwd: Path = ROOT, timeout: float = 400, **changes: str
) -> subprocess.CompletedProcess[str]:
    """changes: of the environment."""
    return subprocess.run(
        [*COMMAND, *overrides],
        cwd=cwd,
        env=environment(**changes),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
