"""How a faster way of computing a model is proven: random sequences, and the distance from the model's own pass."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from rlhf.models.attempt import Failure, attempt, takes_argument
from rlhf.models.reach import Reach

EXACT = 1e-4
"""Root mean square distance in nats up to which log-probabilities are equal in float32. Of a model whose logits hardly
differ, the same share of their deviation."""
SHORT = 24
"""Tokens of a probe that no boundary makes longer."""
BEYOND = 6
"""Tokens by which a probe crosses a boundary."""


def sequences(lengths: list[int], vocabulary: int, seed: int = 0) -> list[np.ndarray]:
    """Random tokens, int64, a sequence of each length."""
    rng = np.random.default_rng(seed)
    return [rng.integers(vocabulary, size=n) for n in lengths]


def room(reach: Reach, most: int = SHORT) -> int:
    """Tokens of a sequence that stays within all the model's boundaries, `most` at most."""
    return min(n for n in (reach.window, reach.switch, reach.limit, most) if n is not None)


@torch.no_grad()
def own_logprobs(model: Any, rows: torch.Tensor, what: str, keep: int, first: int = 0) -> torch.Tensor:
    """The model's own pass: log-probabilities of the token after each of the last `keep`, float32 [rows, keep, V].

    Args:
        rows: int64 [rows, T], of equal length. what: the model, in errors. first: the position of the first token.

    Raises:
        ValueError: the pass itself fails; it names the model and the reason.
    """
    like = next(model.parameters())
    ids = rows.to(like.device)
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if first:
        given["position_ids"] = (first + torch.arange(ids.shape[1], device=like.device))[None]
    if takes_argument(model.forward, "logits_to_keep"):
        given["logits_to_keep"] = keep
    logits = attempt(lambda: model(**given, use_cache=False).logits[:, -keep:].float())
    if isinstance(logits, Failure):
        raise ValueError(
            f"{what} ({type(model).__name__}): its own forward pass fails in {str(like.dtype).removeprefix('torch.')}: "
            f"{logits.reason}; give a model that transformers can run so, or another dtype"
        )
    return torch.log_softmax(logits, -1)


def distances(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Root mean square difference of each distribution [..., vocabulary] over the tokens that are possible at all,
    nats, float64 [...]; infinite where one is no number."""
    possible = torch.isfinite(exact)
    gap = torch.where(possible, found.to(exact.device) - exact, 0.0).double()
    return (gap.square().sum(-1) / possible.sum(-1)).sqrt().nan_to_num(nan=float("inf"))


def distance(found: torch.Tensor, exact: torch.Tensor) -> float:
    """`distances`, root mean square over all distributions."""
    return float(distances(found, exact).square().mean().sqrt())


def tolerance(exact: torch.Tensor) -> float:
    """The distance up to which float32 log-probabilities [N, vocabulary] are equal to `exact`."""
    possible = torch.isfinite(exact)
    centred = exact - torch.where(possible, exact, 0).sum(-1, keepdim=True) / possible.sum(-1, keepdim=True)
    return EXACT * min(1.0, float(centred[possible].std()))


def check_finite(exact: torch.Tensor, what: str) -> None:
    """Refuses a model whose weights are no numbers: nothing could be proven of it.

    Raises:
        ValueError: names the model.
    """
    if bool(torch.isnan(exact).any()):
        raise ValueError(f"{what}: its logits are not numbers (nan); check its weights")
