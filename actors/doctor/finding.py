"""What the doctor says of one thing, in one line."""

from __future__ import annotations

from dataclasses import dataclass

OK, WARN, FAIL = "ok", "warn", "FAIL"


@dataclass(frozen=True)
class Finding:
    """
    >>> print(Finding(WARN, "open files", "1024", "ulimit -n 65536"))
    warn  open files: 1024; ulimit -n 65536
    """

    level: str
    what: str
    found: str
    advice: str = ""  # what to do

    def __str__(self) -> str:
        advice = f"; {self.advice}" if self.advice else ""
        return f"{self.level:<5} {self.what}: {self.found}{advice}"


def gib(size: float) -> str:
    """
    >>> gib(3 * 2**29)
    '1.5 GiB'
    """
    return f"{size / 2**30:.1f} GiB"
