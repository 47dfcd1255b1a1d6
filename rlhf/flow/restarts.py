"""How often a stage may be begun again, and how long is waited before it is."""

from __future__ import annotations

import time
from collections.abc import Callable

LONGEST = 60.0  # seconds of a wait, at most


class Restarts:
    """Counts restarts in a row; progress begins the count anew.

    >>> waits = []
    >>> restarts = Restarts(2, backoff=3.0, sleep=waits.append)
    >>> restarts.again(), restarts.again(), restarts.again()
    (True, True, False)
    >>> restarts.progressed(); restarts.again(), waits
    (True, [3.0, 6.0, 3.0])
    """

    def __init__(
        self, most: int, backoff: float, count: int = 0, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """count: of restarts in a row before."""
        self._most, self._backoff, self._sleep = most, backoff, sleep
        self.count = count

    def progressed(self) -> None:
        self.count = 0

    def again(self) -> bool:
        """Whether there may be another restart; if so, after a wait, twice as long as the one before."""
        if self.count >= self._most:
            return False
        self._sleep(min(self._backoff * 2**self.count, LONGEST))
        self.count += 1
        return True
