"""What is computed here against plain transformers, on one device and in one format.

The truth is transformers' own pass over each sequence alone, in float32. In float32 a gap is rounding, and bounded. In
bfloat16 a gap may be so many times that of transformers' own pass in bfloat16, which rounds as often.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from rlhf.config import RolloutConfig
from rlhf.data.chat import ChatFormat
from rlhf.generate.engines import engine_class
from rlhf.generate.proof import NEAR
from rlhf.learn.logprobs import PolicyModel, token_logprobs
from rlhf.models import probe
from rlhf.models.device import release
from rlhf.models.load import load_policy, load_reward_model, load_tokenizer
from rlhf.models.precision import DTYPES, cast
from rlhf.models.reward import RewardScorer
from rlhf.selftest.models import PROMPTS, Models
from rlhf.types import Rollouts, WorkItem

SAMPLES, TOKENS = 4, 24  # responses of each prompt, and of each response at most
GRADIENT = 1e-4
"""Of float32 gradients, relative to their norm."""
REWARD, FEW = 1e-3, 2.0
"""Of float32 rewards, relative to their deviation; and how many times as far as the plain pass's bfloat16 may be, as
rewards are few."""


@dataclass(frozen=True)
class Gap:
    """How far something is from transformers' own pass, and may be."""

    what: str
    found: float
    limit: float
    unit: str

    @property
    def passed(self) -> bool:
        return self.found <= self.limit  # not, if it is no number


def gaps(
    models: Models, rollout: RolloutConfig, templates: Mapping[str, str | None], device: str, dtype: str,
    gradients: bool,
) -> Iterator[Gap]:  # fmt: skip
    """The sampler's gap, the learner's, with `gradients` that of its gradient too, and each reward model's.

    Args:
        rollout: the engine that samples, and its settings; lengths and temperature are the test's.
        templates: chat templates, by "policy" and the names of reward models.
    """
    tokenizer = load_tokenizer(models.policy, "policy.path")
    chat = ChatFormat(tokenizer, "policy", templates.get("policy"))
    settings = replace(rollout, dtype=dtype, max_new_tokens=TOKENS, temperature=1.0)
    engine = engine_class(settings).open(models.policy, chat, settings, device)
    sampled = engine.generate(WorkItem(0, PROMPTS, SAMPLES, seed=1))
    engine.close()
    del engine
    release(device)
    exact, gradient = _plain(models.policy, sampled, device, torch.float32, gradients)
    limits = (probe.EXACT, GRADIENT)
    if dtype != "float32":
        rounded, direction = _plain(models.policy, sampled, device, DTYPES[dtype], gradients)
        limits = (NEAR * _rms(rounded - exact), NEAR * _apart(direction, gradient))
    yield Gap(
        "sampler", _rms(torch.from_numpy(sampled.logprobs.copy()) - exact), limits[0], "nats a token, rms"
    )
    found, own = _learner(models.policy, sampled, device, DTYPES[dtype], gradients)
    yield Gap("learner", _rms(found - exact), limits[0], "nats a token, rms")
    if gradients:
        yield Gap("learner's gradient", _apart(own, gradient), limits[1], "of its norm")
    for name, path in models.rewards.items():
        yield _reward(name, path, templates.get(name), sampled, device, dtype)


def _plain(
    path: str, sampled: Rollouts, device: str, dtype: torch.dtype, gradients: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """transformers' own log-probabilities of the sampled tokens, float32 [T], each response in a pass of its own; and
    the gradient of their mean, flat."""
    model: Any = load_policy(path, dtype=dtype).to(device)
    parts = []
    with torch.set_grad_enabled(gradients):
        for row in range(sampled.responses):
            prompt, own = sampled.prompt_tokens[sampled.group[row]], sampled.tokens[row]
            ids = torch.from_numpy(np.concatenate([prompt, own]).astype(np.int64))[None].to(device)
            logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()
            part = torch.log_softmax(logits, -1).gather(-1, ids[0, len(prompt) :, None])[:, 0]
            if gradients:
                (part.sum() / len(sampled.tokens.values)).backward()
            parts.append(part.detach().cpu())
    return torch.cat(parts), _gradient(model, gradients)


def _learner(
    path: str, sampled: Rollouts, device: str, dtype: torch.dtype, gradients: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `_plain`, by the learner's own batches."""
    policy = PolicyModel(load_policy(path).to(device))
    cast(policy, dtype)
    found = torch.zeros(len(sampled.tokens.values))
    rows = range(sampled.responses)
    with torch.set_grad_enabled(gradients):
        for batch in policy.lay(sampled.prompt_tokens, sampled.tokens, sampled.group, rows, 4096):
            logprobs = token_logprobs(policy, batch)
            if gradients:
                (logprobs.sum() / len(found)).backward()
            found[batch.index] = logprobs.detach().cpu()
    return found, _gradient(policy.inner, gradients)


def _gradient(model: Any, gradients: bool) -> torch.Tensor:
    if not gradients:
        return torch.zeros(0)
    return torch.cat([p.grad.detach().float().cpu().flatten() for p in model.parameters()])


def _reward(name: str, path: str, template: str | None, sampled: Rollouts, device: str, dtype: str) -> Gap:
    contents = [sampled.prompts[g] for g in sampled.group]
    scorer = RewardScorer(name, path, template, device=device, dtype=dtype)
    found = torch.from_numpy(scorer.score(contents, sampled.texts))
    read = [scorer.format.conversation_tokens(c, r) for c, r in zip(contents, sampled.texts, strict=True)]
    del scorer
    release(device)
    exact = _plain_rewards(path, read, device, torch.float32)
    limit = REWARD * float(exact.std())
    if dtype != "float32":
        limit = max(limit, FEW * _rms(_plain_rewards(path, read, device, DTYPES[dtype]) - exact))
    return Gap(f"reward model {name}", _rms(found - exact), limit, "of its rewards, rms")


@torch.no_grad()
def _plain_rewards(path: str, rows: list[list[int]], device: str, dtype: torch.dtype) -> torch.Tensor:
    model: Any = load_reward_model(path, "path").to(device)
    cast(model, dtype)
    given = [torch.tensor([row], device=device) for row in rows]
    return torch.cat([model(input_ids=ids).logits[0].float().cpu() for ids in given])


def _rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


def _apart(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm()) if len(exact) else 0.0
