"""Prompts as tokens, and what was sampled after them as rollouts: what all engines have in common."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rlhf.data.chat import ChatFormat
from rlhf.models.reach import Reach
from rlhf.types import Content, Ragged, Rollouts, WorkItem, prompt_id


@dataclass(frozen=True)
class Sampled:
    """One response, as an engine made it."""

    tokens: np.ndarray  # int32 [T], with the token that ended it
    logprobs: np.ndarray  # float32 [T], at the sampling temperature
    versions: np.ndarray  # int32 [T], of the weights by which each was sampled
    finished: bool  # ended by a token of `Dialogue.ends`; else cut


class Dialogue:
    """The conversation of a policy with its prompts.

    Args:
        model_ends: tokens that end a response by the model's generation configuration; the chat format's are added.

    Raises:
        ValueError: nothing says how a response ends.
    """

    def __init__(
        self,
        chat: ChatFormat,
        model_ends: Collection[int],
        reach: Reach,
        max_new_tokens: int,
        temperature: float,
    ) -> None:
        self.chat, self.reach = chat, reach
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.ends = set(model_ends) | set(chat.end_tokens())
        if not self.ends:
            raise ValueError(
                "policy: neither its generation config nor its tokenizer says how a response ends"
            )

    def tokens(self, content: Content) -> list[int]:
        """Of a prompt.

        Raises:
            ValueError: with a whole response behind it, it is too long for the policy; it shows the prompt.
        """
        tokens = self.chat.prompt_tokens(content)
        fault = self.reach.fault(len(tokens), self.max_new_tokens)
        if fault is not None:
            raise ValueError(f"{fault}: {str(content)[:80]!r}")
        return tokens

    def rollouts(
        self, item: WorkItem, prompts: Sequence[Sequence[int]], responses: Sequence[Sampled], started: float
    ) -> Rollouts:
        """Of a work item whose responses are all there, in order.

        Args:
            prompts: the prompts' `tokens`.
            started: when it came, by time.perf_counter.
        """
        group = np.repeat(np.arange(item.groups, dtype=np.int32), item.samples)
        tokens: list[Any] = [response.tokens for response in responses]
        versions = np.concatenate([response.versions for response in responses])
        return Rollouts(
            item=item.id,
            version=int(versions.min()),
            seed=item.seed,
            temperature=self.temperature,
            prompts=item.prompts,
            prompt_ids=np.array([prompt_id(content) for content in item.prompts], np.uint64),
            prompt_tokens=Ragged.of(prompts, np.int32),
            group=group,
            tokens=Ragged.of(tokens, np.int32),
            logprobs=np.concatenate([response.logprobs for response in responses]),
            versions=versions,
            finished=np.array([response.finished for response in responses]),
            texts=self.chat.response_texts(item.prompts, prompts, group, tokens, self.ends),
            seconds=time.perf_counter() - started,
        )
