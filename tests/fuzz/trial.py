"""One generated input, tried: it is refused with a line that names what is wrong, or it runs, or it has failed."""

from __future__ import annotations

import signal
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from actors.errors import reason

LIMIT = 20  # seconds that one input may take


class Hang(BaseException):
    """Beyond the time limit; no `except Exception` of a library catches it."""


@dataclass(frozen=True)
class Trial:
    """`run` tries it; a refusal has to hold one of `names`. `label` says what it is in a failure."""

    label: str
    run: Callable[[], object]
    names: tuple[str, ...]


@dataclass(frozen=True)
class Verdict:
    """`outcome`: refused, fine or failed; `line`: of the refusal or the failure."""

    outcome: str
    line: str = ""


def judge(trial: Trial) -> Verdict:
    """The verdict on one input. A refusal is one printable line, without a library's own error before it."""
    try:
        with time_limit(LIMIT):
            trial.run()
    except Hang:
        return Verdict("failed", f"{trial.label}: no end within {LIMIT} s")
    except Exception as error:
        line = reason(error)
        if line is None:
            last = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{last.filename}:{last.lineno}"
            return Verdict(
                "failed", f"{trial.label}: {type(error).__name__} in {where}: {str(error)[:300]!r}"
            )
        if not line.isprintable():
            return Verdict("failed", f"{trial.label}: the line is not printable: {line[:300]!r}")
        if not any(name in line for name in trial.names):
            return Verdict("failed", f"{trial.label}: the line names none of {trial.names}: {line[:300]}")
        return Verdict("refused", line)
    return Verdict("fine")


def count(
    trials: Iterable[Trial], tell: Callable[[str], None], every: int = 100
) -> tuple[Counter[str], list[str]]:
    """How many of each outcome, and the lines of the failures; `tell` gets progress and each failure."""
    outcomes: Counter[str] = Counter(refused=0, fine=0, failed=0)
    failures = []
    for number, trial in enumerate(trials, start=1):
        verdict = judge(trial)
        outcomes[verdict.outcome] += 1
        if verdict.outcome == "failed":
            failures.append(verdict.line)
            tell(f"FAILED {verdict.line}")
        if number % every == 0:
            tell(f"{number}: {closing(outcomes)}")
    return outcomes, failures


def closing(outcomes: Counter[str]) -> str:
    return f"{outcomes['refused']} refused, {outcomes['fine']} fine, {outcomes['failed']} failed"


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    def ring(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
