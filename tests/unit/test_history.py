"""The history of the ledger: true ones are found clean, falsified ones are not, and the file survives a torn line."""

import random
import re
import resource
import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

from rlhf.flow.check import check
from rlhf.flow.history import (
    Admitted,
    Asked,
    Began,
    Checkpoint,
    Ended,
    Evaluated,
    History,
    Line,
    Lost,
    Rewarded,
    Sampled,
    Trained,
    read,
    text,
)
from rlhf.flow.ledger import Ledger, State

STEPS, SIZE = 6, 2


class System:
    """A run as the controller drives it, on the real ledger, in memory: every choice is the caller's."""

    def __init__(self, staleness: int) -> None:
        self.lines: list[Line] = []
        self.staleness, self.attempt = staleness, 0
        self.checkpoints = [0]
        self.begin(0, "")

    def add(self, event) -> None:
        self.lines.append(Line(len(self.lines) + 1, self.attempt, float(len(self.lines)), event))

    def begin(self, step: int, why: str) -> None:
        self.attempt += 1
        self.checkpoints = [c for c in self.checkpoints if c <= step]
        self.pulled = step
        self.ledger = Ledger(STEPS, SIZE, self.staleness, step)
        self.ledger.pulled(step)
        self.asked, self.made = {}, {}
        self.add(Began(step, STEPS, SIZE, self.staleness, why))
        self.admit()

    @property
    def version(self) -> int:
        return self.ledger.version

    @property
    def done(self) -> bool:
        return self.version == STEPS

    def items(self, state: State) -> list[int]:
        return sorted(i for i, s in self.ledger._items.items() if s is state)

    def admit(self) -> None:
        if items := self.ledger.admit(STEPS):
            self.add(Admitted(tuple(items)))

    def pull(self) -> None:
        """Every generator has the learner's weights."""
        self.pulled = self.version
        self.ledger.pulled(self.version)
        self.admit()

    def ask(self, item: int, generator: int) -> None:
        self.ledger.sampling(item)
        self.asked[item] = self.pulled
        self.add(Asked(item, generator, self.pulled))

    def sample(self, item: int, newer: bool) -> None:
        self.ledger.scoring(item)
        self.made[item] = self.version if newer else self.asked[item]
        self.add(Sampled(item, self.made[item], 16, 300))

    def reward(self, item: int) -> None:
        self.ledger.ready(item)
        self.add(Rewarded(item))

    def train(self) -> None:
        batch = self.ledger.next_batch()
        assert batch is not None
        made = tuple(self.made[i] for i in batch)
        self.ledger.training(batch)
        self.ledger.trained(batch)
        self.add(Trained(self.version - 1, tuple(batch), (self.attempt,) * SIZE, made))

    def lose(self, item: int) -> None:
        self.ledger.again(item)
        self.add(Lost(item, "ActorDiedError"))

    def save(self) -> None:
        self.checkpoints.append(self.version)
        self.add(Checkpoint(self.version))

    def end(self) -> None:
        """Whatever is left, without a fault."""
        while not self.done:
            for item in self.items(State.WAITING):
                self.ask(item, 0)
            for item in self.items(State.SAMPLING):
                self.sample(item, newer=True)
            for item in self.items(State.SCORING):
                self.reward(item)
            self.train()
            self.pull()
        self.add(Ended(STEPS, ""))


class TrueHistories(RuleBasedStateMachine):
    """Any order of what may happen is a true history."""

    def __init__(self) -> None:
        super().__init__()
        self.system = System(staleness=1)

    def some(self, data, *states: State) -> int | None:
        items = [i for state in states for i in self.system.items(state)]
        return data.draw(st.sampled_from(items)) if items else None

    @rule(data=st.data(), generator=st.integers(0, 2))
    def ask(self, data, generator):
        if (item := self.some(data, State.WAITING)) is not None:
            self.system.ask(item, generator)

    @rule(data=st.data(), newer=st.booleans())
    def sample(self, data, newer):
        if (item := self.some(data, State.SAMPLING)) is not None:
            self.system.sample(item, newer)

    @rule(data=st.data())
    def reward(self, data):
        if (item := self.some(data, State.SCORING)) is not None:
            self.system.reward(item)

    @rule(data=st.data())
    def lose(self, data):
        if (item := self.some(data, *list(State)[1:])) is not None:
            self.system.lose(item)

    @precondition(lambda self: not self.system.done and self.system.ledger.next_batch() is not None)
    @rule()
    def train(self):
        self.system.train()

    @rule()
    def pull(self):
        self.system.pull()

    @rule()
    def save(self):
        self.system.save()
        self.system.add(Evaluated(self.system.version))

    @rule(data=st.data())
    def fault(self, data):
        self.system.begin(data.draw(st.sampled_from(self.system.checkpoints)), "learner rank 0 ended")

    def teardown(self):
        self.system.end()
        verdict = check(self.system.lines)
        assert verdict.clean, verdict
        assert verdict.items == STEPS * SIZE
        assert verdict.attempts == self.system.attempt


