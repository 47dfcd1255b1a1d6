"""The last way back: the command begins anew, in its own process.

For a Ray of its own whose start has failed or hangs. A failed start leaves processes that nothing names any more, and
one whose head has ended cannot be interrupted: after a minute Ray ends the process itself.
"""

from __future__ import annotations

import os
import sys
from typing import NoReturn

COUNT = "RLHF_RESTARTS"  # in a row, before the command began anew


def afresh(restarts: int) -> NoReturn:
    """Replaces this process by the same command. Threads end by that, and with them what they have started (of Ray's
    processes each ends with the thread that made it). Stages go on from their newest checkpoints, as whenever a command
    is run again."""
    os.environ[COUNT] = str(restarts)
    sys.stdout.flush()
    sys.stderr.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def restarts_before() -> int:
    """Restarts in a row of the command before it began anew; told once."""
    return int(os.environ.pop(COUNT, 0))
