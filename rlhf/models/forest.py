"""Which tokens of a flat sequence of trees attend to which, in as few calls as masks of a bounded size allow: for GPUs,
where a call costs more than computing what is hidden (`rlhf/models/trees.py` is for CPUs).

Small trees share a call under one mask. Of a larger one the prompt attends by itself, then its responses, several to a
call. A prompt with one response at most is plainly causal. All is made on the device, from two numbers a token.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf.models.trees import Tree, places

MOST = 1024
"""Tokens that attend in one call under a mask, but for a response that is longer by itself."""


@dataclass(frozen=True)
class Span:
    """Tokens `start`..`stop` of the flat sequence. They see those in `keys`, but for what `mask` hides: it is additive,
    [1, 1, tokens, keys]; without one they see what is not after them."""

    start: int
    stop: int
    keys: tuple[tuple[int, int], ...]
    mask: torch.Tensor | None

    def seen(self, x: torch.Tensor) -> torch.Tensor:
        """What the span sees of [1, heads, T, width]."""
        parts = [x[:, :, start:stop] for start, stop in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)


@functools.lru_cache(maxsize=4)  # all layers of a pass ask for the same
@torch.inference_mode(False)  # a pass with gradients may ask after one without
def spans(trees: tuple[Tree, ...], device: torch.device, dtype: torch.dtype) -> tuple[Span, ...]:
    """The spans of a flat sequence, in their order, each token in one; masks of this device and dtype."""
    branches, roots = (torch.from_numpy(x).to(device) for x in _labels(trees))

    def masked(start: int, stop: int, keys: tuple[tuple[int, int], ...]) -> Span:
        place = torch.cat([torch.arange(*one, device=device) for one in keys])
        own = branches[place]
        visible = (own == branches[start:stop, None]) | (own == roots[start:stop, None])
        visible &= place <= torch.arange(start, stop, device=device)[:, None]
        mask = torch.zeros(visible.shape, dtype=dtype, device=device)
        return Span(start, stop, keys, mask.masked_fill_(~visible, torch.finfo(dtype).min)[None, None])

    return tuple(
        Span(start, stop, keys, None) if causal else masked(start, stop, keys)
        for start, stop, keys, causal in _cut(trees)
    )


def _labels(trees: Sequence[Tree]) -> tuple[np.ndarray, np.ndarray]:
    """The branch of each token, int32 [T], a number of its own for every prompt and response; and the number of its
    prompt."""
    sizes = [(tree.prompt, *tree.responses) for tree in trees]
    counts = np.array([len(one) for one in sizes])
    first = np.repeat(np.cumsum(counts) - counts, counts)
    flat = np.array([n for one in sizes for n in one])
    return np.repeat(np.arange(len(flat)), flat).astype(np.int32), np.repeat(first, flat).astype(np.int32)


_Cut = tuple[int, int, tuple[tuple[int, int], ...], bool]


def _cut(trees: Sequence[Tree]) -> Iterator[_Cut]:
    """Start, stop, keys of each span, and whether it is plainly causal."""
    begun: int | None = None  # where small trees begin that share a call
    for at, tree in places(trees):
        end = at + tree.length
        if begun is not None and end - begun > MOST:
            yield begun, at, ((begun, at),), False
            begun = None
        if tree.length > MOST:
            yield from _parts(at, tree)
        elif tree.length and begun is None:
            begun = at
    if begun is not None:
        last = sum(tree.length for tree in trees)
        yield begun, last, ((begun, last),), False


def _parts(at: int, tree: Tree) -> Iterator[_Cut]:
    """Of a large tree: its prompt, then whole responses, at least one to a span."""
    start, end = at + tree.prompt, at + tree.length
    filled = [n for n in tree.responses if n]
    if len(filled) <= 1:
        yield at, end, ((at, end),), True
        return
    if tree.prompt:
        yield at, start, ((at, start),), True
    blocks: list[int] = []
    for length in filled:
        if blocks and blocks[-1] + length <= MOST:
            blocks[-1] += length
        else:
            blocks.append(length)
    for length in blocks:
        stop = start + length
        prompt = ((at, at + tree.prompt),) if tree.prompt else ()
        yield start, stop, (*prompt, (start, stop)), False
        start = stop
