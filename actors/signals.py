"""SIGTERM and Ctrl-C end the command at once, with status 143 or 130, one line, and all that it started."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from contextlib import suppress

PATIENCE = 5.0  # seconds for the main thread to end by itself


class Ended(BaseException):
    """A signal asked the command to end. Who has something running elsewhere (on a cluster) ends that, and raises it
    again; what runs here need not be waited for: `leave` ends it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def end_by_signals() -> None:
    """From now on a signal raises `Ended` in the main thread. If that does not end by it, because it waits within
    other code (for Ray's processes, say, which got the same signal), a thread ends it after a while."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    ours = [n for n in (signal.SIGTERM, signal.SIGINT) if _wanted(n)]
    for number in ours:
        signal.signal(number, _raise)
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(heard, ours), name="signals", daemon=True).start()


def leave(number: int) -> None:
    """Exits by a signal: with the processes that were started, and without waiting for threads, Ray's among them."""
    sys.stderr.write(f"error: ended by {signal.Signals(number).name}\n")
    sys.stderr.flush()
    _kill_children()
    os._exit(128 + number)


def deaf() -> None:
    """No signal is heard any more: what was started is being ended."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _wanted(number: int) -> bool:
    """Not where it is ignored, as nohup and a shell's background jobs have it."""
    return signal.getsignal(number) is not signal.SIG_IGN


def _raise(number: int, _: object) -> None:
    raise Ended(number)


def _watch(heard: int, ours: list[signal.Signals]) -> None:
    while (number := os.read(heard, 1)[0]) not in ours:
        pass
    time.sleep(PATIENCE)
    leave(number)


def _kill_children() -> None:
    """Ray's own processes would end by themselves, some of them seconds later."""
    if "ray" not in sys.modules:
        return
    import psutil

    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            child.kill()
