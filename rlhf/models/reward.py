"""Scoring text with a reward model, under its own tokenizer and template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.data.chat import ChatFormat
from rlhf.learn.batching import TokenBatch, by_length, pack
from rlhf.models import attention
from rlhf.models.last_layer import LastLayer
from rlhf.models.load import load_reward_model, load_tokenizer
from rlhf.models.packed import pack as pack_layers
from rlhf.models.precision import cast, dtype_of
from rlhf.models.reach import attention_window, max_positions
from rlhf.models.trees import Tree
from rlhf.native.layers import fuse
from rlhf.types import Content, Ragged

Row = Sequence[int] | np.ndarray
"""The tokens of one conversation."""


class Classifier(torch.nn.Module):
    """A sequence classifier with one label, called on the conversations of one `TokenBatch` or one padded batch.

    Packed: conversations that begin alike share that beginning, rows are filled, and the head reads the last token
    of each. It is exact for causal models that take a custom mask; `packs` says whether this one is, and `window`
    how long a conversation may be, where layers look back no further.
    """

    def __init__(self, model: PreTrainedModel, pad: int | None) -> None:
        super().__init__()
        self.inner, self.pad = model, pad
        self.window = attention_window(model.config)
        fuse(model)
        self._last = LastLayer(model.base_model)
        self.packs = _try_packing(self, model.config.get_text_config().vocab_size)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        last: torch.Tensor | None = None,
        trees: Sequence[Tree] | None = None,
    ) -> torch.Tensor:
        """Rewards: of the conversations that end at the flat positions `last`, or of each row, padded on the right."""
        if not hasattr(self.inner, "score"):
            return self.inner(input_ids=input_ids, attention_mask=attention_mask).logits.squeeze(-1)
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        needed = last
        if last is None:
            ends = attention_mask.sum(-1) - 1
            last = torch.arange(len(ends), device=ends.device) * input_ids.shape[1] + ends
        else:
            assert trees is not None
            inputs |= {"position_ids": position_ids, "trees": trees}
        states = self._last.states(needed, **inputs)
        head = self.inner.score
        return head(states.flatten(0, 1)[last].to(head.weight.dtype)).squeeze(-1)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Casts the model; the head stays float32 where the body is called apart, for rewards finer than bfloat16's."""
        cast(self.inner, dtype)
        if self.packs:
            self.inner.score.float()


def score_rows(
    model: torch.nn.Module, classifier: Classifier, rows: Sequence[Row], kin: Sequence[int], budget: int
) -> torch.Tensor:
    """Rewards of token rows, float32 [rows], in batches of at most `budget` tokens (one conversation at least).

    `model` is what is called: the classifier itself, or an engine around it. Neighbours of one `kin` begin alike.
    """
    parts, order = [], []
    for batch in batches(classifier, rows, kin, budget):
        parts.append(batch.scores(model, next(classifier.parameters())))
        order += batch.rows
    return torch.cat(parts)[torch.tensor(order).argsort()]


@dataclass(frozen=True)
class ScoreBatch:
    """Conversations that are scored together: `rows[i]` is the i-th score's place among all."""

    rows: list[int]
    inputs: Callable[[torch.Tensor], dict[str, Any]]  # on the device of a tensor

    def scores(self, model: torch.nn.Module, like: torch.Tensor) -> torch.Tensor:
        return model(**self.inputs(like)).float()


def batches(classifier: Classifier, rows: Sequence[Row], kin: Sequence[int], budget: int) -> list[ScoreBatch]:
    """Token rows as batches; neighbours of one kin share their beginning, if the classifier packs."""
    fits = classifier.window is None or max(map(len, rows), default=0) <= classifier.window
    if classifier.packs and fits:
        shared, own, group = _split(rows, kin)
        packed = pack(shared, own, group, range(len(rows)), budget, ends=True)
        return [ScoreBatch(b.rows.tolist(), partial(_packed, b)) for b in packed]
    return [_padded(rows, chosen, classifier.pad) for chosen in _padded_rows(rows, classifier.pad, budget)]


def one_batch(classifier: Classifier, rows: Sequence[Row], kin: Sequence[int]) -> ScoreBatch:
    """All token rows as one call of the model, for callers who must know the number of calls."""
    longest = max(map(len, rows))
    if classifier.packs and (classifier.window is None or longest <= classifier.window):
        (batch,) = batches(classifier, rows, kin, len(rows) * longest)
        return batch
    return _padded(rows, list(range(len(rows))), classifier.pad)


def _packed(batch: TokenBatch, like: torch.Tensor) -> dict[str, Any]:
    assert batch.last is not None
    return batch.inputs(like) | {"last": batch.last.to(like.device)}


def _padded_rows(rows: Sequence[Row], pad: int | None, budget: int) -> list[list[int]]:
    """Without a padding token a classifier cannot find the last token of a padded row: then one by one."""
    return [[i] for i in range(len(rows))] if pad is None else by_length([len(r) for r in rows], budget)


