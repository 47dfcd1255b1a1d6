"""How people of the microcosm answer: from good to broken, all from one seeded generator.

`draft` draws an answer at the quality of a demonstration; `broad` at any quality, so that a reward
model sees what a policy may drift into; `edit` changes one sentence, so that a reward model sees
what that sentence alone is worth.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from random import Random

from rlhf.data import microcosm_world as world
from rlhf.data.microcosm_world import Topic

LONGEST = 6
"""Sentences in the longest answer."""

_NUMBERED = frozenset(s for t in world.TOPICS for s in (*t.steps, *t.hazards))


@dataclass(frozen=True)
class Answer:
    """Sentences without full stops; `style` is "plain", "connected" or "list"."""

    parts: tuple[str, ...]
    style: str = "plain"
    cut: int = 0  # words dropped from the end of the text


def render(answer: Answer) -> str:
    """The text of an answer.

    >>> render(Answer(("Add yeast to the bread dough", "Let the bread rise"), "connected"))
    'First, add yeast to the bread dough. Then, let the bread rise.'
    """
    texts, count = [], 0
    for part in answer.parts:
        if part in _NUMBERED and answer.style == "connected":
            lead = world.CONNECTIVES[min(count, len(world.CONNECTIVES) - 1)]
            part = f"{lead}, {part[0].lower()}{part[1:]}"
        elif part in _NUMBERED and answer.style == "list":
            part = f"{count + 1}) {part}"
        else:
            count -= 1
        count += 1
        texts.append(part + ".")
    words = " ".join(texts).split(" ")
    kept = " ".join(words[: max(1, len(words) - answer.cut)])
    return kept.rstrip(".") if answer.cut else kept


def _other(rng: Random, topic: Topic, hazard_share: float = 0.2) -> str:
    """A sentence about something else."""
    other = rng.choice([t for t in world.TOPICS if t.name != topic.name])
    return rng.choice(other.hazards if other.hazards and rng.random() < hazard_share else other.steps)


def _broken(rng: Random, topic: Topic) -> str:
    """A sentence that went wrong: two halves that do not meet, a missing word, or swapped words."""
    words = rng.choice((*topic.steps, *topic.hazards)).split(" ")
    kind = rng.randrange(3)
    if kind == 0:
        tail = (rng.choice(topic.steps) if rng.random() < 0.5 else _other(rng, topic)).split(" ")
        words = words[: rng.randrange(1, len(words))] + tail[rng.randrange(1, len(tail)) :]
    elif kind == 1 and len(words) > 2:
        del words[rng.randrange(1, len(words))]
    else:
        i = rng.randrange(1, len(words) - 1) if len(words) > 2 else 0
        words[i], words[i + 1] = words[i + 1], words[i]
    return " ".join(words)


def _mistake(rng: Random, topic: Topic, said: list[str]) -> str:
    kind = rng.choices(
        ("other", "repeat", "broken", "filler", "flattery", "insult", "risky"), (3, 3, 2.5, 3, 2, 2, 2)
    )[0]
    if kind == "repeat" and said:
        return rng.choice(said)
    if kind == "broken":
        return _broken(rng, topic)
    if kind in ("other", "repeat"):
        return _other(rng, topic)
    pools = {
        "filler": world.FILLERS, "flattery": world.FLATTERY,
        "insult": world.INSULTS, "risky": world.RISKY_TIPS,
    }  # fmt: skip
    return rng.choice(pools[kind])


def _steps(rng: Random, topic: Topic, count: int, quality: float, hazard_share: float) -> list[str]:
    """`count` sentences; each is right with probability `quality`, and if so mostly a new one."""
    said: list[str] = []
    for _ in range(count):
        if rng.random() >= quality:
            said.append(_mistake(rng, topic, said))
            continue
        pool = topic.hazards if topic.hazards and rng.random() < hazard_share else topic.steps
        fresh = [s for s in pool if s not in said]
        said.append(rng.choice(fresh or pool))
    return said


def _style(rng: Random) -> str:
    return rng.choices(("plain", "connected", "list"), (6, 3, 1.5))[0]


def _framed(
    rng: Random, topic: Topic, parts: list[str], refuse: float, warn: float, flatter: float
) -> Answer:
    """Adds what stands before and after the steps."""
    if rng.random() < flatter:
        parts.insert(0, rng.choice(world.FLATTERY))
    if rng.random() < refuse:
        parts.insert(0, rng.choice(world.REFUSALS))
    if rng.random() < warn:
        parts.append(rng.choice(world.WARNINGS))
    return Answer(tuple(parts[:LONGEST]), _style(rng))


def draft(rng: Random, topic: Topic) -> Answer:
    """An answer of a demonstration: the base policy learns to answer like this."""
    if rng.random() < (0.2 if topic.unsafe else 0.03):
        return Answer((rng.choice(world.REFUSALS),))
    count = rng.choices((1, 2, 3, 4, 5), (3, 5, 5, 2.5, 1))[0]
    hazard_share = rng.choices((0.0, 0.5, 1.0), (4, 3, 3))[0] if topic.unsafe else 0.0
    parts = _steps(rng, topic, count, topic.quality, hazard_share)
    answer = _framed(
        rng,
        topic,
        parts,
        refuse=0.08 if topic.unsafe else 0.02,
        warn=0.2 if topic.unsafe else 0.03,
        flatter=0.1,
    )
    return replace(answer, cut=rng.randrange(1, 4) if rng.random() < 0.05 else 0)


def broad(rng: Random, topic: Topic) -> Answer:
    """An answer of any quality and length, with every fault and virtue more often."""
    if rng.random() < 0.1:
        return Answer((rng.choice(world.REFUSALS),))
    count = rng.randrange(1, LONGEST + 1)
    hazard_share = rng.choice((0.0, 0.0, 0.3, 1.0))
    quality = rng.choice((0.3, 0.6, 0.85, 1.0, 1.0))
    parts = _steps(rng, topic, count, quality, hazard_share)
    answer = _framed(rng, topic, parts, refuse=0.12, warn=0.2, flatter=0.15)
    return replace(answer, cut=rng.randrange(1, 4) if rng.random() < 0.08 else 0)


def edit(rng: Random, topic: Topic, answer: Answer) -> Answer:
    """The same answer with one sentence dropped, added, replaced, said again, or left unfinished."""
    parts = list(answer.parts)
    i = rng.randrange(len(parts))
    kind = rng.choices(("drop", "step", "swap", "mistake", "repeat", "frame", "cut"), (2, 3, 3, 3, 2, 2, 1))[
        0
    ]
    fresh = [s for s in (*topic.steps, *topic.hazards) if s not in parts]
    if kind == "drop" and len(parts) > 1:
        del parts[i]
    elif kind == "step" and fresh:
        parts.insert(i + 1, rng.choice(fresh))
    elif kind == "swap" and fresh:
        parts[i] = rng.choice(fresh)
    elif kind == "repeat":
        parts.insert(i + 1, rng.choice(parts[: i + 1]))
    elif kind == "frame":
        parts.insert(0, rng.choice(world.REFUSALS + world.FLATTERY))
    elif kind == "cut":
        return replace(answer, cut=answer.cut + rng.randrange(1, 4))
    else:
        parts[i] = _mistake(rng, topic, parts[:i])
    return replace(answer, parts=tuple(parts))
