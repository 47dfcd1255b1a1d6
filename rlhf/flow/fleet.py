"""The generators as their driver knows them: who may be given work, who has which, who is silent, what is to blame."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass, field

TRIES = 3
"""How often a piece of work is tried when processes or nodes that have it end."""

BLINK = 2.0
"""Seconds that pass, at most, between two ticks of a fleet's time."""


@dataclass
class _Member:
    """A generator that has loaded the policy."""

    version: int  # of the weights that it holds, or will hold before it is given work
    ready: bool
    heard: float  # its last sign of life, or when it was given something to do
    items: set[int] = field(default_factory=set)
    alone: bool = False  # its item is under suspicion
    pulling: bool = False
    progress: int = -1

    @property
    def busy(self) -> bool:
        return bool(self.items) or self.pulling


class Fleet:
    """Guarantees, whichever generator ends, when, and comes back with what:

    **Age.** Work that is started is sampled from weights of `version` at least, and `version` never falls. It is the
    least version of the members. One that joins counts with the newest that is published, which is no less, and is
    given work only once it holds that; weights published later reach it as they reach the others; one that leaves
    takes its number away. So the ledger may admit by `version` and need not know of restarts.

    **Silence.** A member that has something to do and gives no sign of life for `timeout` seconds is silent. Signs are
    progress, an item's end, weights pulled; being given more to do is none. Hence items may queue at a generator for
    as long as it gets on. Time goes by in ticks of at most `BLINK` seconds: what the driver slept through counts not.

    **Blame.** An item that was at a generator when it ended is under suspicion: from then on it is run alone. So all
    of its ends but the first have one culprit, and `TRIES` of them are enough to name it. It waits for a generator
    that has nothing; as the ledger admits no more than `Ledger.capacity` items, one will have.

    >>> fleet = Fleet(timeout=10)
    >>> fleet.join(0); fleet.start(7, 0), fleet.start(8, 0), fleet.free(9, depth=2)
    (None, None, None)
    >>> fleet.leave(0, blamed={7, 8}); fleet.publish(1); fleet.join(0); fleet.free(7, depth=2), fleet.version
    (None, 1)
    >>> fleet.pull_ended(0, version=1); fleet.start(7, 0), fleet.free(9, depth=2), fleet.deaths(7)
    (None, None, 1)
    """

    def __init__(self, timeout: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._timeout, self._clock = timeout, clock
        self._now, self._last = 0.0, clock()
        self.begin()

    def begin(self) -> None:
        """Another policy, of version 0, which nobody has loaded yet."""
        self._members: dict[int, _Member] = {}
        self.published = 0
        self.forget()

    def forget(self) -> None:
        """Items of another kind come: those under way are no one's, and nothing is known against any."""
        for member in self._members.values():
            member.items, member.alone = set(), False
        self._deaths: Counter[int] = Counter()
        self._losses: Counter[int] = Counter()

    def tick(self) -> None:
        now = self._clock()
        self._now, self._last = self._now + min(now - self._last, BLINK), now

    # Versions

    @property
    def version(self) -> int:
        """What is started from now on is sampled from this version or a newer one."""
        return min((m.version for m in self._members.values()), default=self.published)

    def publish(self, version: int) -> None:
        assert version >= self.published, (version, self.published)
        self.published = version

    def join(self, worker: int) -> None:
        """The generator has loaded the policy."""
        assert worker not in self._members, worker
        self._members[worker] = _Member(self.published, self.published == 0, self._now)

    def joined(self, worker: int) -> bool:
        return worker in self._members

    def ready(self, worker: int) -> bool:
        """Whether the generator may be given work."""
        return worker in self._members and self._members[worker].ready

    def behind(self, worker: int) -> bool:
        """Whether a member has to pull the published weights."""
        member = self._members[worker]
        return not member.ready or member.version < self.published

    def pull(self, worker: int) -> None:
        """The published weights are on their way to it."""
        member = self._members[worker]
        self._given(member)
        member.pulling = True

    def pull_ended(self, worker: int, version: int | None) -> None:
        """It holds this version, or, None, has got none."""
        member = self._members[worker]
        member.pulling, member.heard = False, self._now
        if version is not None:
            assert version >= member.version, (worker, version, member)
            member.version, member.ready = version, True

    @property
    def settled(self) -> bool:
        """Whether every member holds what is published."""
        return not any(self.behind(w) or m.pulling for w, m in self._members.items())

    # Work

    def free(self, item: int, depth: int) -> int | None:
        """The generator with the fewest items that may take this one too, if there is any with less than `depth`."""
        most = 1 if item in self._deaths else depth
        open_ = [
            (len(m.items), worker)
            for worker, m in self._members.items()
            if m.ready and not m.alone and len(m.items) < most
        ]
        return min(open_)[1] if open_ else None

    def start(self, item: int, worker: int) -> None:
        member = self._members[worker]
        assert member.ready, worker
        self._given(member)
        member.items.add(item)
        member.alone = item in self._deaths

    def finish(self, item: int, worker: int) -> None:
        member = self._members[worker]
        member.items.remove(item)
        member.alone, member.heard = False, self._now

    def _given(self, member: _Member) -> None:
        if not member.busy:
            member.heard = self._now

    def leave(self, worker: int, blamed: Collection[int]) -> None:
        """The generator has ended, or is given up; `blamed` are the items that it was at work on."""
        self._members.pop(worker, None)
        self._deaths.update(blamed)

    def deaths(self, item: int) -> int:
        return self._deaths[item]

    def lose(self, item: int) -> int:
        """What was made of an item is lost; how often by now."""
        self._losses[item] += 1
        return self._losses[item]

    # Signs of life

    def hear(self, worker: int, progress: int) -> None:
        """The generator says how far it is; only another number than before is a sign of life."""
        member = self._members[worker]
        if progress != member.progress:
            member.progress, member.heard = progress, self._now

    def busy(self, worker: int) -> bool:
        """Whether a member has something to do."""
        return worker in self._members and self._members[worker].busy

    def silent(self) -> list[int]:
        return [w for w, m in self._members.items() if m.busy and self._now - m.heard > self._timeout]
