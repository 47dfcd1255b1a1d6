"""A batch on disk, for who looks why it could not be learnt. NumPy's own archive, without pickle."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf.files import beside
from rlhf.learn.experience import Merged
from rlhf.types import Experience

_COLUMNS = ("raw", "reference", "utility", "p_good", "slope")


def save_batch(path: Path, experiences: Sequence[Experience]) -> None:
    """Writes a batch of B responses of T tokens to G prompts under M reward models, beside and then renamed.

    `text` is JSON: "prompts" [G], "responses" [B], "models" [M]. Arrays: `prompt_tokens` and `prompt_offsets` [G + 1];
    `group` [B], the prompt of each response; `tokens` [T] and `offsets` [B + 1]; `logprobs` [T], the sampler's;
    `place` [B, 2], the item of each response and its number within; `combined` [B]; `raw`, `reference`, `utility`,
    `p_good`, `slope` [B, M].
    """
    merged = Merged.of(experiences)
    text = {
        "prompts": [prompt for e in experiences for prompt in e.rollouts.prompts],
        "responses": [response for e in experiences for response in e.rollouts.texts],
        "models": experiences[0].rewards.models,
    }
    columns = {name: np.concatenate([getattr(e.rewards, name) for e in experiences]) for name in _COLUMNS}
    columns |= {
        "text": np.array(json.dumps(text)),
        "prompt_tokens": merged.prompts.values,
        "prompt_offsets": merged.prompts.offsets,
        "group": merged.group,
        "tokens": merged.tokens.values,
        "offsets": merged.tokens.offsets,
        "logprobs": merged.behaviour.numpy(),
        "place": merged.place,
        "combined": merged.utility.numpy(),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    new = beside(path)
    try:
        with open(new, "wb") as file:
            np.savez(file, allow_pickle=False, **columns)
        os.replace(new, path)
    finally:
        new.unlink(missing_ok=True)
