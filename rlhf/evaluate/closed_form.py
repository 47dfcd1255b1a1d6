"""The exact distribution of a policy whose responses can be enumerated, and the optimum it should be trained to.

RLHF maximises E[u] - beta KL(pi || pi0); its optimum is pi* = pi0 exp(u / beta) / Z (arXiv 2402.00742, section 2).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.learn.batching import pack
from rlhf.learn.logprobs import PolicyModel, token_logprobs
from rlhf.types import Ragged


def responses(vocabulary: int, end: int, length: int) -> list[tuple[int, ...]]:
    """Every response of at most `length` tokens: those that end with `end`, and those cut at `length`.

    >>> responses(vocabulary=2, end=0, length=2)
    [(0,), (1, 0), (1, 1)]
    """
    found: list[tuple[int, ...]] = []
    going: list[tuple[int, ...]] = [()]
    for step in range(length):
        longer = [(*start, token) for start in going for token in range(vocabulary)]
        last = step + 1 == length
        found += [r for r in longer if last or r[-1] == end]
        going = [r for r in longer if r[-1] != end]
    return sorted(found)


@torch.no_grad()
def log_distribution(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], every: Sequence[tuple[int, ...]]
) -> np.ndarray:
    """log pi(y | x) of every response to every prompt, float64 [prompts, responses]; each row's exps add up to 1."""
    shared = Ragged.of([list(p) for p in prompts], np.int32)
    own = Ragged.of([list(r) for _ in prompts for r in every], np.int32)
    group = np.repeat(np.arange(len(prompts)), len(every))
    flat = np.zeros(len(own.values))
    policy = PolicyModel(model)
    for batch in pack(shared, own, group, range(len(own)), budget=4096):
        flat[batch.index.numpy()] = token_logprobs(policy, batch).double().numpy()
    return np.add.reduceat(flat, own.offsets[:-1]).reshape(len(prompts), len(every))


def optimum(log_base: np.ndarray, utility: np.ndarray, beta: float) -> np.ndarray:
    """log pi*(y | x) = log pi0 + u / beta - log Z, float64 of the same shape, [prompts, responses].

    >>> np.exp(optimum(np.log([[0.5, 0.5]]), np.array([[0.0, np.log(3.0)]]), beta=1.0)).round(3).tolist()
    [[0.25, 0.75]]
    """
    scores = log_base + utility / beta
    top = scores.max(-1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(-1, keepdims=True))


def kl(log_p: np.ndarray, log_q: np.ndarray) -> float:
    """KL(p || q), nats, mean over the prompts (rows)."""
    return float((np.exp(log_p) * (log_p - log_q)).sum(-1).mean())
