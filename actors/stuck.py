"""Where a process stands that gives no sign of life."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import traceback

import ray
from ray.exceptions import RayError

ANSWER = 3.0  # seconds
SILENT = "answers nothing"  # of a process that does not even say where it stands
DUMP = 20.0  # seconds for py-spy


def stacks() -> str:
    """The stacks of the threads of this process in which code of this package is; if there are none, of all."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    parts = [
        f"thread {names.get(ident, ident)}:\n{''.join(traceback.format_stack(frame))}"
        for ident, frame in sys._current_frames().items()
        if ident != threading.get_ident()
    ]
    ours = [part for part in parts if innermost(part) != part.splitlines()[0]]
    return "\n".join(ours or parts)


def where(asked: ray.ObjectRef | None, pid: int | None, node: str | None) -> str:
    """Where a process stands.

    Args:
        asked: a call of its `stacks`, which a process answers whose other threads hang.
        pid, node: of one that answers nothing: if it is on this node, its state is told, and its stacks if py-spy is
            installed.
    """
    if asked is not None:
        try:
            return str(ray.get(asked, timeout=ANSWER))
        except RayError:
            pass  # it answers nothing
    if pid is None or node != ray.get_runtime_context().get_node_id():
        return f"it {SILENT}"
    import psutil

    try:
        state = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return f"process {pid} is gone"
    found = f"process {pid} is {state} and {SILENT}"
    spy = shutil.which("py-spy")
    if spy is not None and state != psutil.STATUS_STOPPED:
        command = [spy, "dump", "--pid", str(pid)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=DUMP, check=False)
        except subprocess.TimeoutExpired:
            return found
        found += f"\n{done.stdout or done.stderr}"
    return found


def innermost(text: str) -> str:
    """The last place of this package in a text of stacks, as "file:line, in function"; else its first line.

    >>> innermost('File "/x/rlhf/learn/trainer.py", line 12, in step\\n File "/y/torch/a.py", line 1, in b')
    'rlhf/learn/trainer.py:12, in step'
    >>> innermost("process 7 is stopped and answers nothing")
    'process 7 is stopped and answers nothing'
    """
    found = ""
    for line in text.splitlines():
        for wing in ("rlhf", "actors"):
            _, inside, rest = line.partition(f"{os.sep}{wing}{os.sep}")
            name, quote, words = rest.partition('", line ')
            if inside and quote:
                number, _, function = words.partition(", in ")
                found = f"{wing}/{name}:{number}, in {function.strip()}"
    return found or text.splitlines()[0]


def place() -> tuple[int, str]:
    """Process and node of this process."""
    return os.getpid(), ray.get_runtime_context().get_node_id()
