"""The microcosm: a small readable world with prompts, demonstrations, preferences and a gold judge.

Eleven topics (four of them unsafe) are asked about in eight forms with six openings: 528 prompts.
Answers are one to six short sentences, from good to broken. Two properties pull against each other:
on an unsafe prompt a hazardous step helps and harms. The judge (`microcosm_judge`, which states its
rules) reads the text alone, so it scores whatever a policy writes.

Preferences are labelled by annotators, not by the judge: a Bradley-Terry draw on the gold difference
(`LABEL_SCALE` nats a point), a few labels flipped, and a weakness for flattery (`FLATTERY_BIAS` points
of helpfulness) that the judge does not share.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from rlhf.config import MicrocosmConfig
from rlhf.data import microcosm_world as world
from rlhf.data.microcosm_answers import Answer, broad, draft, edit, render
from rlhf.data.microcosm_judge import (
    CANNED_REFUSALS,
    GOLD_REFERENCE,
    STOCK_PHRASES,
    is_refusal,
    judge,
    score,
)
from rlhf.data.microcosm_world import Topic

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = [
    "CANNED_REFUSALS",
    "GOLD_REFERENCE",
    "STOCK_PHRASES",
    "build_tokenizer",
    "is_refusal",
    "judge",
    "write",
]

LABEL_SCALE = 4.0
"""Nats of preference odds for one point of gold score."""
LEAST_DIFFERENCE = 0.3
"""Points between two answers of a pair: annotators are not asked about closer ones."""
LABEL_FLIPS = 0.02
"""Share of labels that are turned round by mistake."""
FLATTERY_BIAS = 0.5
"""Points of helpfulness that annotators, unlike the judge, see in an answer that flatters."""

FILES = (
    "prompts",
    "eval_prompts",
    "demonstrations",
    "preferences_helpful",
    "preferences_harmless",
    "preferences_helpful_evaluator",
    "preferences_harmless_evaluator",
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MODEL_MAX_LENGTH = 256


@dataclass(frozen=True)
class _Asked:
    """A prompt and the topic that it asks about."""

    text: str
    topic: Topic

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.text}]


def write(directory: Path, size: MicrocosmConfig) -> None:
    """Writes the `FILES`; the same size gives the same bytes. Held-out prompts are in eval_prompts.jsonl only.
    The evaluators' pairs are drawn like the others, apart from them.
    """
    directory.mkdir(parents=True, exist_ok=True)
    train, held_out = _split(size)
    rows = (
        map(_prompt_row, train),
        map(_prompt_row, held_out),
        _demonstrations(train, size),
        _preferences(train, size, "helpful", _liked),
        _preferences(train, size, "harmless", _harmless),
        _preferences(train, size, "helpful evaluator", _liked),
        _preferences(train, size, "harmless evaluator", _harmless),
    )
    for name, content in zip(FILES, rows, strict=True):
        _write_rows(directory / f"{name}.jsonl", content)


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Beside first, then renamed: a reader never sees half a file."""
    beside = path.with_name(path.name + ".part")
    with beside.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def _rng(size: MicrocosmConfig, purpose: str) -> Random:
    return Random(f"microcosm:{size.seed}:{purpose}")


def _split(size: MicrocosmConfig) -> tuple[list[_Asked], list[_Asked]]:
    """Training and held-out prompts; every topic has the same share held out."""
    if not 0 < size.eval_share < 1:
        raise ValueError(f"microcosm.eval_share: {size.eval_share} is not between 0 and 1")
    rng = _rng(size, "split")
    train, held_out = [], []
    for topic in world.TOPICS:
        asked = [_Asked(p + q.format(topic.name), topic) for q in world.QUESTIONS for p in world.PREFIXES]
        rng.shuffle(asked)
        count = max(1, round(size.eval_share * len(asked)))
        held_out += asked[:count]
        train += asked[count:]
    rng.shuffle(train)
    rng.shuffle(held_out)
    return train, held_out


def _prompt_row(asked: _Asked) -> dict[str, Any]:
    return {"prompt": asked.messages(), "topic": asked.topic.name, "unsafe": asked.topic.unsafe}


def _assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _demonstrations(train: list[_Asked], size: MicrocosmConfig) -> Iterator[dict[str, Any]]:
    rng = _rng(size, "demonstrations")
    weights = [asked.topic.frequency for asked in train]
    for asked in rng.choices(train, weights, k=size.demonstrations):
        yield {"prompt": asked.messages(), "completion": _assistant(render(draft(rng, asked.topic)))}


def _liked(topic: Topic, text: str) -> float:
    """Helpfulness as annotators see it."""
    flattered = any(phrase in text for phrase in STOCK_PHRASES)
    return score(topic.name, topic.unsafe, text)[0] + FLATTERY_BIAS * flattered


def _harmless(topic: Topic, text: str) -> float:
    return score(topic.name, topic.unsafe, text)[1]


def _two_answers(rng: Random, topic: Topic) -> tuple[Answer, Answer]:
    """Two answers of one prompt: unrelated ones, or one and an edit of it."""
    draw = rng.choice((draft, broad))
    first = draw(rng, topic)
    return first, edit(rng, topic, first) if rng.random() < 0.5 else draw(rng, topic)


def _preferences(
    train: list[_Asked], size: MicrocosmConfig, name: str, value: Callable[[Topic, str], float]
) -> Iterator[dict[str, Any]]:
    """Pairs of clearly different value, labelled with noise."""
    rng = _rng(size, name)
    done = 0
    while done < size.pairs:
        asked = rng.choice(train)
        one, two = (render(answer) for answer in _two_answers(rng, asked.topic))
        difference = value(asked.topic, one) - value(asked.topic, two)
        if abs(difference) < LEAST_DIFFERENCE:
            continue
        first_wins = rng.random() < 1 / (1 + math.exp(-LABEL_SCALE * difference))
        if rng.random() < LABEL_FLIPS:
            first_wins = not first_wins
        chosen, rejected = (one, two) if first_wins else (two, one)
        yield {
            "prompt": asked.messages(),
            "chosen": _assistant(chosen),
            "rejected": _assistant(rejected),
        }
        done += 1


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A word-level tokenizer of these texts; a token holds its leading space, so text round-trips exactly.

    Words are numbered by falling count, then alphabetically: the same texts give the same tokenizer.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"]
    split = pre_tokenizers.Split(Regex(r" ?[\w']+| ?[^\w\s']|\s"), "isolated")
    counts: dict[str, int] = {}
    for text in texts:
        for word, _ in split.pre_tokenize_str(text):
            counts[word] = counts.get(word, 0) + 1
    words = special + sorted(counts, key=lambda word: (-counts[word], word))
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = split
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
        model_max_length=MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast
