"""Log-probabilities of response tokens, without ever holding the logits of all of them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from rlhf.learn.batching import TokenBatch, layout
from rlhf.learn.chunks import computing, in_chunks
from rlhf.models import probe
from rlhf.models.attempt import Failure, attempt
from rlhf.models.attention import is_ours
from rlhf.models.last_layer import LastLayer
from rlhf.models.trees import Tree
from rlhf.native.layers import fuse

CHUNK = 2**24
"""Logits held at a time, float32: 64 MiB."""

log = logging.getLogger(__name__)


class PolicyModel(torch.nn.Module):
    """A causal language model, called for the log-probabilities of the response tokens of a `TokenBatch`.

    The head is called once, for the states that predict a response token, and computes `CHUNK` logits at a time; more
    than one chunk is computed again in the backward pass. A model whose logits are not its head's (`by_chunks` is
    False) is called for all logits.

    `lay` makes its batches. Its attention becomes ours, if it can. `notes` tell what it is too particular for.

    Args:
        inner: any transformers causal model, or a peft model around one.
        way: of our attention (`rlhf/models/attention.py`); None: that of the model's device.
    """

    def __init__(self, inner: Any, chunk: int = CHUNK, way: str | None = None) -> None:
        super().__init__()
        self.inner, self.chunk = inner, chunk
        plain = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        config = getattr(plain, "config", None)
        text = config.get_text_config() if config is not None else None
        self._cap = getattr(text, "final_logit_softcapping", None)
        self.lay, self.notes = layout(plain, way=way)
        fuse(plain)
        self._last = LastLayer(getattr(plain, "base_model", plain))
        self._vocabulary = 0
        fault = self._fault_of_the_head()
        self.by_chunks = fault is None
        if fault is not None:
            self.notes.append(f"policy ({type(plain).__name__}): the logits of all tokens are held: {fault}")
            log.warning(self.notes[-1])

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor | None = None,
        predict: torch.Tensor | None = None,
        targets: torch.Tensor | None = None,
        temperature: float = 1.0,
        entropy: bool = False,
        trees: Sequence[Tree] | None = None,
    ) -> torch.Tensor:
        """Log-probabilities float32 [1, N] of `targets` int64 [N] at the flat positions `predict` int64 [N], at the
        sampling temperature; if asked for, the entropies of their distributions, nats, are a second row.

        One tensor, and one call of each module: under ZeRO 3 every module call, and the gradient of every tensor that
        a module returns, is a collective, so neither may depend on how many tokens a rank has.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if trees is not None:
            assert is_ours(self._plain)
            inputs |= {"position_ids": position_ids, "trees": trees}
        if predict is None or targets is None:
            predict = targets = input_ids.new_zeros(1)
        if not self.by_chunks:
            logits = self.inner(**inputs, use_cache=False).logits.flatten(0, 1)[predict]
            return _of_logits(logits, targets, temperature, entropy)
        needed = predict.unique() if trees is not None else None
        states = self._states(needed, inputs).flatten(0, 1)[predict]
        return self._of_states(states, targets, temperature, entropy)

    def _of_states(
        self, states: torch.Tensor, targets: torch.Tensor, temperature: float, entropy: bool
    ) -> torch.Tensor:
        head, size = self._head, max(1, self.chunk // self._vocabulary)
        plain = head.forward

        def part(states: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return _of_logits(self._capped(plain(states)), targets, temperature, entropy)

        with computing(head, lambda states: in_chunks(part, states, targets, size, head.parameters())):
            return head(states)

    @property
    def gathered(self) -> torch.nn.Module | None:
        """The module whose parts are called once for each chunk, within one call of it: ZeRO 3 must gather it whole."""
        return self._head if self.by_chunks and list(self._head.children()) else None

    @property
    def _plain(self) -> Any:
        return self.inner.get_base_model() if hasattr(self.inner, "get_base_model") else self.inner

    @property
    def _head(self) -> Any:
        return self._plain.get_output_embeddings()

    def _states(self, needed: torch.Tensor | None, inputs: dict[str, Any]) -> torch.Tensor:
        """The last hidden states, as the head takes them: some models keep a residual stream in float32 (Mamba)."""
        states = self._last.states(needed, **inputs)
        return states.to(next(self._plain.parameters()).dtype)

    def _logits(self, states: torch.Tensor) -> torch.Tensor:
        return self._capped(self._head(states))

    def _capped(self, logits: torch.Tensor) -> torch.Tensor:
        logits = logits.float()
        return logits if self._cap is None else self._cap * torch.tanh(logits / self._cap)

    @torch.no_grad()
    def _fault_of_the_head(self, tolerance: float = 1e-4) -> str | None:
        """Why head and states do not give the model's own logits, tried on random tokens; None: they do."""
        if not hasattr(self._plain, "get_output_embeddings") or self._head is None:
            return "it has no output layer"
        like = next(self._plain.parameters())
        vocabulary = self._plain.config.get_text_config().vocab_size
        ids = torch.from_numpy(probe.sequences([8], vocabulary)[0])[None].to(like.device)
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        whole = self.inner(**inputs, use_cache=False).logits.float()
        own = attempt(lambda: self._logits(self._states(None, inputs)))
        if isinstance(own, Failure):
            return own.reason
        self._vocabulary = own.shape[-1]
        if own.shape != whole.shape:
            return f"other logits: {list(own.shape)}, not {list(whole.shape)}"
        off, most = float((own - whole).abs().max()), tolerance * float(whole.abs().max().clamp_min(1.0))
        return None if off <= most else f"its logits are {off:.2g} from its output layer's"


def _of_logits(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float, entropy: bool
) -> torch.Tensor:
    logits = logits.float() / temperature
    if not entropy:
        return -torch.nn.functional.cross_entropy(logits, targets, reduction="none")[None]
    every = torch.log_softmax(logits, -1)
    return torch.stack([every.gather(-1, targets[:, None])[:, 0], -(every.exp() * every).sum(-1)])


def token_logprobs(model: torch.nn.Module, batch: TokenBatch, temperature: float = 1.0) -> torch.Tensor:
    """Log-probabilities of the batch's response tokens, float32 [N], at the sampling temperature.

    `model` is a `PolicyModel` or an engine around one.
    """
    (logprobs,) = _call(model, batch, temperature, False)
    return logprobs


def token_logprobs_and_entropy(
    model: torch.nn.Module, batch: TokenBatch, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """`token_logprobs`, and the entropy of the distribution that each token was drawn from, nats, float32 [N]."""
    logprobs, entropies = _call(model, batch, temperature, True)
    return logprobs, entropies


def _call(model: torch.nn.Module, batch: TokenBatch, temperature: float, entropy: bool) -> torch.Tensor:
    like = next(model.parameters())
    return model(
        **batch.inputs(like),
        predict=batch.predict.to(like.device),
        targets=batch.targets.to(like.device),
        temperature=temperature,
        entropy=entropy,
    )