TestTrueHistories = TrueHistories.TestCase


def true_history(seed: int, staleness: int = 1) -> list[Line]:
    """With losses and at least one rollback over a trained step."""
    rng = random.Random(seed)
    system = System(staleness)
    faults = 0
    while faults < 2 or rng.random() < 0.8:
        if system.done:
            break
        moves = [system.pull]
        moves += [lambda p=p: system.ask(p, rng.randrange(3)) for p in system.items(State.WAITING)]
        moves += [lambda p=p: system.sample(p, rng.random() < 0.5) for p in system.items(State.SAMPLING)]
        moves += [lambda p=p: system.reward(p) for p in system.items(State.SCORING)]
        rng.choice(moves)()
        if system.ledger.next_batch() is not None:
            system.train()
            if rng.random() < 0.4:
                system.save()
            elif faults < 3:
                system.begin(max(system.checkpoints), "learner rank 0 ended")
                faults += 1
        held = [p for state in list(State)[1:4] for p in system.items(state)]
        if held and rng.random() < 0.05:
            system.lose(rng.choice(held))
    system.end()
    return system.lines


def surviving(lines: list[Line], kind) -> list[int]:
    """Places of the events of the last attempt, which is whole."""
    last = max(line.attempt for line in lines)
    return [i for i, line in enumerate(lines) if line.attempt == last and isinstance(line.event, kind)]


def edited(line: Line, **changes) -> Line:
    return replace(line, event=replace(line.event, **changes))


def without(kind):
    def falsify(lines, rng):
        place = rng.choice(surviving(lines, kind))
        return lines[:place] + lines[place + 1 :]

    return falsify


def twice(lines, rng):
    place = rng.choice(surviving(lines, Trained))
    return lines[: place + 1] + lines[place:]


def swapped(lines, rng):
    places = surviving(lines, Trained)
    at = rng.randrange(len(places) - 1)
    a, b = places[at], places[at + 1]
    lines = list(lines)
    lines[a], lines[b] = lines[b], lines[a]
    return lines


def item_swapped(lines, rng):
    place = rng.choice(surviving(lines, Trained))
    lines = list(lines)
    lines[place] = edited(lines[place], items=lines[place].event.items[::-1])
    return lines


def older(lines, rng):
    """Rollouts that are too old, said throughout."""
    place = rng.choice([p for p in surviving(lines, Trained) if lines[p].event.version >= 2])
    event, last = lines[place].event, lines[place].attempt
    version = event.version - 2
    lines = [
        edited(line, version=version)
        if line.attempt == last
        and isinstance(line.event, Asked | Sampled)
        and line.event.item == event.items[0]
        else line
        for line in lines
    ]
    lines[place] = edited(lines[place], versions=(version, *event.versions[1:]))
    return lines


def other_version(lines, rng):
    """One line disagrees with another."""
    place = rng.choice([p for p in surviving(lines, Sampled) if lines[p].event.version >= 1])
    lines = list(lines)
    lines[place] = edited(lines[place], version=lines[place].event.version - 1)
    return lines


def future(lines, rng):
    place = rng.choice(surviving(lines, Sampled))
    lines = list(lines)
    lines[place] = edited(lines[place], version=lines[place].event.version + 2)
    return lines


def other_learner(lines, rng):
    place = rng.choice(surviving(lines, Trained))
    lines = list(lines)
    lines[place] = edited(lines[place], version=lines[place].event.version + 1)
    return lines


def cut_rollback(lines, rng):
    """As if nothing had been undone: the later attempt is said to be the one before."""
    last = max(line.attempt for line in lines)
    kept = [line for line in lines if line.attempt < last or not isinstance(line.event, Began)]
    return [replace(line, attempt=min(line.attempt, last - 1)) for line in kept]


