"""Sequence classifiers, called on many conversations at once: the rewards of transformers, sooner."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.models import attention, conversations, probe
from rlhf.models.attempt import Failure, attempt
from rlhf.models.conversations import Row, ScoreBatch
from rlhf.models.last_layer import LastLayer
from rlhf.models.load import head_of, usable_positions
from rlhf.models.precision import cast
from rlhf.models.reach import Reach
from rlhf.models.trees import Tree
from rlhf.native.layers import fuse

log = logging.getLogger(__name__)

ROUNDING = 2e-6  # of float32 sums, relative: rewards may be large and nearly equal


class Classifier(torch.nn.Module):
    """A sequence classifier, whose rewards are those of transformers on each conversation alone: one of each, or one
    for each label where there are several.

    It takes the first of these ways that gives the same, tried on random tokens (`_choose_way`):

    - packed: conversations that begin alike share that beginning, and rows are filled (causal models that take a
      custom mask; conversations within a window, where layers look back no further);
    - padded, where body and head can be called apart: the head reads one token of each conversation;
    - padded, as the model does it;
    - one by one.

    Where body and head are called apart, a conversation ends with the token that the head reads (`read`): the tokens
    after it, which no earlier one sees, are left out. Neither way then needs a padding token.

    Args:
        way: of our attention (`rlhf/models/attention.py`); None: that of the model's device.
    """

    def __init__(self, model: PreTrainedModel, way: str | None = None) -> None:
        super().__init__()
        self.inner = model
        self.labels = int(model.config.num_labels)
        text = model.config.get_text_config()
        self.pad: int | None = getattr(text, "pad_token_id", None)
        self.reach = Reach.of(model.config)
        self.packs = self.apart = self.pads = self.skips_padding = False
        self.last: LastLayer | None = None
        self.notes: list[str] = []  # what to tell of how it is called
        _choose_way(self, way)

    def read(self, row: Row) -> np.ndarray:
        """The tokens up to the one whose state is the reward: the last whose id is not the padding token's, however
        it got there (the first of a conversation of nothing else); without a padding token, the last."""
        tokens = np.asarray(row, np.int32)
        if not self.skips_padding or tokens[-1] != self.pad:
            return tokens
        kept = np.flatnonzero(tokens != self.pad)
        return tokens[: kept[-1] + 1 if len(kept) else 1]

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        last: torch.Tensor | None = None,
        trees: Sequence[Tree] | None = None,
    ) -> torch.Tensor:
        """Rewards: of the conversations that end at the flat positions `last`, or of each row, padded on the right;
        [rows], of several labels [rows, labels]."""
        if not self.apart:
            logits = self.inner(input_ids=input_ids, attention_mask=attention_mask).logits
            return logits.squeeze(-1) if self.labels == 1 else logits
        if last is None:
            body: Any = self.inner.base_model
            states = body(
                input_ids=input_ids, attention_mask=attention_mask, use_cache=False
            ).last_hidden_state
            rows, width = input_ids.shape
            last = torch.arange(rows, device=input_ids.device) * width + attention_mask.sum(-1) - 1
        else:
            assert trees is not None
            assert self.last is not None
            states = self.last.states(
                last,
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                trees=trees,
            )
        head: Any = self.inner.score
        logits = head(states.flatten(0, 1)[last].to(head.weight.dtype))
        return logits.squeeze(-1) if self.labels == 1 else logits

    @torch.no_grad()
    def compute_in(self, dtype: torch.dtype) -> None:
        """Casts the model; the head stays float32 where the body is called apart, for rewards finer than bfloat16's.

        Raises:
            ValueError: the model cannot be computed in this format.
        """
        cast(self.inner, dtype)
        if self.apart:
            self.inner.score.float()
        like = next(self.parameters())
        ids = torch.ones(1, 2, dtype=torch.long, device=like.device)
        found = attempt(lambda: self(input_ids=ids, attention_mask=torch.ones_like(ids)))
        if isinstance(found, Failure):
            raise ValueError(
                f"reward model ({_name(self.inner)}): its own forward pass fails in "
                f"{str(dtype).removeprefix('torch.')}: {found.reason}; give another model or dtype"
            )


def score_rows(
    model: torch.nn.Module, classifier: Classifier, rows: Sequence[Row], kin: Sequence[int], budget: int
) -> torch.Tensor:
    """Rewards of token rows, float32 [rows], of several labels [rows, labels], in batches of at most `budget` tokens
    (one conversation at least).

    `model` is what is called: the classifier itself, or an engine around it. Neighbours of one `kin` begin alike.
    """
    if not rows:
        return torch.empty(0) if classifier.labels == 1 else torch.empty(0, classifier.labels)
    parts, order = [], []
    for batch in batches(classifier, rows, kin, budget):
        parts.append(batch.scores(model, next(classifier.parameters())))
        order += batch.rows
    return torch.cat(parts)[torch.tensor(order).argsort()]


def batches(classifier: Classifier, rows: Sequence[Row], kin: Sequence[int], budget: int) -> list[ScoreBatch]:
    """Token rows as batches; neighbours of one kin share their beginning, if the classifier packs."""
    read = [classifier.read(row) for row in rows]
    found = []
    for part, near in classifier.reach.parts([len(row) for row in read]):
        if near and classifier.packs:
            found += conversations.packed(read, part, kin, budget)
        else:
            several = classifier.apart or classifier.pads
            found += conversations.padded(read, part, classifier.pad, budget if several else None)
    return found


def one_batch(classifier: Classifier, rows: Sequence[Row], kin: Sequence[int]) -> ScoreBatch:
    """All token rows in one call of the model, in their order, for callers who must know the number of calls: packed
    where every row can be, else padded. For classifiers that take more than one row at a time."""
    assert classifier.apart or classifier.pads
    read, every = [classifier.read(row) for row in rows], range(len(rows))
    near = classifier.packs and bool(classifier.reach.within(np.array([len(row) for row in read])).all())
    if not near:
        return conversations.padded_batch(read, every, classifier.pad)
    (batch,) = conversations.packed(read, every, kin, sum(map(len, read)))
    return batch


@torch.no_grad()
def _choose_way(c: Classifier, attending: str | None, tolerance: float = 1e-3) -> None:
    """Finds how the classifier is called, by the rewards of random conversations: those of a way that is taken differ
    from the model's own, of each conversation alone, by at most `tolerance` of their standard deviation, and rounding.

    Raises:
        ValueError: the model's own rewards are not finite, or differ from call to call.
    """
    model, direct = c.inner, isinstance(getattr(c.inner, "score", None), torch.nn.Linear)
    rows, kin = _trial(c, direct)
    device, name = next(model.parameters()).device, _name(model)
    singles = [torch.as_tensor(row[None], dtype=torch.long, device=device) for row in rows]

    def plain() -> torch.Tensor:
        every = [model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for ids in singles]
        own = torch.cat([logits.view(1, -1).float() for logits in every])
        return own.squeeze(-1) if c.labels == 1 else own

    with _random_head(model):
        own = attempt(plain)
        if isinstance(own, Failure):
            raise ValueError(
                f"reward model ({name}): its own forward pass fails: {own.reason}; give another model"
            )
        if not own.isfinite().all():
            raise ValueError(f"{name}: rewards of random tokens are {own.tolist()}; check its weights")

        def same() -> bool:
            found = score_rows(c, c, rows, kin, sum(map(len, rows)) // 2)
            return bool((found - own).abs().max() <= tolerance * own.std() + ROUNDING * own.abs().max())

        fuse(model)
        if direct:
            c.last = LastLayer(model.base_model)
            c.apart, c.skips_padding = True, c.pad is not None
            if not same():
                c.skips_padding = False
                c.apart = same()
        reason = "its head does not read one token alone"
        if c.apart:
            with attention.tried(model, attending) as trial:
                c.packs = trial.possible and c.reach.picks is None
                trial.kept = c.packs and same()
            c.packs = trial.kept
            reason = "packed they get other rewards" if trial.possible else "its attention cannot be replaced"
        elif c.pad is not None and not model.config.is_encoder_decoder:  # those compare the rows of a batch
            c.pads = True
            c.pads = same()
        if not same():
            raise ValueError(f"{name}: rewards of the same text differ from call to call")
    if not c.packs:
        way = "are padded" if c.apart or c.pads else "are scored one by one"
        c.notes.append(f"{name}: conversations {way}, as {reason}")
        log.warning(c.notes[-1])


def _name(model: PreTrainedModel) -> str:
    return f"{type(model).__name__} {model.name_or_path}".strip()


def _trial(c: Classifier, direct: bool) -> tuple[list[np.ndarray], list[int]]:
    """Random conversations, several to a prompt, within the window: of all lengths, and with padding tokens in the
    middle, at the end and alone, where the head reads one token. Others end with the end token, as real ones do."""
    text = c.inner.config.get_text_config()
    room = min(probe.room(c.reach), usable_positions(c.inner) or probe.SHORT)
    rng, vocabulary = np.random.default_rng(0), getattr(text, "vocab_size", 256)  # without one: characters
    prompts = [rng.integers(vocabulary, size=max(1, n)) for n in (room // 3, 1 if direct else room // 2)]
    lengths = (1, room // 2, room // 4, room // 2) if direct else (room // 4, room // 2, room // 3)
    rows, kin = [], []
    for i, prompt in enumerate(prompts):
        for n in lengths:
            rows.append(np.concatenate([prompt, rng.integers(vocabulary, size=max(1, n))]))
            kin.append(i)
    if c.pad is not None:
        for row in rows:
            row[row == c.pad] = (c.pad + 1) % vocabulary
    end = getattr(text, "eos_token_id", None)
    if not direct and isinstance(end, int):
        rows = [np.append(row[:-1], end) for row in rows]
    if direct and c.pad is not None and c.pad >= 0:
        rows[1][-1:], rows[3][-3:], rows[5][-3], rows[7][:] = c.pad, c.pad, c.pad, c.pad
    return rows, kin


@contextmanager
def _random_head(model: PreTrainedModel) -> Iterator[None]:
    """A new head scores all 0, which proves nothing."""
    weights = [] if (head := head_of(model)) is None else [head.weight]
    kept = [weight.clone() for weight in weights]
    for weight in weights:
        weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)))
    try:
        yield
    finally:
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)
