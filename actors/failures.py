"""What Ray's errors mean here: work that ended with a process or a node is done again, any other error is told."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import ray
from ray.exceptions import (
    GetTimeoutError,
    NodeDiedError,
    ObjectLostError,
    OutOfMemoryError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
    WorkerCrashedError,
)

from actors.fault import Fault
from rlhf.flow.fleet import TRIES

log = logging.getLogger(__name__)

PATIENCE = 60.0
"""Seconds after which the log says what is waited for."""

DEATHS = (RayActorError, OutOfMemoryError, NodeDiedError, WorkerCrashedError)


def root(error: BaseException) -> BaseException:
    """The error itself, of whichever process; not those of the calls it came through."""
    while isinstance(error, RayTaskError):
        error = error.cause
    return error


def died(error: BaseException) -> bool:
    """Whether the called process ended, and not one that it called."""
    return isinstance(error, DEATHS) and not isinstance(error, RayTaskError)


def lost(error: BaseException) -> bool:
    """Whether a process, or an object with its node, was lost on the way."""
    return isinstance(root(error), (*DEATHS, ObjectLostError))


def fault(error: BaseException) -> str | None:
    """In one line, what ended or is stuck, if a stage can begin anew after it; None: it is an error of another kind,
    and would come again."""
    if isinstance(root(error), Fault):
        return str(root(error))
    if lost(error) or isinstance(root(error), (RaySystemError, GetTimeoutError)):
        return short(error)
    return None


def short(error: BaseException) -> str:
    """The kind of an error and its words, in one line, cut short."""
    words = " ".join(str(root(error)).split())
    return f"{type(root(error)).__name__}: {words if len(words) <= 400 else words[:400] + '...'}"


class Call:
    """A call under way. One that was lost is made again; `TRIES` times in all."""

    def __init__(self, what: str, start: Callable[[], ray.ObjectRef], silence: float) -> None:
        self._what, self._start, self._silence = what, start, silence
        self._ref = start()

    def result(self) -> Any:
        """
        Raises:
            Fault: it was lost each time, or gave no answer for `silence` seconds from now on.
        """
        for _ in range(TRIES):
            try:
                return ray.get(self._ref, timeout=self._silence)
            except GetTimeoutError:
                raise Fault(f"{self._what} gave no answer for {self._silence:g} s") from None
            except RayError as error:
                if not lost(error):
                    raise
                why = short(error)
                self._ref = self._start()
        raise Fault(f"{self._what} was lost {TRIES} times ({why})")


def fetched(references: Sequence[ray.ObjectRef]) -> list[Any]:
    """The values of references; in the place of a lost one its error."""
    try:
        return ray.get(list(references))
    except RayError as error:
        if not lost(error):
            raise
    values: list[Any] = []
    for reference in references:
        try:
            values.append(ray.get(reference))
        except RayError as error:
            if not lost(error):
                raise
            values.append(error)
    return values


def tell_if_late(calls: Sequence[ray.ObjectRef], who: str, what: str) -> None:
    """Says in the log what is waited for, if it lasts."""
    _, late = ray.wait(list(calls), num_returns=len(calls), timeout=PATIENCE)
    if late:
        log.warning("%d of %d %s %s after %.0f s: is there room?", len(late), len(calls), who, what, PATIENCE)
