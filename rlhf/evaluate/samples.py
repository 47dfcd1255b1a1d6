"""Samples of a policy on the evaluation prompts, with everything measured on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rlhf.types import Content


@dataclass(frozen=True)
class PolicySamples:
    """n responses of one policy to each of P evaluation prompts.

    `rewards` and `reference` are keyed by reward-model name. `judged` and `judge_reference` hold the scores
    that decide wins, and the score a response must at least reach to win, keyed by property; without a judge
    of its own an evaluation judges with the reward models, and both pairs are the same arrays. A reward that does not
    apply to a prompt is NaN for all its responses. `evaluated` and
    `evaluator_reference` are the same two things by evaluators, reward models trained apart for judging only,
    keyed by property; empty where there are none.
    """

    prompts: tuple[Content, ...]  # [P]
    prompt_ids: np.ndarray  # uint64 [P]
    meta: tuple[Mapping[str, Any], ...]  # [P]: other columns of the dataset row
    texts: tuple[tuple[str, ...], ...]  # [P][n]
    lengths: np.ndarray  # int32 [P, n]: response tokens
    finished: np.ndarray  # bool [P, n]: ended by itself
    rewards: Mapping[str, np.ndarray]  # float32 [P, n] each
    reference: Mapping[str, np.ndarray]  # float32 [P] each: r_ref
    judged: Mapping[str, np.ndarray]  # float32 [P, n] each
    judge_reference: Mapping[str, np.ndarray]  # float32 [P] each
    log_ratio: np.ndarray  # float32 [P, n]: log policy(y|x) - log reference policy(y|x), nats a response
    evaluated: Mapping[str, np.ndarray] = field(default_factory=dict)  # float32 [P, n] each
    evaluator_reference: Mapping[str, np.ndarray] = field(default_factory=dict)  # float32 [P] each


def applying(scores: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of scores, [P, n] each, those that apply to a prompt at least."""
    return {name: values for name, values in scores.items() if not np.isnan(values).all()}
