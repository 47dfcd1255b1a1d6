"""A sequence classifier that runs here: given, or trained here on preferences. One with several labels gives several
rewards (heads) for one forward pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf.config import TrainingConfig
from rlhf.config_numbers import POSITIVE, Range
from rlhf.sources.source import COMMON_RANGES, Batch, Place, RewardSource, Rows, Source
from rlhf.utility.scales import BRADLEY_TERRY, check_scale

if TYPE_CHECKING:
    from rlhf.types import Prompt


@dataclass(kw_only=True)
class ClassifierSource(Source):
    path: str | None  # a finished sequence classifier: not trained
    init_from: str | None  # the model that training starts from; null: the base policy
    preferences: Any  # pairs to train on, as data.prompts; null: the microcosm's, by the source's name
    chat_template: str | None
    training: TrainingConfig | None  # null only where path is given
    heads: dict[str, Any] | None  # reward -> label of the classifier (number or name); null: its only one
    held_out: (
        float  # share of the preferences that is not trained on: the model is measured and calibrated by it
    )
    evaluations: int  # on held-out pairs while it is trained; the best step's model is kept

    ranges: ClassVar[Mapping[str, Range]] = {
        **COMMON_RANGES,
        "held_out": Range(0, 0.5),
        "evaluations": POSITIVE,
    }
    data_keys: ClassVar[tuple[str, ...]] = ("preferences", "calibration")
    uses_device: ClassVar[bool] = True

    def names(self, name: str) -> dict[str, Source]:
        if not self.heads:
            return {name: self}
        found: dict[str, Source] = {}
        for head, given in self.heads.items():
            own = dict(given) if isinstance(given, Mapping) else {"label": given}
            label = own.pop("label", None)
            found[head] = replace(self, heads={head: label}, **own)
        return found

    def trains(self) -> bool:
        return self.path is None

    @property
    def label(self) -> Any:
        """Of the classifier: the reward of one of `names`. None: its only one."""
        return None if not self.heads else next(iter(self.heads.values()))

    def check(self, key: str) -> None:
        if self.trains() and self.training is None:
            raise ValueError(f"give {key}.path (a finished model) or {key}.training")
        if self.trains() and self.heads:
            raise ValueError(
                f"{key}.heads needs {key}.path: a model that is trained here has one label; set {key}.heads=null"
            )
        if self.trains() and self.scale != BRADLEY_TERRY:
            raise ValueError(
                f"{key}.scale={self.scale}: a model that is trained here on preferences is of scale=bradley_terry; "
                f"give {key}.path for another"
            )
        if self.trains() and self.calibration is not None:
            raise ValueError(
                f"{key}.calibration is for a given model ({key}.path); one that is trained here is calibrated on "
                f"{key}.held_out of its preferences"
            )
        if self.heads is not None:
            self._check_heads(key)
            for head, own in self.names("").items():
                check_scale(f"{key}.heads.{head}", own)
        else:
            super().check(key)

    def _check_heads(self, key: str) -> None:
        """Raises ValueError for what is no label or no setting of a head."""
        assert self.heads is not None
        if not self.heads:
            raise ValueError(f"{key}.heads is empty: give names and labels, or null for the only label")
        allowed = {f.name for f in fields(Source)} - {"kind"}
        for head, given in self.heads.items():
            own = dict(given) if isinstance(given, Mapping) else {"label": given}
            label = own.pop("label", None)
            if isinstance(label, bool) or not isinstance(label, int | str):
                raise ValueError(
                    f"{key}.heads.{head}={given!r} must be a label of the classifier, its number or its name (or "
                    "{label: ..., weight: ...})"
                )
            unknown = sorted(own.keys() - allowed)
            if unknown:
                raise ValueError(
                    f"{key}.heads.{head}.{unknown[0]} is unknown; a head takes label, {', '.join(sorted(allowed))}"
                )

    def identity(self) -> Any:
        from rlhf.store import source_fingerprint

        assert self.path is not None
        return (source_fingerprint(self.path), self.chat_template, self.label)

    def preflight(self, key: str, prompts: Sequence[Prompt]) -> None:
        """The model's configuration and tokenizer, and that every prompt leaves it room for a response, of one word at
        least."""
        from rlhf.data.chat import ChatFormat
        from rlhf.data.rows import at
        from rlhf.models.load import labels_of, load_tokenizer, reward_config, start_config
        from rlhf.models.reach import max_positions

        path, key_of_path = (self.path, f"{key}.path") if self.path else (self.init_from, f"{key}.init_from")
        if path is None:
            return
        if self.path is None:
            found = start_config(path, key_of_path)
        else:
            found = reward_config(path, key_of_path, single=not self.heads)
            labels_of(found, f"{key}.heads", path, self.heads)
        name = key.rsplit(".", 1)[1]
        chat = ChatFormat(load_tokenizer(path, key_of_path), f"reward model '{name}'", self.chat_template)
        limit = max_positions(found)
        for prompt in prompts:
            with at(prompt.source):
                tokens = len(chat.conversation_tokens(prompt.content, "A"))
            if limit is not None and tokens > limit:
                raise ValueError(
                    f"{prompt.source}: the prompt and a response of one word are {tokens} tokens, but the reward "
                    f"model {key_of_path}={path} takes {limit}; shorten or remove the row, or give another model"
                )
        chat.check_table(found, [p.content for p in prompts])

    def open(self, name: str, place: Place) -> RewardSource:
        path = self.path or place.path
        assert path is not None
        return ClassifierRewards(name, path, self, place)


class ClassifierRewards:
    """An open classifier. Rewards are those of transformers for each conversation alone."""

    alone = True  # the CPUs given are for one call

    def __init__(self, name: str, path: str, settings: ClassifierSource, place: Place) -> None:
        from rlhf.models.reward import RewardScorer

        self._scorer = RewardScorer(
            name, path, settings.chat_template, place.budget, place.device, place.dtype, heads=settings.heads
        )
        self.notes = self._scorer.classifier.notes

    def score(self, batch: Batch) -> Rows:
        return self._scorer.score_heads(batch.prompts, batch.responses).T
