"""Sampling from any Hugging Face causal model, on CPU or GPU.

Each prompt is computed once and its key-value cache repeated for its samples; a finished response leaves the
batch; the log-probability of each token is kept as it is drawn. One random number for each response and step, drawn
for all responses of the item whether they are finished or not, makes a sample independent of the others' lengths.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedModel

from rlhf.data.chat import ChatFormat
from rlhf.learn.logprobs import PolicyModel, token_logprobs
from rlhf.models.load import end_tokens, max_positions
from rlhf.models.precision import cast, dtype_of
from rlhf.types import Ragged, Rollouts, WorkItem, prompt_id

COMPACT_SHARE = 0.75  # the batch is compacted when no more than this share of its rows is alive


@dataclass
class _Drawn:
    """Responses so far: B rows, filled step by step for the rows still alive."""

    tokens: list[list[int]]
    logprobs: list[list[float]]
    finished: np.ndarray
    alive: torch.Tensor = field(init=False)  # int64: which rows the model's batch holds

    def __post_init__(self) -> None:
        self.alive = torch.arange(len(self.tokens))


class TransformersEngine:
    def __init__(
        self,
        model: PreTrainedModel,
        chat: ChatFormat,
        max_new_tokens: int,
        temperature: float,
        budget: int = 4096,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        self.model, self.chat, self.device, self.budget = model.to(device).eval(), chat, device, budget
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.ends = end_tokens(model) | set(chat.end_tokens())
        if not self.ends:
            raise ValueError(
                "policy: neither its generation config nor its tokenizer says how a response ends"
            )
        self.limit = max_positions(model.config)
        self.version = 0
        self._policy = PolicyModel(model)
        cast(model, dtype_of(dtype, device))

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        parameters = dict(self.model.named_parameters())
        if parameters.keys() != weights.keys():
            raise ValueError(
                f"weights of version {version} do not fit the policy: {parameters.keys() ^ weights.keys()}"
            )
        for name, parameter in parameters.items():
            parameter.copy_(weights[name].view(parameter.shape))
        self.version = version

    @torch.inference_mode()
    def generate(self, item: WorkItem) -> Rollouts:
        started = time.perf_counter()
        prompts = [self._prompt_tokens(content) for content in item.prompts]
        drawn = self._sample(prompts, item)
        group = np.repeat(np.arange(item.groups, dtype=np.int32), item.samples)
        return Rollouts(
            item=item.id,
            version=self.version,
            seed=item.seed,
            temperature=self.temperature,
            prompts=item.prompts,
            prompt_ids=np.array([prompt_id(c) for c in item.prompts], np.uint64),
            prompt_tokens=Ragged.of(prompts, np.int32),
            group=group,
            tokens=Ragged.of(drawn.tokens, np.int32),
            logprobs=np.concatenate([np.asarray(row, np.float32) for row in drawn.logprobs]),
            finished=drawn.finished,
            texts=tuple(self.chat.tokenizer.batch_decode(drawn.tokens, skip_special_tokens=True)),
            seconds=time.perf_counter() - started,
        )

    def _prompt_tokens(self, content: object) -> list[int]:
        tokens = self.chat.prompt_tokens(content)  # type: ignore[arg-type]
        if self.limit is not None and len(tokens) + self.max_new_tokens > self.limit:
            raise ValueError(
                f"a prompt of {len(tokens)} tokens and rollout.max_new_tokens={self.max_new_tokens} exceed the "
                f"policy's {self.limit} positions: {str(content)[:80]!r}"
            )
        return tokens

    def _sample(self, prompts: Sequence[list[int]], item: WorkItem) -> _Drawn:
        rows = len(prompts) * item.samples
        drawn = _Drawn([[] for _ in range(rows)], [[] for _ in range(rows)], np.zeros(rows, bool))
        random = torch.Generator().manual_seed(item.seed)
        logits, cache, mask = self._prefill(prompts, item.samples)
        positions = mask.sum(-1)
        for step in range(self.max_new_tokens):
            uniform = torch.rand(rows, generator=random, dtype=torch.float64)[drawn.alive].to(self.device)
            tokens, logprobs = draw(logits / self.temperature, uniform)
            going = self._record(drawn, tokens, logprobs)
            if step + 1 == self.max_new_tokens or not going.any():
                break
            if going.float().mean() <= COMPACT_SHARE:
                keep = going.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                tokens, positions, mask = tokens[keep], positions[keep], mask[keep]
                drawn.alive = drawn.alive[keep.cpu()]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            output = self.model(
                input_ids=tokens[:, None],
                attention_mask=mask,
                position_ids=positions[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            logits, positions = output.logits[:, -1].float(), positions + 1
        return drawn

    def _prefill(
        self, prompts: Sequence[list[int]], samples: int
    ) -> tuple[torch.Tensor, DynamicCache, torch.Tensor]:
        """Next-token logits, cache and mask after the prompts (left-padded), each repeated for its samples."""
        width = max(len(p) for p in prompts)
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for i, prompt in enumerate(prompts):
            ids[i, width - len(prompt) :] = torch.as_tensor(prompt)
            mask[i, width - len(prompt) :] = 1
        cache = DynamicCache(config=self.model.config)
        output = self.model(
            input_ids=ids.to(self.device),
            attention_mask=mask.to(self.device),
            position_ids=(mask.cumsum(-1) - 1).clamp_min(0).to(self.device),
            past_key_values=cache,
            use_cache=True,
        )
        cache.batch_repeat_interleave(samples)
        logits = output.logits[:, -1].float().repeat_interleave(samples, 0)
        return logits, cache, mask.to(self.device).repeat_interleave(samples, 0)

    def _record(self, drawn: _Drawn, tokens: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
        """Appends a step to the rows that go on; returns, for the model's batch, which still do. [rows] bool"""
        going = torch.zeros(len(tokens), dtype=torch.bool)
        triples = zip(drawn.alive.tolist(), tokens.tolist(), logprobs.tolist(), strict=True)
        for i, (row, token, logprob) in enumerate(triples):
            if drawn.finished[row]:
                continue
            drawn.tokens[row].append(token)
            drawn.logprobs[row].append(logprob)
            drawn.finished[row] = token in self.ends
            going[i] = not drawn.finished[row]
        return going.to(self.device)

    @torch.inference_mode()
    def logprobs(self, rollouts: Rollouts) -> np.ndarray:
        flat = np.empty(len(rollouts.tokens.values), np.float32)
        rows = range(rollouts.responses)
        for batch in self._policy.lay(
            rollouts.prompt_tokens, rollouts.tokens, rollouts.group, rows, self.budget
        ):
            flat[batch.index.numpy()] = (
                token_logprobs(self._policy, batch, rollouts.temperature).cpu().numpy()
            )
        return flat


def draw(logits: torch.Tensor, uniform: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Samples one token a row by inverting the distribution function at `uniform`.

    Args:
        logits: float32 [rows, V], already divided by the temperature.
        uniform: float64 [rows] within [0, 1).

    Returns:
        Tokens int64 [rows] and their log-probabilities float32 [rows].
    """
    logprobs = torch.log_softmax(logits, -1)
    cumulative = logprobs.double().exp().cumsum(-1)
    target = uniform[:, None] * cumulative[:, -1:]
    tokens = torch.searchsorted(cumulative, target, right=True).clamp_max(logits.shape[-1] - 1)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]
