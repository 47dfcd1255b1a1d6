"""Which cache a model is sampled with."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial

from transformers import PreTrainedModel

from rlhf.generate.decoding import NoCache, PlainCache, RowCache
from rlhf.generate.native_cache import NativeCache
from rlhf.generate.proof import Proof
from rlhf.generate.shared_cache import SharedCache
from rlhf.models.attention import is_ours
from rlhf.native.decoder import NativeDecoder

log = logging.getLogger(__name__)


def row_cache(
    model: PreTrainedModel, max_new_tokens: int, budget: int, proof: Proof
) -> tuple[RowCache, list[str]]:
    """The fastest that is proven to give what the model's own forward pass gives; and, of each that is not, why."""
    refused: list[str] = []
    for name, make in _kinds(model, max_new_tokens, budget):
        cache = make()
        fault = proof.fault(cache)
        if fault is None:
            if not cache.joins and not refused:
                refused = [
                    f"policy ({type(model).__name__}): sampled with its own cache: slots are not refilled"
                ]
            for reason in refused:
                log.warning(reason)
            return cache, refused
        refused.append(f"policy ({type(model).__name__}): sampling by {name} is refused: {fault}")
    raise ValueError(
        "; ".join(refused)
        + "; the model gives other log-probabilities by each way, so it cannot be sampled from"
    )


def _kinds(
    model: PreTrainedModel, max_new_tokens: int, budget: int
) -> Iterator[tuple[str, Callable[[], RowCache]]]:
    """What may serve a model, the fastest first."""
    if is_ours(model):
        if NativeCache.serves(model):
            decoder = NativeDecoder.of(model)
            native = partial(NativeCache, model, max_new_tokens, budget)
            if decoder is not None:
                yield "compiled layers", partial(native, decoder=decoder)
            yield "compiled attention", native
        yield "rows that share prompts and refill slots", partial(SharedCache, model, max_new_tokens, budget)
    yield "transformers' cache, prompts padded", partial(PlainCache, model, padded=True)
    yield "transformers' cache, prompts of one length at a time", partial(PlainCache, model, padded=False)
    yield "whole sequences, without a cache", partial(NoCache, model)
