"""Whether processes at work still get on, from what they say when they are asked."""

from __future__ import annotations

import time
from collections.abc import Callable


class Pulse:
    """A process at work is asked for a number that is another whenever it has got on. It is silent when for `timeout`
    seconds it has said no other number than before, or nothing at all. Time goes by only while it is watched: at most
    `BLINK` seconds between two looks count.

    >>> now = 0.0
    >>> pulse = Pulse(timeout=5, clock=lambda: now)
    >>> for now in (0.0, 2.0, 4.0): pulse.look()
    >>> pulse.heard(7); now = 6.0; pulse.look(); pulse.silence
    2.0
    >>> pulse.heard(7); pulse.look(); pulse.silent
    False
    >>> for now in (8.0, 10.0, 12.0): pulse.look()
    >>> pulse.silent
    True
    """

    BLINK = 2.0

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout, self._clock = timeout, clock
        self.begin()

    def begin(self) -> None:
        """It is given something to do."""
        self._last, self.silence = self._clock(), 0.0
        self._number: int | None = None

    def look(self) -> None:
        now = self._clock()
        self.silence, self._last = self.silence + min(now - self._last, self.BLINK), now

    def heard(self, number: int) -> None:
        if number != self._number:
            self._number, self.silence = number, 0.0

    @property
    def silent(self) -> bool:
        return self.silence > self._timeout
