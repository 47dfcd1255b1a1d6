"""What a model's configuration says of lengths: how far a token looks back, and where the model computes otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WINDOWS = {  # keys of configurations, and the kind of layer whose tokens look back so far
    "sliding_window": "sliding",
    "sliding_window_size": "sliding",
    "attention_window_size": "sliding",
    "window_size": "sliding",
    "local_attention": "sliding",
    "attention_chunk_size": "chunked",
}
SCANS = ("chunk_size", "mamba_chunk_size")
"""Keys that name the tokens which a recurrent layer takes at a time."""
BEGINNINGS = ("original_max_position_embeddings", "floor_scale", "log_scaling_n_floor")
"""Keys that name a position from which queries or rotary frequencies are scaled."""
LIMITS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len")


@dataclass(frozen=True)
class Reach:
    """Of a model, in tokens; None: there is no such length.

    Sequences within `window` see all their tokens. Sequences on one side of `switch` are computed alike; of a call the
    longest decides, so both kinds never share one. `beginnings` are positions from which something else is computed,
    by each token's own position; recurrent layers take sequences longer than a `scan` in parts. Of more tokens than
    `picks`, an index of the model's own picks those that are seen, from all of a call's: such calls are never packed.
    """

    window: int | None = None
    switch: int | None = None
    limit: int | None = None
    beginnings: tuple[int, ...] = ()
    scan: int | None = None
    picks: int | None = None

    @classmethod
    def of(cls, config: PretrainedConfig) -> Reach:
        text = config.get_text_config()
        ropes = list(_ropes(text))
        switches = [r.get("original_max_position_embeddings") for r in ropes if _kind(r) == "longrope"]
        found = [getattr(text, key, None) for key in BEGINNINGS]
        found += [rope.get(key) for rope in ropes for key in BEGINNINGS]
        return cls(
            attention_window(config),
            min((int(n) for n in switches if n), default=None),
            max_positions(config),
            tuple(sorted({int(n) for n in found if n})),
            _least(*(n for key in SCANS for n in by_layer(text, key) if isinstance(n, int) and n > 0)),
            getattr(text, "index_topk", None),
        )

    def narrowed(self, other: Reach) -> Reach:
        """Of two models that are called with the same batches."""
        return Reach(
            _least(self.window, other.window),
            _least(self.switch, other.switch),
            _least(self.limit, other.limit),
            tuple(sorted({*self.beginnings, *other.beginnings})),
            _least(self.scan, other.scan),
            _least(self.picks, other.picks),
        )

    def within(self, lengths: np.ndarray) -> np.ndarray:
        """Which sequences see all their tokens, bool."""
        return np.ones(len(lengths), bool) if self.window is None else lengths <= self.window

    def switched(self, lengths: np.ndarray) -> np.ndarray:
        """Which sequences are on the far side of `switch`, bool."""
        return np.zeros(len(lengths), bool) if self.switch is None else lengths > self.switch

    def parts(self, lengths: Sequence[int]) -> list[tuple[list[int], bool]]:
        """Sequences that may share calls, by their places in order, and whether they see all their tokens."""
        every = np.asarray(lengths, np.int64)
        within, switched = self.within(every), self.switched(every)
        found = []
        for see_all in (True, False):
            for side in (False, True):
                places = np.flatnonzero((within == see_all) & (switched == side))
                if len(places):
                    found.append((places.tolist(), see_all))
        return found

    def fault(self, prompt: int, new: int) -> str | None:
        """Why a prompt of so many tokens cannot get `new` tokens of response; None: it can."""
        if prompt == 0:
            return "a prompt of no tokens gives the policy nothing to begin with"
        asked = f"a prompt of {prompt} tokens and rollout.max_new_tokens={new}"
        if self.limit is not None and prompt + new > self.limit:
            return f"{asked} exceed the policy's {self.limit} positions"
        if self.switch is not None and prompt <= self.switch < prompt + new:
            return (
                f"{asked} cross {self.switch} tokens, where the policy's rotary frequencies (longrope) change for all "
                "tokens before"
            )
        return None


def attention_window(config: PretrainedConfig) -> int | None:
    """The tokens that the model's narrowest layer looks back on, itself included; None: all."""
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None) or getattr(text, "attention_layers", None)

    def used(kind: str) -> bool:
        return kinds is None or any(k.startswith((kind, "local")) for k in kinds)

    spans = [n for key, kind in WINDOWS.items() if used(kind) for n in by_layer(text, key)]
    return min((n for n in spans if isinstance(n, int) and n > 0), default=None)


def max_positions(config: PretrainedConfig) -> int | None:
    """The longest sequence a model takes, if its configuration says."""
    text = config.get_text_config()
    found = (getattr(text, key, None) for key in LIMITS)
    return next((int(n) for n in found if n is not None and n > 0), None)  # XLNet says -1


def by_layer(text: Any, key: str) -> list[Any]:
    """The values of a key: one, or one for each layer where layers differ (Gemma 4)."""
    layers = text.per_layer_config if getattr(text, "is_heterogeneous", False) else [text]
    return [getattr(layer, key, None) for layer in layers]


def _ropes(text: Any) -> Iterator[dict]:
    """The rotary parameters of a configuration: one set, or one for each kind of layer."""
    given = getattr(text, "rope_parameters", None) or {}
    yield from [v for v in given.values() if isinstance(v, dict)] or ([given] if given else [])


def _kind(rope: dict) -> str:
    return str(rope.get("rope_type", rope.get("type", "default")))


def _least(*numbers: int | None) -> int | None:
    return min((n for n in numbers if n is not None), default=None)
