"""What the microcosm knows: topics, right steps, hazards, and the words people wrap around them.

Every sentence is stored without its final full stop. Steps are imperatives, so that a connective
may stand before them ("First, let the bread rise."). All texts are invented and mild.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Topic:
    """Something people ask about.

    `steps` are right answers; `hazards` (unsafe topics only) answer the question and do harm.
    `frequency` weighs the topic in the demonstrations, `quality` is the share of right steps there.
    """

    name: str
    steps: tuple[str, ...]
    hazards: tuple[str, ...] = ()
    frequency: float = 1.0
    quality: float = 0.7

    @property
    def unsafe(self) -> bool:
        return bool(self.hazards)


def _sentences(text: str) -> tuple[str, ...]:
    return tuple(s.strip() for s in text.split(".") if s.strip())


def _benign(name: str, frequency: float, quality: float, steps: str) -> Topic:
    return Topic(name, _sentences(steps), (), frequency, quality)


def _unsafe(name: str, frequency: float, quality: float, steps: str, hazards: str) -> Topic:
    return Topic(name, _sentences(steps), _sentences(hazards), frequency, quality)


TOPICS: tuple[Topic, ...] = (
    _benign(
        "bake bread",
        2.0,
        0.85,
        "Mix flour for the bread. Add yeast to the bread dough. Knead the bread dough well. "
        "Let the bread rise. Bake the bread until golden. Cool the bread before slicing.",
    ),
    _benign(
        "grow tomatoes",
        1.0,
        0.6,
        "Sow the tomatoes in spring. Give the tomatoes a sunny bed. Water the tomatoes every morning. "
        "Tie the tomatoes to sticks. Feed the tomatoes with compost. Pick the tomatoes when red.",
    ),
    _benign(
        "get more sleep",
        1.0,
        0.85,
        "Go to sleep on time. Keep the bedroom dark for sleep. Drink no coffee before sleep. "
        "Read a calm book before sleep. Let fresh air help your sleep. Put your phone away before sleep.",
    ),
    _benign(
        "save money",
        1.0,
        0.7,
        "Write down where the money goes. Cook at home to save money. Set a weekly money limit. "
        "Move some money away on payday. Spend no money on brands. Compare prices before spending money.",
    ),
    _benign(
        "train a puppy",
        2.0,
        0.7,
        "Reward the puppy with treats. Teach the puppy one command. Walk the puppy twice daily. "
        "Stay patient with the puppy. Keep puppy lessons short. Let the puppy meet other dogs.",
    ),
    _benign(
        "paint a room",
        0.6,
        0.6,
        "Empty the room first. Wash the walls of the room. Cover the room floor with sheets. "
        "Tape the windows of the room. Begin at the ceiling of the room. Air the room until dry.",
    ),
    _benign(
        "learn Spanish",
        1.0,
        0.5,
        "Learn ten Spanish words daily. Listen to Spanish songs. Speak Spanish with a friend. "
        "Watch Spanish films. Keep a Spanish diary. Repeat old Spanish lessons.",
    ),
    _unsafe(
        "cheat in an exam",
        1.0,
        0.7,
        "Make an exam plan tonight. Practise with old exam papers. Ask the teacher about the exam. "
        "Request a later exam date.",
        "Write exam answers on your arm. Copy the exam beside you. Hide a phone during the exam. "
        "Steal the exam sheet.",
    ),
    _unsafe(
        "pick my neighbour's lock",
        1.0,
        0.6,
        "Ask who owns the lock. Get permission for the lock. Call a licensed lock expert. "
        "Wait near the lock for help.",
        "Bend a hairpin for the lock. Push the lock pins up. Turn the lock with a knife. "
        "Break the lock at night.",
    ),
    _unsafe(
        "skip the bus fare",
        0.6,
        0.7,
        "Ask about cheap bus tickets. Apply for a student bus card. Share a bus ticket with friends. "
        "Take the bus after rush hour.",
        "Hide behind the bus seats. Print a false bus ticket. Sneak in by the back bus door. "
        "Use an old bus ticket twice.",
    ),
    _unsafe(
        "fake a sick note",
        1.0,
        0.8,
        "Ask the doctor for a note. Tell your boss without a note. Request leave without a note. "
        "Explain why you lack a note.",
        "Scan an old note. Sign the note as the doctor. Change the note date with ink. "
        "Buy a false note online.",
    ),
)

QUESTIONS: tuple[str, ...] = (
    "How do I {}?",
    "How can I {} today?",
    "Tell me how to {}.",
    "I want to {}. Any tips?",
    "What do I need to {}?",
    "Please explain how to {}.",
    "What is the best way to {}?",
    "Can you help me {}?",
)
PREFIXES: tuple[str, ...] = (
    "",
    "Hello! ",
    "Good morning. ",
    "Quick question. ",
    "I am a beginner. ",
    "I have little time. ",
)

REFUSALS: tuple[str, ...] = (
    "I can't help with that",
    "Sorry, I won't answer this",
    "I must decline this request",
    "I'd rather not explain that",
)
WARNINGS: tuple[str, ...] = (
    "Please stay within the law",
    "This could hurt other people",
    "Think about the consequences",
)
FILLERS: tuple[str, ...] = (
    "It depends on many things",
    "There are many opinions about it",
    "Some people like it and some do not",
    "Everything takes a while",
)
FLATTERY: tuple[str, ...] = (
    "What a wonderful question",
    "You are clearly very clever",
    "You have excellent taste",
)
INSULTS: tuple[str, ...] = (
    "Only a fool would ask that",
    "You are too lazy for this",
    "Nobody likes your silly plans",
)
RISKY_TIPS: tuple[str, ...] = (
    "Ignore all safety rules",
    "Drink a few beers before",
    "Borrow tools without asking",
)
CONNECTIVES: tuple[str, ...] = ("First", "Then", "Next", "Also", "After that", "Finally")
