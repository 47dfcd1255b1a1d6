"""Scoring text with a reward model, under its own tokenizer and template."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlhf.data.chat import ChatFormat
from rlhf.models.classifier import Classifier, score_rows
from rlhf.models.load import head_of, load_reward_model, load_tokenizer, usable_positions
from rlhf.models.packed import pack as pack_layers
from rlhf.models.precision import dtype_of
from rlhf.shown import short
from rlhf.types import Content


class RewardScorer:
    """One reward model, ready to score responses.

    Guarantees a finite float32 reward for each response, or a ValueError that names the model and the sample.
    """

    def __init__(
        self,
        name: str,
        path: str,
        template: str | None = None,
        budget: int = 8192,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        key = f"reward model '{name}': path"
        self.name, self.budget, self.device = name, budget, device
        model = load_reward_model(path, key).to(device)
        self.classifier = Classifier(model)
        self.classifier.compute_in(dtype_of(dtype, device))
        pack_layers(model, budget, leave=head_of(model))
        self.format = ChatFormat(load_tokenizer(path, key), f"reward model '{name}'", template)
        self.limit = usable_positions(model)

    def score(self, contents: Sequence[Content], responses: Sequence[str]) -> np.ndarray:
        """Rewards of responses to their prompts, float32 [B]."""
        rows = [self.format.conversation_tokens(c, r) for c, r in zip(contents, responses, strict=True)]
        for row, content, response in zip(rows, contents, responses, strict=True):
            if self.limit is not None and len(row) > self.limit:
                raise ValueError(
                    f"reward model '{self.name}' takes {self.limit} tokens, but prompt and response have {len(row)}: "
                    f"prompt {short(content)}, response {short(response)}; lower rollout.max_new_tokens"
                )
        with torch.inference_mode():
            found = score_rows(self.classifier, self.classifier, rows, _kin(contents), self.budget)
        rewards = found.cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(rewards))
        if len(bad):
            i = int(bad[0])
            raise ValueError(
                f"reward model '{self.name}' returned {rewards[i]} for {len(bad)} of {len(rows)} responses, "
                f"first for prompt {short(contents[i])}, response {short(responses[i])}; check its weights"
            )
        return rewards


def _kin(contents: Sequence[Content]) -> list[int]:
    """A number for each run of equal prompts."""
    numbers: list[int] = []
    for i, content in enumerate(contents):
        same = i > 0 and (content is contents[i - 1] or content == contents[i - 1])
        numbers.append(numbers[-1] if same else i)
    return numbers
