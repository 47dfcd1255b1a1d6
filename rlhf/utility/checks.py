"""What the baseline statistics refuse, with the message that names model and prompt."""

from __future__ import annotations

import numpy as np


def finite(
    model: str, prompt_ids: np.ndarray, rewards: np.ndarray, what: str
) -> tuple[np.ndarray, np.ndarray]:
    """Prompt ids uint64 [B] and rewards float32 [B], checked."""
    prompt_ids = np.asarray(prompt_ids)
    with np.errstate(over="ignore"):
        rewards = np.asarray(rewards).astype(np.float32)
    assert prompt_ids.dtype == np.uint64, prompt_ids.dtype
    assert prompt_ids.shape == rewards.shape == (rewards.size,), (prompt_ids.shape, rewards.shape)
    bad = np.flatnonzero(~np.isfinite(rewards))
    if len(bad):
        raise ValueError(
            f"reward model '{model}' gave {rewards[bad[0]]} to prompt {prompt_ids[bad[0]]} "
            f"({len(bad)} of the {len(rewards)} rewards of {what} are not finite)"
        )
    return prompt_ids, rewards


def require(known: np.ndarray, prompt_ids: np.ndarray, model: str, what: str) -> None:
    missing = np.flatnonzero(~known)
    if len(missing):
        raise ValueError(
            f"the baseline holds no {what} of prompt {prompt_ids[missing[0]]} for reward model '{model}' "
            f"({len(missing)} of {len(prompt_ids)} prompts)"
        )