def cut_began(lines, rng):
    place = rng.choice([i for i, line in enumerate(lines) if isinstance(line.event, Began)])
    return lines[:place] + lines[place + 1 :]


def never_saved(lines, rng):
    (place,) = surviving(lines, Began)
    lines = list(lines)
    saved = {line.event.step for line in lines if isinstance(line.event, Checkpoint)} | {0}
    start = lines[place].event.step
    lines[place] = edited(lines[place], step=start + 1)
    return lines if start + 1 not in saved else [x for x in lines if x.event != Checkpoint(start + 1)]


def of_the_attempt_before(lines, rng):
    """What was sampled before a rollback is trained after it."""
    place = surviving(lines, Trained)[0]
    lines = list(lines)
    attempt = lines[place].attempt
    lines[place] = edited(lines[place], attempts=(attempt - 1, attempt))
    return lines


def rolled_back_version(lines, rng):
    """Likewise, with weights that were then undone: their number is used again."""
    place = next(p for p in surviving(lines, Trained) if max(lines[p].event.versions) > start_of(lines))
    lines = list(lines)
    attempt = lines[place].attempt
    lines[place] = edited(lines[place], attempts=(attempt - 1,) * SIZE)
    return lines


def start_of(lines):
    return lines[surviving(lines, Began)[0]].event.step


def stopped(lines, rng):
    return lines[:-1]


def short(lines, rng):
    """An end before the last step."""
    place = surviving(lines, Trained)[-1]
    return [*lines[:place], replace(lines[-1], event=Ended(STEPS - 1, ""))]


UNTRAINED = r"version \d+, which is not trained|trained out of order"
FALSIFIED = [
    (without(Trained), UNTRAINED + r"|ends with step 6, and 5 are"),
    (without(Admitted), r"item \d+ is admitted, and item \d+ is not|which is not held"),
    (without(Asked), "is sampled, but it was waiting, not asked|of which nothing was made"),
    (without(Sampled), "is rewarded, but it was asked, not sampled|asked, but it was asked"),
    (without(Rewarded), "trained without rewards"),
    (twice, "is trained twice"),
    (swapped, UNTRAINED),
    (item_swapped, "trained out of order"),
    (older, "staleness 2, above 1"),
    (other_version, "its last rollouts are of version|older than"),
    (future, "which is not trained"),
    (other_learner, r"version \d+ is trained, and the learner has version"),
    (cut_rollback, "admitted twice|trained twice|which is not held"),
    (cut_began, "of attempt|no attempt has begun"),
    (never_saved, "of which the surviving history has no checkpoint|do not reach"),
    (of_the_attempt_before, "of attempt 2, and not of this one|rolled back"),
    (rolled_back_version, "which was rolled back"),
    (stopped, "has not ended: 6 of 6"),
    (short, "ends with 5 of 6 steps trained"),
]


def fitting(seed: int) -> list[Line]:
    """The first true history from `seed` on that has two rollbacks and three steps after the last."""
    for at in range(seed, seed + 200):
        lines = true_history(at)
        if max(line.attempt for line in lines) != 3 or len(surviving(lines, Trained)) < 3:
            continue
        return lines
    raise AssertionError("no history fits")


@pytest.mark.parametrize(("falsify", "reason"), FALSIFIED)
@pytest.mark.parametrize("seed", [0, 1000, 2000, 3000])
def test_a_falsified_history_is_found_out(falsify, reason, seed):
    rng = random.Random(seed)
    lines = fitting(seed)
    assert check(lines).clean, check(lines)
    verdict = check(falsify(lines, rng))
    assert not verdict.clean
    assert re.search(reason, verdict.violation), verdict


def written(path, lines: list[Line]) -> None:
    history = History(path, clock=lambda: 1.0)
    for line in lines:
        (history.begin if isinstance(line.event, Began) else history.add)(line.event)
    history.close()


def test_what_is_written_is_read(tmp_path):
    lines = true_history(5)
    written(tmp_path / "h.jsonl", lines)
    assert list(read(tmp_path / "h.jsonl")) == [replace(line, time=1.0) for line in lines]


