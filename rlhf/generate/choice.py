"""Which cache a model is sampled with."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial

import torch
from transformers import PreTrainedModel

from rlhf.generate.decoding import PlainCache, RowCache
from rlhf.generate.native_cache import NativeCache
from rlhf.generate.shared_cache import SharedCache
from rlhf.models.attention import is_ours
from rlhf.native.decoder import NativeDecoder

log = logging.getLogger(__name__)


def row_cache(model: PreTrainedModel, max_new_tokens: int, budget: int) -> RowCache:
    """The fastest that gives the logits of the model's own forward pass, tried on a few tokens."""
    kinds: list[Callable[..., SharedCache]] = [SharedCache] if is_ours(model) else []
    if kinds and NativeCache.serves(model):
        kinds.insert(0, NativeCache)
        decoder = NativeDecoder.of(model)
        if decoder is not None:
            kinds.insert(0, partial(NativeCache, decoder=decoder))
    for kind in kinds:
        cache = kind(model, max_new_tokens, budget)
        if _exact(model, cache):
            return cache
    log.warning("%s keeps its own cache: sampling refills no slots", type(model).__name__)
    return PlainCache(model)


@torch.inference_mode()
def _exact(model: PreTrainedModel, cache: SharedCache) -> bool:
    """Whether a step of sampling, of two prompts at once, gives the logits of the whole sequences."""
    prompts, tokens = [[0, 1, 1], [1, 0]], torch.tensor([1, 0], device=model.device)
    try:
        handles, _ = cache.prefill(prompts)
        cache.join(handles)
        found = cache.step(tokens)
        cache.keep(torch.zeros(0, dtype=torch.long))
        for handle in handles:
            cache.release(handle)
        cache.clear()
        whole = [
            model(input_ids=torch.tensor([[*p, t]], device=model.device), use_cache=False).logits[0, -1]
            for p, t in zip(prompts, tokens.tolist(), strict=True)
        ]
    except (ValueError, RuntimeError, TypeError, AttributeError, IndexError):
        return False
    expected = torch.stack(whole).float()
    tolerance = 1e-3 if model.dtype == torch.float32 else 0.05
    return bool((found - expected).norm() <= tolerance * expected.norm())
