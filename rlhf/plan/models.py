"""The models of a run, by their configurations: sizes of weights, and what passes through them take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from rlhf.config import LoraConfig
from rlhf.learn.batching import TokenBatch
from rlhf.learn.recompute import _again, recomputable
from rlhf.models.lora import with_adapter
from rlhf.plan.live import Live
from rlhf.plan.outlines import (
    META,
    OutlinedLayer,
    OutlinedPolicy,
    computes_as_ours,
    planned_attention,
    to_meta,
)


@dataclass(frozen=True)
class Sizes:
    """Numbers of parameters."""

    every: int
    linear: int  # of linear layers whose weight is theirs alone
    tied: int  # of a head whose weight is the embedding's
    widest: int  # of the largest linear layer whose weight is its alone

    @classmethod
    def of(cls, model: torch.nn.Module) -> Sizes:
        owners: dict[int, int] = {}
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                owners[id(parameter)] = owners.get(id(parameter), 0) + 1
        linear = [m.weight for m in model.modules() if type(m) is torch.nn.Linear]
        return cls(
            sum(p.numel() for p in model.parameters()),
            sum(w.numel() for w in linear if owners[id(w)] == 1),
            sum(w.numel() for w in linear if owners[id(w)] > 1),
            max((w.numel() for w in linear if owners[id(w)] == 1), default=0),
        )

    @property
    def rest(self) -> int:
        return self.every - self.linear


class Outline:
    """A model on the meta device.

    Args:
        config: transformers' configuration of it.
        auto: transformers' class that makes one of it.
    """

    def __init__(self, config: Any, auto: Any, dtype: torch.dtype, lora: LoraConfig | None = None) -> None:
        with META:
            model = auto.from_config(config)
        self.plain, self.config, self.dtype = model.eval(), config, dtype
        self.sizes = Sizes.of(model)
        computes_as_ours(model, dtype)
        self.model = model if lora is None else with_adapter(model, lora, seed=0)
        if lora is not None:
            for parameter in self.model.parameters():
                parameter.data = parameter.data.to(dtype)

    @cached_property
    def trained(self) -> int:
        """Parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def training_peak(self, batches: Sequence[TokenBatch], recompute: bool) -> int:
        """Bytes, at most, of activations and of gradients of what is trained, over a step of these micro-batches."""
        policy = OutlinedPolicy(self.model)
        if recompute:
            for layer in recomputable(policy):
                layer.forward = partial(_again, layer.forward)
        with planned_attention(), Live() as live:
            live.leave_out(policy)
            for batch in batches:
                policy.logprobs(batch, 1.0).sum().backward()
        for parameter in policy.parameters():
            parameter.grad = None
        return live.peak

    @torch.no_grad()
    def inference_peak(self, batch: TokenBatch, rows: str = "all") -> int:
        """Bytes of activations of a pass without gradient, to the last hidden states.

        Args:
            rows: whose states are needed: "all", or those that "predict" a response token.
        """
        last = OutlinedLayer(self.plain.base_model)
        given = {name: to_meta(value) for name, value in batch.inputs(torch.empty(0, device=META)).items()}
        needed = None
        if rows == "predict":
            needed = torch.empty(len(batch.predict.unique()), dtype=torch.long, device=META)
        with planned_attention(), Live() as live:
            live.leave_out(self.plain)
            last.states(needed, **given)
        return live.peak

    @property
    def kept_per_token(self) -> int:
        """Numbers that a cache has of a token: keys and values of every layer."""
        text = self.config.get_text_config()
        heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        return 2 * text.num_hidden_layers * heads * width

    @property
    def vocabulary(self) -> int:
        return int(self.config.get_text_config().vocab_size)