def _padded(rows: Sequence[Row], chosen: list[int], pad: int | None) -> ScoreBatch:
    width = max(len(rows[i]) for i in chosen)
    ids = torch.full((len(chosen), width), 0 if pad is None else pad, dtype=torch.long)
    mask = torch.zeros(len(chosen), width, dtype=torch.long)
    for n, i in enumerate(chosen):
        ids[n, : len(rows[i])] = torch.as_tensor(np.asarray(rows[i], np.int64))
        mask[n, : len(rows[i])] = 1
    return ScoreBatch(
        chosen, lambda like: {"input_ids": ids.to(like.device), "attention_mask": mask.to(like.device)}
    )


def _split(rows: Sequence[Row], kin: Sequence[int]) -> tuple[Ragged, Ragged, np.ndarray]:
    """Each run of neighbours of one kin as their common beginning and what follows it, at least a token each."""
    arrays = [np.asarray(row, np.int32) for row in rows]
    shared: list[np.ndarray] = []
    group: list[int] = []
    for i, row in enumerate(arrays):
        common = _common(shared[-1], row[:-1]) if i and kin[i] == kin[i - 1] else 0
        if common:
            shared[-1] = shared[-1][:common]
        else:
            shared.append(row[:-1])
        group.append(len(shared) - 1)
    own = [row[len(shared[g]) :] for row, g in zip(arrays, group, strict=True)]
    return Ragged.of(shared, np.int32), Ragged.of(own, np.int32), np.array(group)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def packs(model: PreTrainedModel, pad: int | None) -> bool:
    """Whether the classifier takes packed conversations; its attention is then ours."""
    return Classifier(model, pad).packs


@torch.no_grad()
def _try_packing(classifier: Classifier, vocabulary: int, tolerance: float = 1e-3) -> bool:
    """Whether packed conversations get the rewards of single ones, tried on random tokens."""
    if not hasattr(classifier.inner, "score"):
        return False
    rng = np.random.default_rng(0)
    tokens = rng.integers(vocabulary, size=12)
    if classifier.pad is not None:
        tokens[tokens == classifier.pad] = (classifier.pad + 1) % vocabulary
    rows = [tokens[[0, 1, 2, 3, 4]], tokens[[0, 1, 2, 5]], tokens[[0, 1, 6, 7, 8, 9]], tokens[[10, 11]]]
    head = classifier.inner.score.weight
    kept = head.clone()
    head.copy_(torch.randn(head.shape, generator=torch.Generator().manual_seed(0)))  # a new head scores all 0
    try:
        single = [_padded(rows, [i], classifier.pad) for i in range(len(rows))]
        plain = torch.cat([one.scores(classifier, head) for one in single])
        with attention.tried(classifier.inner) as trial:
            classifier.packs = trial.possible
            packed = score_rows(classifier, classifier, rows, [0, 0, 0, 1], 64)
            trial.kept = trial.possible and bool(
                (packed - plain).abs().max() <= tolerance * plain.abs().max()
            )
    finally:
        head.copy_(kept)
    return trial.kept


class RewardScorer:
    """One reward model, ready to score responses.

    Guarantees a finite float32 reward for each response, or a ValueError that names the model and the sample.
    """

    def __init__(
        self,
        name: str,
        path: str,
        template: str | None = None,
        budget: int = 8192,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        key = f"reward_models.{name}.path"
        self.name, self.budget, self.device = name, budget, device
        model = load_reward_model(path, key).to(device)
        self.classifier = Classifier(model, model.config.pad_token_id)
        self.classifier.compute_in(dtype_of(dtype, device))
        pack_layers(model, budget, leave=getattr(model, "score", None))
        self.format = ChatFormat(load_tokenizer(path, key), f"reward model '{name}'", template)
        self.limit = max_positions(model.config)

    def score(self, contents: Sequence[Content], responses: Sequence[str]) -> np.ndarray:
        """Rewards of responses to their prompts, float32 [B]."""
        rows = [self.format.conversation_tokens(c, r) for c, r in zip(contents, responses, strict=True)]
        for row, content, response in zip(rows, contents, responses, strict=True):
            if self.limit is not None and len(row) > self.limit:
                raise ValueError(
                    f"reward model '{self.name}' takes {self.limit} tokens, but prompt and response have {len(row)}: "
                    f"prompt {_short(content)}, response {_short(response)}; lower rollout.max_new_tokens"
                )
        with torch.inference_mode():
            found = score_rows(self.classifier, self.classifier, rows, _kin(contents), self.budget)
        rewards = found.cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(rewards))
        if len(bad):
            i = int(bad[0])
            raise ValueError(
                f"reward model '{self.name}' returned {rewards[i]} for {len(bad)} of {len(rows)} responses, "
                f"first for prompt {_short(contents[i])}, response {_short(responses[i])}; check its weights"
            )
        return rewards


def _kin(contents: Sequence[Content]) -> list[int]:
    """A number for each run of equal prompts."""
    numbers: list[int] = []
    for i, content in enumerate(contents):
        same = i > 0 and (content is contents[i - 1] or content == contents[i - 1])
        numbers.append(numbers[-1] if same else i)
    return numbers


def _short(content: Content) -> str:
    text = content if isinstance(content, str) else content[-1]["content"]
    return repr(text if len(text) <= 80 else text[:77] + "...")
