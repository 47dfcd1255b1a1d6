"""The critic of PPO: a value for every position of a response, and its loss."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from rlhf.learn.batching import TokenBatch
from rlhf.models.attention import is_ours
from rlhf.models.last_layer import LastLayer
from rlhf.models.trees import Tree
from rlhf.native.layers import fuse


class ValueModel(torch.nn.Module):
    """A sequence classifier with one label, read at every position: V(prompt, response so far).

    A new head is 0, so the first values are 0.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inner = model
        fuse(model)
        self._last = LastLayer(model.base_model)

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        predict: torch.Tensor | None = None,
        trees: Sequence[Tree] | None = None,
    ) -> torch.Tensor:
        """Values at the flat positions `predict`, [N], or at all, [rows * width]."""
        assert trees is None or is_ours(self.inner)
        given = {} if trees is None else {"trees": trees}
        needed = None if trees is None or predict is None else predict.unique()
        states = self._last.states(
            needed, input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **given
        ).flatten(0, 1)
        return self.inner.score(states if predict is None else states[predict]).squeeze(-1)


def token_values(model: torch.nn.Module, batch: TokenBatch) -> torch.Tensor:
    """The value of the state before each response token of the batch, float32 [N]."""
    like = next(model.parameters())
    return model(**batch.inputs(like), predict=batch.predict.to(like.device)).float()


def value_loss(
    values: torch.Tensor, old: torch.Tensor, returns: torch.Tensor, clip: float | None, tokens: float
) -> torch.Tensor:
    """Half the squared error of the returns, mean over a batch of `tokens` tokens.

    With `clip`, the greater of the error and that of the value kept within `clip` of the old one (as in the code of
    arXiv 1707.06347).

    Args:
        values: float32 [N], with gradient. old: float32 [N], before the batch. returns: float32 [N].
    """
    error = (values - returns) ** 2
    if clip is not None:
        error = torch.maximum(error, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    return error.sum() / (2 * tokens)
