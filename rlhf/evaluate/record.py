"""What a finished run leaves for its report, and the file that holds a policy's samples."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.evaluate.best_of import BestOf
from rlhf.evaluate.curve import Choice, Point
from rlhf.evaluate.samples import PolicySamples
from rlhf.evaluate.sources import RewardFacts


@dataclass(frozen=True)
class RunRecord:
    """All that `rlhf.evaluate.report` shows.

    `metrics` has one flat dict for each alignment step, with these keys (NAME is a reward model; a key that
    is missing is not drawn, and what is not finite is left out): step; kl, nats a response; kl_coef; loss; grad_norm;
    learning_rate; reward/NAME/mean and reward/NAME/std, raw; r_ref/NAME, nats; utility/NAME and utility/combined,
    nats; p_good/NAME, probability; slope/NAME, d combined utility / d raw reward; response_tokens;
    finished, share; skipped, 1 where the optimiser's step was left out because a loss or the gradient was not finite;
    absent/NAME, share of responses that the reward does not apply to; staleness, versions; seconds, wall time of the
    step; seconds/generate, seconds/reward, seconds/learn, seconds/publish, summed over processes.

    `baseline` has for each reward model a few example prompts: "prompts", k contents; "samples" [k, m],
    rewards of base responses, NaN where there are fewer; "r_ref" [k]; "aligned" [k, n], rewards of aligned responses.
    """

    title: str
    config: str  # the resolved configuration, YAML
    versions: Mapping[str, str]
    seconds: Mapping[str, float]  # stage -> seconds, and "total"
    skipped: Sequence[str]  # stages whose output was there already
    metrics: Sequence[Mapping[str, float]]
    base: PolicySamples
    aligned: PolicySamples
    baseline: Mapping[str, Mapping[str, Any]]  # by reward model
    best_of: Sequence[BestOf] = ()  # best-of-n of the base samples, chosen by the utility that was maximised
    no_best_of: str = ""  # why there is none, if it was asked for
    busy: Mapping[str, Mapping[str, float]] = field(default_factory=dict)  # `rlhf.timeline.shares` of align
    points: Sequence[Point] = ()  # the policy while it was trained; none: it was evaluated at its end only
    choice: Choice | None = None  # which of these the aligned policy is
    stopped: str = ""  # why training ended early
    rewards: Sequence[RewardFacts] = ()
    notes: Sequence[str] = ()  # which faster ways models were too particular for, and why


_ARRAYS = ("prompt_ids", "lengths", "finished", "log_ratio")
_KEYED = ("rewards", "reference", "judged", "judge_reference", "evaluated", "evaluator_reference")
_TEXT = ("prompts", "meta", "texts")


def save_samples(path: Path, samples: PolicySamples) -> None:
    """Writes one NumPy archive, beside and then renamed: a reader sees the old file or the new one.

    Columns of `meta` that JSON cannot hold (dates, say) come back as text.
    """
    columns: dict[str, np.ndarray] = {name: np.asarray(getattr(samples, name)) for name in _ARRAYS}
    for group in _KEYED:
        columns |= {f"{group}/{name}": np.asarray(v) for name, v in getattr(samples, group).items()}
    text = json.dumps({name: getattr(samples, name) for name in _TEXT}, default=_plain, ensure_ascii=False)
    columns["text"] = np.frombuffer(text.encode(), np.uint8)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    with open(beside, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **columns)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load_samples(path: Path) -> PolicySamples:
    """Reads what `save_samples` wrote; a group that the file does not have, such as evaluators, is empty."""
    with np.load(path, allow_pickle=False) as archive:
        columns = {name: archive[name] for name in archive.files}
    text = json.loads(columns.pop("text").tobytes())
    keyed: dict[str, dict[str, np.ndarray]] = {group: {} for group in _KEYED}
    for name in [n for n in columns if "/" in n]:
        group, key = name.split("/", 1)
        keyed[group][key] = columns.pop(name)
    return PolicySamples(
        prompts=tuple(text["prompts"]),
        meta=tuple(text["meta"]),
        texts=tuple(tuple(row) for row in text["texts"]),
        prompt_ids=columns["prompt_ids"],
        lengths=columns["lengths"],
        finished=columns["finished"],
        log_ratio=columns["log_ratio"],
        **keyed,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return dict(value) if isinstance(value, Mapping) else str(value)
