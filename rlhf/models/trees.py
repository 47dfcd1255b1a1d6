"""A prompt and the responses that branch from it, side by side in one flat sequence: what tokens see, and attention.

A prompt token sees the prompt so far, a response token the prompt and its own response so far. Attention goes part by
part, so that what is hidden is hardly computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.autograd.function import once_differentiable

BLOCK, PROMPT_BLOCK = 64, 128
"""Response and prompt tokens of a short tree that attend together; whole responses, at least one."""
LARGE_BLOCK = 1024
"""Response tokens of any other: the call costs more than computing what is hidden."""
SHORT = 1024
"""Tokens of the longest sequence in a short tree: beyond, `TreeAttention` would keep more than the layers do."""


@dataclass(frozen=True)
class Part:
    """Tokens `start`..`stop` of a tree. They see its first `prefix` tokens and those in `own`..`stop`, but for what
    `mask` hides: it is additive, [tokens, prefix + stop - own]; without one they see what is not after them."""

    start: int
    stop: int
    prefix: int
    own: int
    mask: torch.Tensor | None

    def keys(self, x: torch.Tensor, tree: int) -> torch.Tensor:
        """What the part sees of [heads, T, width], where its tree begins at `tree`."""
        prefix = x[:, tree : tree + self.prefix]
        if self.own == self.stop:
            return prefix
        if self.own == self.prefix:
            return x[:, tree : tree + self.stop]
        return torch.cat([prefix, x[:, tree + self.own : tree + self.stop]], 1)


@dataclass(frozen=True)
class Tree:
    """By the tokens of the prompt and of each response."""

    prompt: int
    responses: tuple[int, ...] = ()
    _parts: dict[Any, list[Part]] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def length(self) -> int:
        return self.prompt + sum(self.responses)

    @property
    def short(self) -> bool:
        return self.prompt + max(self.responses, default=0) <= SHORT

    def parts(self, like: torch.Tensor) -> list[Part]:
        """The parts in their order, masks of the device and dtype of `like`; made once."""
        key = (like.device, like.dtype)
        if key not in self._parts:
            self._parts[key] = list(self._make(like))
        return self._parts[key]

    def _make(self, like: torch.Tensor) -> Iterator[Part]:
        short = self.short
        size = PROMPT_BLOCK if short else max(self.prompt, 1)
        for start in range(0, self.prompt, size):
            stop = min(start + size, self.prompt)
            mask = hiding(start, [stop - start]).to(like) if short else None
            yield Part(start, stop, stop, stop, mask)
        blocks: list[list[int]] = []
        for length in self.responses:
            if not length:
                continue
            if blocks and sum(blocks[-1]) + length <= (BLOCK if short else LARGE_BLOCK):
                blocks[-1].append(length)
            else:
                blocks.append([length])
        start = self.prompt
        for block in blocks:
            stop = start + sum(block)
            yield Part(start, stop, self.prompt, start, hiding(self.prompt, block).to(like))
            start = stop


def hiding(before: int, responses: Sequence[int]) -> torch.Tensor:
    """Of tokens that see all of `before` tokens and their own response so far, float32 [tokens, before + tokens]."""
    own = torch.repeat_interleave(torch.arange(len(responses)), torch.tensor(responses))
    visible = (own[:, None] == own[None, :]).tril_()
    hidden = torch.cat([torch.zeros(len(own), before, dtype=torch.bool), ~visible], 1)
    return torch.zeros(hidden.shape).masked_fill_(hidden, torch.finfo(torch.float32).min)


def places(trees: Sequence[Tree]) -> Iterator[tuple[int, Tree]]:
    """Where each tree begins in the flat sequence."""
    start = 0
    for tree in trees:
        yield start, tree
        start += tree.length


class TreeAttention(torch.autograd.Function):
    """softmax(query key' scale + mask) value, of short trees, on a CPU.

    Scores and their softmax are float32, the other products in the dtype of the arguments. The shares are kept for the
    backward pass, which then takes less than half the time of a flash kernel's.

    Args:
        query, key: [heads, T, width]. value: [heads, T, value width].

    Returns:
        [heads, T, value width], laid out as [T, heads, value width].
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        trees: Sequence[Tree],
        scale: float,
    ) -> torch.Tensor:
        heads, length, _ = query.shape
        out = query.new_empty(length, heads, value.shape[-1]).transpose(0, 1)
        exact_query, exact_key = query.float(), key.float()
        backward = any(ctx.needs_input_grad)
        kept = []
        for at, tree in places(trees):
            for part in tree.parts(exact_query):
                tokens = slice(at + part.start, at + part.stop)
                keys = part.keys(exact_key, at).transpose(1, 2)
                assert part.mask is not None
                scores = torch.baddbmm(part.mask, exact_query[:, tokens], keys, alpha=scale)
                shares = torch.softmax(scores, -1).to(value.dtype)
                out[:, tokens] = torch.bmm(shares, part.keys(value, at))
                if backward:
                    kept.append(shares)
        if backward:
            ctx.save_for_backward(query, key, value, *kept)
            ctx.trees, ctx.scale = trees, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, *kept = ctx.saved_tensors
        shares = iter(kept)
        of_query = torch.empty_like(query)
        of_key, of_value = _zeros(key), _zeros(value)
        for at, tree in places(ctx.trees):
            for part in tree.parts(of_key):
                tokens = slice(at + part.start, at + part.stop)
                share, upper = next(shares), gradient[:, tokens]
                _add(of_value, part, at, torch.bmm(share.transpose(1, 2), upper))
                of_share = torch.bmm(upper, part.keys(value, at).transpose(1, 2))
                of_score = torch._softmax_backward_data(of_share, share, -1, share.dtype)
                of_query[:, tokens] = torch.bmm(of_score, part.keys(key, at))
                _add(of_key, part, at, torch.bmm(of_score.transpose(1, 2), query[:, tokens]))
        of_query *= ctx.scale
        of_key *= ctx.scale
        return of_query, of_key.to(key.dtype), of_value.to(value.dtype), None, None


def _zeros(like: torch.Tensor) -> torch.Tensor:
    """Where gradients add up, float32, laid out as [T, heads, width]."""
    heads, length, width = like.shape
    return like.new_zeros(length, heads, width, dtype=torch.float32).transpose(0, 1)


def _add(total: torch.Tensor, part: Part, tree: int, gradient: torch.Tensor) -> None:
    """Adds the gradient of what a part sees."""
    total[:, tree : tree + part.prefix] += gradient[:, : part.prefix]
    if part.own < part.stop:
        total[:, tree + part.own : tree + part.stop] += gradient[:, part.prefix :]
