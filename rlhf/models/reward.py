"""Scoring text with a reward model, under its own tokenizer and template."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rlhf.data.chat import ChatFormat
from rlhf.learn.batching import by_length
from rlhf.models.load import load_reward_model, load_tokenizer, max_positions
from rlhf.types import Content


def score_tokens(
    model: torch.nn.Module, rows: Sequence[Sequence[int] | np.ndarray], pad: int | None, device: str
) -> torch.Tensor:
    """Rewards of token rows, float32 [rows]: the model's own forward pass on one right-padded batch.

    Without a padding token the classifier cannot find the last token of a batch: rows then go one by one.
    """
    if pad is None and len(rows) > 1:
        return torch.cat([score_tokens(model, [row], None, device) for row in rows])
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), 0 if pad is None else pad, dtype=torch.long)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = 1
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device)).logits
    return logits.squeeze(-1).float()


class RewardScorer:
    """One reward model, ready to score responses.

    Guarantees a finite float32 reward for each response, or a ValueError that names the model and the sample.
    """

    def __init__(
        self, name: str, path: str, template: str | None = None, budget: int = 8192, device: str = "cpu"
    ) -> None:
        key = f"reward_models.{name}.path"
        self.name, self.budget, self.device = name, budget, device
        self.model = load_reward_model(path, key).to(device)
        self.format = ChatFormat(load_tokenizer(path, key), f"reward model '{name}'", template)
        self.limit = max_positions(self.model.config)

    def score(self, contents: Sequence[Content], responses: Sequence[str]) -> np.ndarray:
        """Rewards of responses to their prompts, float32 [B]."""
        rows = [self.format.conversation_tokens(c, r) for c, r in zip(contents, responses, strict=True)]
        rewards = np.empty(len(rows), np.float32)
        for row, content, response in zip(rows, contents, responses, strict=True):
            if self.limit is not None and len(row) > self.limit:
                raise ValueError(
                    f"reward model '{self.name}' takes {self.limit} tokens, but prompt and response have {len(row)}: "
                    f"prompt {_short(content)}, response {_short(response)}; lower rollout.max_new_tokens"
                )
        with torch.inference_mode():
            for batch in by_length([len(r) for r in rows], self.budget):
                scores = score_tokens(
                    self.model, [rows[i] for i in batch], self.model.config.pad_token_id, self.device
                )
                rewards[batch] = scores.cpu().numpy()
        bad = np.flatnonzero(~np.isfinite(rewards))
        if len(bad):
            i = int(bad[0])
            raise ValueError(
                f"reward model '{self.name}' returned {rewards[i]} for {len(bad)} of {len(rows)} responses, "
                f"first for prompt {_short(contents[i])}, response {_short(responses[i])}; check its weights"
            )
        return rewards


def _short(content: Content) -> str:
    text = content if isinstance(content, str) else content[-1]["content"]
    return repr(text if len(text) <= 80 else text[:77] + "...")
