"""Raises a `Fault` in the main thread, whatever it waits for, when what it needs has ended."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from actors.fault import Fault

EVERY = 1.0  # seconds between two looks
SIGNAL = signal.SIGUSR1


@contextmanager
def watched(fault: Callable[[], str | None]) -> Iterator[None]:
    """While the block runs, `fault` is asked every second, in another thread. What it says ends the block.

    For the main thread: only there a signal is heard, which interrupts calls of other libraries too.
    """
    main = threading.main_thread()
    if threading.current_thread() is not main:
        yield
        return
    found: list[str] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(EVERY):
            why = fault()
            if why is not None and not over.is_set():
                found.append(why)
                signal.pthread_kill(main.ident or 0, SIGNAL)
                return

    def hear(*_: object) -> None:
        if found and not over.is_set():
            over.set()
            raise KeyboardInterrupt  # the one exception that Ray's own waits let through

    before = signal.signal(SIGNAL, hear)
    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    except KeyboardInterrupt:
        if not found:
            raise
        raise Fault(found[0]) from None
    finally:
        over.set()
        thread.join()
        signal.signal(SIGNAL, before)


@contextmanager
def deadline(seconds: float, what: str) -> Iterator[None]:
    """Bounds a wait of another library, in the main thread.

    Raises:
        Fault: the block has lasted so long.
    """
    end = time.monotonic() + seconds
    with watched(lambda: f"{what} took more than {seconds:g} s" if time.monotonic() > end else None):
        yield
