"""A reward server: OpenRLHF's remote reward model, vLLM's /classify and /score, or a server of rewards of our own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf.config_numbers import NOT_NEGATIVE, POSITIVE, Range
from rlhf.data.rows import at
from rlhf.sources.answers import as_rewards, named
from rlhf.sources.client import Client, Request, told
from rlhf.sources.remote import RemoteSource
from rlhf.sources.source import Batch, Place, RewardSource, Rows
from rlhf.sources.text import Texts, given_text, spoken

if TYPE_CHECKING:
    from rlhf.types import Prompt

TEXT = ("openrlhf", "classify", "score")  # the protocols that send texts
PROTOCOLS = (*TEXT, "rlhf")
ONLY = {  # the keys that not every protocol has
    "model": ("classify", "score"),
    "labels_column": ("openrlhf",),
    "reward": ("rlhf",),
    "chat_template": TEXT,
}


@dataclass(kw_only=True)
class HttpSource(RemoteSource):
    """The settings of a reward server."""

    protocol: str | None  # openrlhf | classify | score | rlhf
    model: str | None  # as vLLM calls it; null: left out
    label: int  # of classify: the index in `probs`
    field: str  # of openrlhf: rewards | scores
    reward: str | None  # of rlhf: which of the server's rewards; null: the only one
    labels_column: str | None  # of the prompts' data set, sent as OpenRLHF's labels; null: empty texts
    chat_template: str | None  # for messages, of the protocols that send texts: a Jinja text, a file, or "hh"
    batch_size: int  # responses in one request

    ranges: ClassVar[Mapping[str, Range]] = {
        **RemoteSource.ranges,
        "label": NOT_NEGATIVE,
        "batch_size": POSITIVE,
    }

    def check(self, key: str) -> None:
        super().check(key)
        if self.protocol is None:
            raise ValueError(f"{key}.protocol is missing: give one of {', '.join(PROTOCOLS)}")
        if self.protocol not in PROTOCOLS:
            raise ValueError(f"{key}.protocol={self.protocol} is not one of {', '.join(PROTOCOLS)}")
        if self.field not in ("rewards", "scores"):
            raise ValueError(f"{key}.field={self.field} is not one of rewards, scores")
        for name, having in ONLY.items():
            if getattr(self, name) is not None and self.protocol not in having:
                raise ValueError(
                    f"{key}.{name} is for protocol={' or '.join(having)}, not {self.protocol}; set it to null"
                )
        if self.chat_template is not None:
            given_text(f"{key}.chat_template", self.chat_template)

    def identity(self) -> Any:
        template = self.chat_template and given_text("chat_template", self.chat_template)
        return super().identity() | {"chat_template": template}

    def preflight(self, key: str, prompts: Sequence[Prompt]) -> None:
        super().preflight(key, prompts)
        texts = Texts(key, f"{key}.chat_template", self.chat_template)
        for prompt in prompts:
            if self.protocol in TEXT:
                with at(prompt.source):
                    texts.prompt(prompt.content)
            if self.labels_column is not None and self.labels_column not in prompt.meta:
                raise ValueError(
                    f"{key}.labels_column={self.labels_column}: {prompt.source} has no such column"
                )

    def open(self, name: str, place: Place) -> RewardSource:
        return HttpRewards(self, Client(self.server(name)))


class HttpRewards:
    """Rewards that a server gives, in the order of the responses, whatever comes back first."""

    alone = False

    def __init__(self, settings: HttpSource, client: Client) -> None:
        self.notes: list[str] = []
        self.settings, self.client, self.who = settings, client, client.server.name
        self._texts = Texts(client.server.source, "chat_template", settings.chat_template)
        protocols: dict[str, tuple[Callable[[Batch], dict[str, Any]], Callable[[Batch, Any], Any]]] = {
            "openrlhf": (self._openrlhf, self._openrlhf_rewards),
            "classify": (self._classify, self._classify_rewards),
            "score": (self._score, self._score_rewards),
            "rlhf": (self._native, self._native_rewards),
        }
        assert settings.protocol is not None
        self._body, self._rewards = protocols[settings.protocol]

    def score(self, batch: Batch) -> Rows:
        size = self.settings.batch_size
        parts = [batch.part(range(i, min(i + size, len(batch)))) for i in range(0, len(batch), size)]
        return [[*itertools.chain(*self.client.ask([self._request(part) for part in parts]))]]

    def _request(self, part: Batch) -> Request[list[float | None]]:
        about = named(part, 0) if len(part) == 1 else f"{len(part)} responses, the first of {named(part, 0)}"
        return Request(
            self.settings.body(self._body(part)),
            about,
            lambda answer: as_rewards(self.who, self._rewards(part, answer), part),
        )

    # OpenRLHF: {"query": [text], "prompts": [text], "labels": [any]} -> {"rewards": [n], "scores": [n], ...}

    def _openrlhf(self, part: Batch) -> dict[str, Any]:
        prompts = [self._texts.prompt(prompt) for prompt in part.prompts]
        return {"query": self._wholes(part), "prompts": prompts, "labels": self._labels(part)}

    def _openrlhf_rewards(self, part: Batch, answer: Any) -> Any:
        return self._entry(answer, self.settings.field)

    def _labels(self, part: Batch) -> Sequence[Any]:
        column = self.settings.labels_column
        if column is None:
            return [""] * len(part)
        if column not in part.columns:
            raise ValueError(
                f"{self.who}: labels_column={column}: there is no such column beside {named(part, 0)}"
            )
        return part.columns[column]

    # vLLM: {"model": name, "input": [text]} -> {"data": [{"index": i, "probs": [p, ...]}]}

    def _classify(self, part: Batch) -> dict[str, Any]:
        return {"model": self.settings.model, "input": self._wholes(part)}

    def _classify_rewards(self, part: Batch, answer: Any) -> list[Any]:
        label, rewards = self.settings.label, []
        for row in self._by_index(answer, part):
            probs = self._entry(row, "probs")
            if not isinstance(probs, list) or len(probs) <= label:
                raise ValueError(f"{self.who} returned probs {told(probs)}: there is none of label={label}")
            rewards.append(probs[label])
        return rewards

    # vLLM: {"model": name, "text_1": [prompt], "text_2": [response]} -> {"data": [{"index": i, "score": s}]}

    def _score(self, part: Batch) -> dict[str, Any]:
        return {
            "model": self.settings.model,
            "text_1": [self._texts.asked(prompt) for prompt in part.prompts],
            "text_2": [r if isinstance(r, str) else spoken(r) for r in part.responses],
        }

    def _score_rewards(self, part: Batch, answer: Any) -> list[Any]:
        return [self._entry(row, "score") for row in self._by_index(answer, part)]

    # ours: {"conversations": [{"prompt": content, "responses": [response, ...], "columns": {name: value}}]}
    #    -> {"results": [{"raw": {reward: [number or null, ...]}}]}

    def _native(self, part: Batch) -> dict[str, Any]:
        return {
            "conversations": [
                {
                    "prompt": part.prompts[rows[0]],
                    "responses": [part.responses[i] for i in rows],
                    "columns": {name: values[rows[0]] for name, values in part.columns.items()},
                }
                for rows in _groups(part)
            ],
            "raw_only": True,
        }

    def _native_rewards(self, part: Batch, answer: Any) -> list[Any]:
        groups = _groups(part)
        results = self._list(answer, "results", len(groups), "prompts")
        rewards: list[Any] = []
        for rows, result in zip(groups, results, strict=True):
            raw = self._entry(result, "raw")
            name = self.settings.reward
            if name is None:
                if not isinstance(raw, dict) or len(raw) != 1:
                    names = ", ".join(raw) if isinstance(raw, dict) else told(raw)
                    raise ValueError(
                        f"{self.who} returned several rewards ({names}); set reward to one of them"
                    )
                (name,) = raw
            rewards += self._list(raw, name, len(rows), f"responses, the first of {named(part, rows[0])}")
        return rewards

    # what they share

    def _wholes(self, part: Batch) -> list[str]:
        return [self._texts.whole(p, r) for p, r in zip(part.prompts, part.responses, strict=True)]

    def _entry(self, answer: Any, name: str) -> Any:
        if not isinstance(answer, dict) or name not in answer:
            raise ValueError(
                f"{self.who} returned {told(answer)}: there is no {name!r}; is protocol={self.settings.protocol} what "
                "it speaks?"
            )
        return answer[name]

    def _list(self, answer: Any, name: str, length: int, of: str) -> list[Any]:
        rows = self._entry(answer, name)
        if not isinstance(rows, list) or len(rows) != length:
            count = f"{len(rows)} of {name!r}" if isinstance(rows, list) else f"{name!r} {told(rows)}"
            raise ValueError(f"{self.who} returned {count} for {length} {of}; it must return one for each")
        return rows

    def _by_index(self, answer: Any, part: Batch) -> list[Any]:
        """The entries of vLLM's "data" in the order of the responses."""
        rows = self._list(answer, "data", len(part), f"responses, the first of {named(part, 0)}")
        places = [self._entry(row, "index") for row in rows]
        if any(type(place) is not int for place in places) or sorted(places) != list(range(len(part))):
            raise ValueError(
                f"{self.who} returned the indices {told(places)}; they must be 0 to {len(part) - 1}"
            )
        return [row for _, row in sorted(zip(places, rows, strict=True), key=lambda pair: pair[0])]


def _groups(part: Batch) -> list[list[int]]:
    """The rows of each prompt: neighbours with the same prompt and the same columns."""
    groups: list[list[int]] = []
    for i in range(len(part)):
        columns = [values[i] for values in part.columns.values()]
        same = bool(groups) and part.prompts[i] == part.prompts[i - 1]
        if same and columns == [values[i - 1] for values in part.columns.values()]:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