@pytest.mark.parametrize("kept", [1, 10, 18, 45, -1])
def test_a_line_cut_off_is_left_out_and_the_next_process_goes_on(tmp_path, kept):
    """Also the line by which an attempt begins: it is then no attempt."""
    path = tmp_path / "h.jsonl"
    written(path, [line for line in true_history(5) if line.attempt == 1])
    whole = path.read_bytes()
    for cut in (
        text(Line(0, 2, 1.0, Began(0, STEPS, SIZE, 1, "{}"))),
        text(Line(0, 1, 1.0, Lost(0, "node"))),
    ):
        path.write_bytes(whole + cut.encode()[:kept])
        history = History(path)
        history.begin(Began(0, 1, 1, 0, "the process ended"))
        assert history.attempt == 2
        history.add(Admitted((0,)))
        history.add(Asked(0, 0, 0))
        history.add(Sampled(0, 0, 8, 100))
        history.add(Rewarded(0))
        history.add(Trained(0, (0,), (2,), (0,)))
        history.add(Ended(1, ""))
        history.close()
        verdict = check(read(path))
        assert (verdict.clean, verdict.attempts, verdict.items) == (True, 2, 1), verdict


def test_a_full_disk_ends_the_attempt_and_not_the_file(tmp_path):
    """The limit on the size of files stands for the disk's."""
    history = History(tmp_path / "h.jsonl")
    history.begin(Began(0, 1, 1, 0, ""))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (history.path.stat().st_size + 30, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            history.add(Admitted((0,)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not history.path.read_bytes().endswith(b"\n")
    with pytest.raises(AssertionError, match="has to begin"):
        history.add(Admitted((0,)))
    history.begin(Began(0, 1, 1, 0, "the disk was full"))
    history.add(Admitted((0,)))
    assert [type(line.event) for line in read(history.path)] == [Began, Began, Admitted]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not an event"),
        ("3", "of no known kind"),
        ('{"event": "forgot", "attempt": 1, "time": 1}', "of no known kind"),
        ('{"event": "rewarded", "attempt": "1", "time": 1, "item": 3}', "attempt and time must be numbers"),
        ('{"event": "rewarded", "attempt": 1, "time": 1, "item": "3"}', "item must be of type int"),
        (
            '{"event": "admitted", "attempt": 1, "time": 1, "items": [0.5]}',
            r"items must be of type tuple\[int",
        ),
        ('{"event": "rewarded", "attempt": 1, "time": 1}', "missing 1 required"),
    ],
)
def test_a_line_that_is_no_event_is_named_unless_it_is_the_last(tmp_path, line, reason):
    path = tmp_path / "h.jsonl"
    head, event = text(Line(0, 1, 1.0, Began(0, 1, 1, 0, ""))), text(Line(0, 1, 1.0, Admitted((0,))))
    path.write_text(f"{head}\n{line}\n{event}\n")
    with pytest.raises(ValueError, match=rf"h\.jsonl:2: .*{reason}"):
        list(read(path))
    assert not check(read(path)).clean
    path.write_text(f"{head}\n{line}")
    assert len(list(read(path))) == 1


def test_a_checkpoint_or_an_evaluation_of_a_step_that_is_not_there():
    lines = true_history(5)[:-1]
    for event in (Checkpoint(STEPS + 1), Evaluated(STEPS + 1)):
        more = [*lines, replace(lines[-1], event=event)]
        assert re.search(r"of step 7, in an attempt that has steps \d to 6", str(check(more)))


def test_an_early_end_says_why():
    lines = true_history(5)
    place = surviving(lines, Trained)[-1]
    assert check([*lines[:place], replace(lines[-1], event=Ended(STEPS - 1, "evaluators fell"))]).clean


def test_the_command_says_it_in_a_line_and_by_its_status(tmp_path):
    lines = true_history(5)
    for name, kept in (("true", lines), ("false", lines[:-1])):
        written(tmp_path / name, kept)
    outcomes = [
        subprocess.run(
            [sys.executable, "-m", "rlhf.flow.history", str(tmp_path / name)], capture_output=True, text=True
        )
        for name in ("true", "false", "none")
    ]
    assert [done.returncode for done in outcomes] == [0, 1, 2]
    assert outcomes[0].stdout.startswith("clean: 12 items, each trained once, in 6 steps; ")
    assert re.fullmatch(r"untrue: line \d+: has not ended: 6 of 6 steps are trained\n", outcomes[1].stdout)
    assert outcomes[2].stderr.endswith("No such file or directory\n")
