"""What a Ray of this command's own leaves when the command ends, in whatever way: nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

KEEP = b"keep"
_WATCH = r"""
import os, shutil, signal, sys, time

folder, command = sys.argv[1], os.getppid()
signal.signal(signal.SIGINT, signal.SIG_IGN)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
said = sys.stdin.buffer.read()  # until the command ends
while os.getppid() == command:  # it is at its end, and says its status yet
    time.sleep(0.05)

def of_the_session(pid):
    try:
        if folder.encode() in open(f"/proc/{pid}/cmdline", "rb").read():
            return True
        places = f"/proc/{pid}/fd"
        return any(os.readlink(f"{places}/{fd}").startswith(folder) for fd in os.listdir(places))
    except OSError:  # it is gone, or not ours
        return False

end = time.monotonic() + 20
while time.monotonic() < end:
    left = [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if pid != os.getpid()]
    left = [pid for pid in left if of_the_session(pid)]
    for pid in left:
        try:
            os.kill(pid, signal.SIGKILL)
        except OSError:
            pass
    if not left:
        break
    time.sleep(0.1)
if not said:
    shutil.rmtree(folder, ignore_errors=True)
"""
_guards: list[subprocess.Popen] = []


def guard(folder: Path) -> None:
    """From now on a small process waits for the end of this one, by SIGKILL too. It then ends what processes of the Ray
    session are left, which it knows by the session's folder (in their command line, or a log that they write), and
    removes that folder. For Linux; elsewhere Ray's processes end by themselves."""
    if not sys.platform.startswith("linux"):
        return
    command = [sys.executable, "-S", "-E", "-c", _WATCH, str(folder)]
    _guards.append(
        subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    )


def guards() -> set[int]:
    """The process ids of guards."""
    return {one.pid for one in _guards}


def keep() -> None:
    """The folders stay: the command ends by an error, which their logs may explain."""
    for one in _guards:
        assert one.stdin is not None
        if one.poll() is None:
            one.stdin.write(KEEP)
            one.stdin.flush()
