"""The values that travel between the roles, columnar and numpy-backed.

Token-level columns are flat arrays with offsets (no padding), so that an object store maps them
without a copy. Shapes use: G prompts (groups), B = responses of all groups, M = reward models,
T = tokens of all responses together.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf.timeline import Span

Message = Mapping[str, Any]
"""One turn of a conversation: {"role": "system" | "developer" | "user" | "assistant" | "tool", "content": text}, and
whatever else templates read, as JSON can hold it: "tool_calls" (the content may then be None or absent), "name", ..."""

Content = str | Sequence[Message]
"""What a prompt says: plain text (TRL's standard format) or messages (its conversational format). The last message is
the user's or a tool's, or the assistant's own beginning of the response, in text."""

Response = str | Sequence[Message]
"""What follows a prompt: text, or turns that begin and end with the assistant's."""


def prompt_id(content: Content) -> int:
    """Stable 64-bit id of a prompt: the same content, with all keys of its messages, has the same id in every run
    and process.

    >>> prompt_id("hi") == prompt_id("hi") != prompt_id([{"role": "user", "content": "hi"}])
    True
    """
    if not isinstance(content, str):
        content = [dict(message) for message in content]
    canonical = json.dumps(content, ensure_ascii=False, sort_keys=True)
    return int.from_bytes(hashlib.blake2b(canonical.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True)
class Prompt:
    """One prompt of a dataset.

    `meta` holds the row's other columns (a topic, say): judges and reports may use them.
    `source` names where it came from ("prompts.jsonl:12"), for error messages.
    """

    content: Content
    meta: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""

    @property
    def id(self) -> int:
        return prompt_id(self.content)


@dataclass(frozen=True)
class Ragged:
    """Rows of different lengths in one flat array: row i is values[offsets[i]:offsets[i + 1]].

    >>> Ragged.of([[1, 2], [], [3]], np.int32)[2].tolist()
    [3]
    """

    values: np.ndarray  # [T]
    offsets: np.ndarray  # int64 [rows + 1]

    @classmethod
    def of(cls, rows: Sequence[Any], dtype: Any) -> Ragged:
        lengths = np.fromiter((len(r) for r in rows), np.int64, len(rows))
        values = np.concatenate([np.asarray(r, dtype) for r in rows]) if len(rows) else np.empty(0, dtype)
        return cls(
            values.astype(dtype, copy=False), np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)


@dataclass(frozen=True)
class WorkItem:
    """A unit of sampling: `samples` responses to each prompt. Equal items give equal rollouts from equal weights."""

    id: int
    prompts: tuple[Content, ...]
    samples: int
    seed: int

    @property
    def groups(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Rollouts:
    """Responses sampled from a policy, for the prompts of one work item.

    Invariant: the responses of prompt g are the rows b with group[b] == g, contiguous and in order.
    `logprobs` are the sampler's own, natural log, at `temperature`.
    """

    item: int
    version: int
    seed: int
    temperature: float
    prompts: tuple[Content, ...]  # [G]
    prompt_ids: np.ndarray  # uint64 [G]
    prompt_tokens: Ragged  # int32, G rows
    group: np.ndarray  # int32 [B], index into prompts
    tokens: Ragged  # int32, B rows: response tokens, with the end-of-sequence token if it was sampled
    logprobs: np.ndarray  # float32 [T], aligned with tokens.values
    versions: np.ndarray  # int32 [T], of the weights by which each token was sampled; `version` is the oldest
    finished: np.ndarray  # bool [B]: ended by the end-of-sequence token (else cut at the length limit)
    texts: tuple[str, ...]  # [B]: responses as text after their prompts, without the token that ended them
    seconds: float = 0.0  # wall time from the item's arrival at the generator to its last token

    @property
    def responses(self) -> int:
        return len(self.group)


@dataclass(frozen=True)
class Rewards:
    """What the reward pool says of one `Rollouts`: with it, an experience the learner can train on."""

    item: int
    version: int
    models: tuple[str, ...]  # [M] names, the order of the columns below
    weights: tuple[float, ...]  # [M], of the utilities in the combination
    raw: np.ndarray  # float32 [B, M], as sources give them; NaN, as the three below, where they do not apply
    reference: np.ndarray  # float32 [B, M]: r_ref of the response's prompt
    utility: np.ndarray  # float32 [B, M]: transformed reward, in nats for the log-probability transforms
    p_good: np.ndarray  # float32 [B, M]: P(good) by its scale (rlhf.utility.units); NaN of a scale without
    combined: np.ndarray  # float32 [B]: the utility that is maximised
    slope: np.ndarray  # float32 [B, M]: d combined / d raw, what one more unit of a reward is still worth
    seconds: float = 0.0  # wall time from the call to the last reward
    spans: tuple[Span, ...] = ()  # what the reward models did for it


@dataclass(frozen=True)
class Experience:
    """A `Rollouts` with its `Rewards`: what a policy-gradient objective consumes."""

    rollouts: Rollouts
    rewards: Rewards

    def __post_init__(self) -> None:
        assert self.rollouts.item == self.rewards.item, (self.rollouts.item, self.rewards.item)
        assert self.rollouts.version == self.rewards.version
        assert len(self.rewards.combined) == self.rollouts.responses
