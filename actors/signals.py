"""SIGTERM and Ctrl-C end the command with status 143 or 130, one line, and all that it started: at once, or, in stages
with checkpoints, when one is written."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from actors.leftovers import guards

PATIENCE = 5.0  # seconds for the main thread to end by itself


class Ended(BaseException):
    """A signal asked the command to end. Who has something running elsewhere (on a cluster) ends that, and raises it
    again; what runs here need not be waited for: `leave` ends it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class _Orderly:
    """The block of `orderly` that runs, if there is one."""

    def __init__(self, grace: float, what: str) -> None:
        self.grace, self.what, self.heard = grace, what, 0


_orderly: _Orderly | None = None
_ours: list[signal.Signals] = []  # that are heard


def end_by_signals() -> None:
    """From now on a signal raises `Ended` in the main thread. If that does not end by it, because it waits within
    other code (for Ray's processes, say, which got the same signal), a thread ends it after a while."""
    heard, told = os.pipe()
    os.set_blocking(told, False)
    ours = [n for n in (signal.SIGTERM, signal.SIGINT) if _wanted(n)]
    _ours.extend(ours)
    hear_again()
    signal.set_wakeup_fd(told, warn_on_full_buffer=False)
    threading.Thread(target=_watch, args=(heard, ours), name="signals", daemon=True).start()


def hear_again() -> None:
    """After a start of Ray, of which the second and later ones take signals for themselves."""
    if threading.current_thread() is threading.main_thread():
        for number in _ours:
            signal.signal(number, _raise)


@contextmanager
def orderly(
    grace: float, what: str = "a checkpoint is written after this step"
) -> Iterator[Callable[[], bool]]:
    """Within, the first signal interrupts nothing. Who is within asks whether one came, saves what it has, and leaves
    the block, which then raises `Ended`. It has `grace` seconds for that; a second signal ends it at once. `what`: is
    done meanwhile, as the signal's line says.

    >>> with orderly(10.0) as asked: asked()
    False
    """
    global _orderly
    assert _orderly is None, "blocks are not nested"
    _orderly = mine = _Orderly(grace, what)
    try:
        yield lambda: mine.heard != 0
    except Exception as error:
        if mine.heard:
            raise Ended(mine.heard) from error
        raise
    finally:
        _orderly = None
    if mine.heard:
        raise Ended(mine.heard)


def leave(number: int) -> None:
    """Exits by a signal: with the processes that were started, and without waiting for threads, Ray's among them."""
    sys.stderr.write(f"error: ended by {signal.Signals(number).name}\n")
    _say_no_more()
    _kill_children()
    os._exit(128 + number)


def deaf() -> None:
    """No signal is heard any more: what was started is being ended."""
    _ours.clear()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _wanted(number: int) -> bool:
    """Not where it is ignored, as nohup and a shell's background jobs have it."""
    return signal.getsignal(number) is not signal.SIG_IGN


def _raise(number: int, _: object) -> None:
    if _orderly is not None and _orderly.heard == 0 and _orderly.grace > 0:
        _orderly.heard = number
        sys.stderr.write(
            f"{signal.Signals(number).name}: {_orderly.what}, in {_orderly.grace:g} s at most; a second signal ends at "
            "once\n"
        )
        sys.stderr.flush()
        return
    raise Ended(number)


def _watch(heard: int, ours: list[signal.Signals]) -> None:
    """Ends the command when its time is over, or a while after a second signal."""
    number = _next(heard, ours, None)
    assert number is not None
    grace = 0.0 if _orderly is None else _orderly.grace
    if _next(heard, ours, grace) is not None or grace == 0:
        time.sleep(PATIENCE)
    leave(number)


def _next(heard: int, ours: list[signal.Signals], seconds: float | None) -> int | None:
    """The next signal of ours; None: there was none in this time."""
    end = None if seconds is None else time.monotonic() + seconds
    while True:
        left = None if end is None else max(0.0, end - time.monotonic())
        if not select.select([heard], [], [], left)[0]:
            return None
        number = os.read(heard, 1)[0]
        if number in ours:
            return number


def _say_no_more() -> None:
    """Ray's threads in this process would still tell that the processes they talk to have died."""
    sys.stdout.flush()
    sys.stderr.flush()
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)


def _kill_children() -> None:
    """Ray's own processes would end by themselves, some of them seconds later. The guards stay: they end what is missed
    here, as processes whose parent ended before are."""
    if "ray" not in sys.modules:
        return
    import psutil

    spared = guards()
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if child.pid not in spared:
                child.kill()
