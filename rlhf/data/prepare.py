"""The data of a run: the microcosm's, written on first use, or the user's own."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config import Config
from rlhf.data.microcosm import FILES as MICROCOSM_FILES
from rlhf.data.microcosm import write
from rlhf.data.prompts import load_prompts
from rlhf.data.rows import Source, named, sources
from rlhf.models.reach import Reach
from rlhf.store import Store, fingerprint
from rlhf.types import Prompt

LARGEST = float(np.finfo(np.float32).max)

Sources = tuple[str, ...]


@dataclass(frozen=True)
class RunData:
    """What the stages read. Prompts are in memory; demonstrations and preferences are files and names to load
    from, patterns resolved."""

    prompts: list[Prompt]
    eval_prompts: list[Prompt]
    demonstrations: Sources | None
    preferences: dict[str, Sources | None]  # by reward model
    evaluator_preferences: dict[str, Sources | None]  # by evaluator: other pairs

    def column(self, name: str | None, prompts: Sequence[Prompt] | None = None) -> list[tuple[int, float]]:
        """The ids of these prompts (default: all) with their values of a column of numbers, or of text that
        spells numbers, as CSV has it.

        Raises:
            ValueError: a prompt has no number there that float32 can hold; it names the row.
        """
        assert name is not None
        found = []
        for prompt in [*self.prompts, *self.eval_prompts] if prompts is None else prompts:
            number = _number(prompt.meta.get(name))
            if not abs(number) <= LARGEST:
                raise ValueError(
                    f"{prompt.source}: the column '{name}' holds {prompt.meta.get(name)!r:.80}, not a finite number; "
                    "it is asked for as r_ref by a reward model's reference=column"
                )
            found.append((prompt.id, number))
        return found

    def columns(self) -> dict[int, Mapping[str, Any]]:
        """Of each prompt, by its id, the other columns of its row."""
        return {p.id: p.meta for p in [*self.prompts, *self.eval_prompts]}

    def columns_fingerprint(self) -> str:
        """Of the prompts with all that stands beside them."""
        rows = sorted((number, repr(sorted(meta.items()))) for number, meta in self.columns().items())
        return fingerprint(rows)

    def prompts_fingerprint(self) -> str:
        return fingerprint([p.id for p in self.prompts], [p.id for p in self.eval_prompts])


def _number(value: Any) -> float:
    """NaN for what is none."""
    try:
        return math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return math.nan
    except OverflowError:
        return math.inf


def prepare(config: Config, store: Store) -> RunData:
    """Loads the prompts and names the sources of the rest.

    Raises:
        ValueError: a file is missing, empty or malformed; it names the file and line, and what to do.
    """
    data = config.data
    given, apart = (
        {name: _sources(source.preferences) for name, source in group.items() if source.trains()}
        for group in (config.reward_models, config.evaluators)
    )
    demonstrations = _sources(data.demonstrations)
    if data.microcosm is None:
        loaded = [] if data.prompts is None else load_prompts(data.prompts)  # none: of a server
        prompts, held_out = _split(config, loaded) if loaded else ([], [])
        preferences, evaluators = given, apart
    else:
        size = data.microcosm
        name = fingerprint(size, MICROCOSM_FILES)
        folder = store.folder("microcosm", name)
        if not store.has("microcosm", name):
            store.make("microcosm", name, lambda folder: write(folder, size))
        prompts = load_prompts(str(folder / "prompts.jsonl"))
        held_out = load_prompts(data.eval_prompts or str(folder / "eval_prompts.jsonl"))
        demonstrations = demonstrations or (str(folder / "demonstrations.jsonl"),)
        preferences = {n: path or _microcosm_pairs(folder, n) for n, path in given.items()}
        evaluators = {n: path or _microcosm_pairs(folder, f"{n}_evaluator") for n, path in apart.items()}
    train = prompts if data.train_size is None else prompts[: data.train_size]
    return RunData(train, held_out[: data.eval_size], demonstrations, preferences, evaluators)


def _sources(given: Source | None) -> Sources | None:
    return None if given is None else sources(given)


def _microcosm_pairs(folder: Path, model: str) -> Sources | None:
    path = folder / f"preferences_{model}.jsonl"
    return (str(path),) if path.exists() else None


def _split(config: Config, prompts: list[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """Training and evaluation prompts: given apart, or the last ones by prompt id (which looks random)."""
    data = config.data
    if data.eval_prompts is not None:
        held_out = load_prompts(data.eval_prompts)
        both = {p.id for p in prompts} & {p.id for p in held_out}
        if both:
            first = next(p for p in held_out if p.id in both)
            raise ValueError(
                f"data.eval_prompts: {len(both)} prompts are training prompts too, first {first.source}; leave them out"
            )
        return prompts, held_out
    if len(prompts) <= data.eval_size:
        raise ValueError(
            f"data.eval_size={data.eval_size} would hold out all of the {len(prompts)} prompts of "
            f"{named(data.prompts)}; lower it or give data.eval_prompts"
        )
    held_out_ids = {p.id for p in sorted(prompts, key=lambda p: p.id)[-data.eval_size :]}
    return [p for p in prompts if p.id not in held_out_ids], [p for p in prompts if p.id in held_out_ids]


def check_lengths(prompts: list[Prompt], tokens: list[int], max_new_tokens: int, reach: Reach) -> None:
    """Refuses prompts that leave the policy no room for a response.

    Raises:
        ValueError: names the row, its tokens, and the limit.
    """
    for prompt, length in zip(prompts, tokens, strict=True):
        fault = reach.fault(length, max_new_tokens)
        if fault is not None:
            raise ValueError(
                f"{prompt.source}: {fault}; shorten or remove the row, or lower rollout.max_new_tokens"
            )


def demonstrations_source(data: RunData) -> Sources:
    if data.demonstrations is None:
        raise ValueError("stage sft needs data.demonstrations, or a finished policy in policy.path")
    return data.demonstrations


def preferences_source(data: RunData, model: str) -> Sources:
    source = data.preferences[model]
    if source is None:
        raise ValueError(f"reward model '{model}' needs reward_models.{model}.preferences or .path")
    return source


def evaluator_source(data: RunData, name: str) -> Sources:
    source = data.evaluator_preferences[name]
    if source is None:
        raise ValueError(f"evaluator '{name}' needs evaluators.{name}.preferences or .path")
    return source
