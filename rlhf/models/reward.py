"""Scoring text with a reward model, under its own tokenizer and template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from rlhf.data.chat import ChatFormat
from rlhf.models.classifier import Classifier, score_rows
from rlhf.models.load import head_of, labels_of, load_reward_model, load_tokenizer, usable_positions
from rlhf.models.packed import pack as pack_layers
from rlhf.models.precision import dtype_of
from rlhf.shown import short
from rlhf.sources.answers import text_of
from rlhf.types import Content, Response


class RewardScorer:
    """One reward model, ready to score responses.

    Guarantees a finite float32 reward for each response, or a ValueError that names the model and the sample.

    Args:
        heads: reward -> label, of a classifier with several (`rlhf.models.load.labels_of`).
    """

    def __init__(
        self,
        name: str,
        path: str,
        template: str | None = None,
        budget: int = 8192,
        device: str = "cpu",
        dtype: str = "float32",
        heads: Mapping[str, Any] | None = None,
    ) -> None:
        key = f"reward model '{name}': path"
        self.name, self.budget, self.device = name, budget, device
        model = load_reward_model(path, key, single=not heads).to(device)
        self.labels = labels_of(model.config, f"reward model '{name}': heads", path, heads)
        self.classifier = Classifier(model)
        self.classifier.compute_in(dtype_of(dtype, device))
        pack_layers(self.classifier, budget, leave=head_of(model))
        self.format = ChatFormat(load_tokenizer(path, key), f"reward model '{name}'", template)
        self.limit = usable_positions(model)

    def score(self, contents: Sequence[Content], responses: Sequence[Response]) -> np.ndarray:
        """Rewards of responses to their prompts by the first label, float32 [B]."""
        return self.score_heads(contents, responses)[:, 0]

    def score_heads(self, contents: Sequence[Content], responses: Sequence[Response]) -> np.ndarray:
        """Rewards of responses to their prompts, float32 [B, H], a column for each label that is a reward."""
        rows = [self.format.conversation_tokens(c, r) for c, r in zip(contents, responses, strict=True)]
        for row, content, response in zip(rows, contents, responses, strict=True):
            if self.limit is not None and len(row) > self.limit:
                raise ValueError(
                    f"reward model '{self.name}' takes {self.limit} tokens, but prompt and response have {len(row)}: "
                    f"prompt {short(content)}, response {short(text_of(response))}; lower rollout.max_new_tokens"
                )
        with torch.inference_mode():
            found = score_rows(self.classifier, self.classifier, rows, _kin(contents), self.budget)
        rewards = found.cpu().numpy().reshape(len(rows), self.classifier.labels)[:, self.labels]
        bad = np.argwhere(~np.isfinite(rewards))
        if len(bad):
            i, head = bad[0].tolist()
            raise ValueError(
                f"reward model '{self.name}' returned {rewards[i, head]} for {len(set(bad[:, 0].tolist()))} of "
                f"{len(rows)} responses, first for prompt {short(contents[i])}, response "
                f"{short(text_of(responses[i]))}; check its weights"
            )
        return rewards


def _kin(contents: Sequence[Content]) -> list[int]:
    """A number for each run of equal prompts."""
    numbers: list[int] = []
    for i, content in enumerate(contents):
        same = i > 0 and (content is contents[i - 1] or content == contents[i - 1])
        numbers.append(numbers[-1] if same else i)
    return numbers
