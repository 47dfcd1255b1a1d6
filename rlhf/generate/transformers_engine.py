"""Sampling from any Hugging Face causal model, on CPU or GPU.

Each prompt is computed once for all its samples. Up to `slots` responses are sampled at a time; one that has ended
leaves, and another takes its place, of the same work item or of the next. The log-probability of each token is kept as
it is drawn. One random number for each response of an item and step makes a sample independent of the others' lengths.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Self

import numpy as np
import torch
from transformers import PreTrainedModel

from rlhf.config import RolloutConfig
from rlhf.data.chat import ChatFormat
from rlhf.generate.choice import row_cache
from rlhf.generate.dialogue import Dialogue, Sampled
from rlhf.generate.engine import Engine
from rlhf.generate.proof import Proof
from rlhf.learn.logprobs import PolicyModel, token_logprobs
from rlhf.models.device import is_gpu, release
from rlhf.models.load import end_tokens, load_policy
from rlhf.models.packed import pack, receivers
from rlhf.models.precision import cast, dtype_of
from rlhf.models.reach import Reach
from rlhf.types import Rollouts, WorkItem

COMPACT_SHARE = 0.75
"""Rows are rearranged when no more than this share of the slots, or of the rows, is alive."""


@dataclass
class _Job:
    """A work item being sampled: B rows of at most N tokens."""

    ticket: int
    item: WorkItem
    prompts: list[list[int]]
    tokens: np.ndarray  # int32 [B, N]
    logprobs: np.ndarray  # float32 [B, N]
    versions: np.ndarray  # int32 [B, N]
    lengths: np.ndarray  # int64 [B]
    finished: np.ndarray  # bool [B]
    random: torch.Generator
    left: int
    started: float = field(default_factory=time.perf_counter)
    drawn: list[np.ndarray] = field(default_factory=list)  # of each step, float64 [B]

    @classmethod
    def of(cls, ticket: int, item: WorkItem, prompts: list[list[int]], most: int) -> _Job:
        rows = len(prompts) * item.samples
        return cls(
            ticket,
            item,
            prompts,
            np.zeros((rows, most), np.int32),
            np.zeros((rows, most), np.float32),
            np.zeros((rows, most), np.int32),
            np.zeros(rows, np.int64),
            np.zeros(rows, bool),
            torch.Generator().manual_seed(item.seed),
            rows,
        )

    def uniform(self, rows: np.ndarray, steps: np.ndarray) -> np.ndarray:
        """The random numbers of rows at their own steps, float64 within [0, 1)."""
        while len(self.drawn) <= steps.max():
            numbers = torch.rand(len(self.lengths), generator=self.random, dtype=torch.float64)
            self.drawn.append(numbers.numpy())
        return np.array([self.drawn[s][r] for s, r in zip(steps, rows, strict=True)])


@dataclass
class _Prompt:
    """A prompt of a job with responses still to start."""

    job: _Job
    index: int
    first: int  # response to start next, of the prompt's own
    handle: int | None = None  # in the cache, once computed
    logits: torch.Tensor | None = None  # of the first token, [V]
    version: int = 0  # of the weights that gave them
    alive: int = 0  # rows of it


@dataclass
class _Rows:
    """The responses in the cache, in its order."""

    prompts: list[_Prompt]
    index: np.ndarray  # int64 [R], the response of its job
    logits: torch.Tensor  # float32 [R, V], of the next token
    versions: np.ndarray  # int32 [R], of the weights that gave them

    def __len__(self) -> int:
        return len(self.prompts)


class TransformersEngine(Engine):
    """`submit` work items and `advance` until they are returned; or `generate` one."""

    def __init__(
        self,
        model: PreTrainedModel,
        chat: ChatFormat,
        max_new_tokens: int,
        temperature: float,
        slots: int = 128,
        budget: int = 4096,
        device: str = "cpu",
        dtype: str = "float32",
    ) -> None:
        self.model, self.device, self.budget = model.to(device).eval(), device, budget
        self.max_new_tokens, self.temperature, self.slots = max_new_tokens, temperature, slots
        self.reach = Reach.of(model.config)
        self.dialogue = Dialogue(chat, end_tokens(model), self.reach, max_new_tokens, temperature)
        self._ends = np.array(sorted(self.dialogue.ends))
        self.version = self._tickets = 0
        proof = Proof(model, max_new_tokens)
        self._policy = PolicyModel(model)
        cast(model, dtype_of(dtype, device))
        proof.measure(model)
        pack(model, min(slots, 64), tied=True)
        self._cache, refused = row_cache(model, max_new_tokens, budget, proof)
        self.notes = [*self._policy.notes, *refused]
        self._waiting: deque[_Prompt] = deque()
        self._rows: _Rows | None = None
        self._done: list[_Job] = []

    @classmethod
    def check(cls, rollout: RolloutConfig, gpus: float) -> None:
        super().check(rollout, gpus)
        if gpus > 1:
            raise ValueError(
                f"resources.generators.gpus={gpus:g}: rollout.engine={rollout.engine} samples on one GPU; raise "
                "resources.generators.count instead"
            )

    @classmethod
    def open(cls, policy: str, chat: ChatFormat, rollout: RolloutConfig, device: str) -> Self:
        return cls(
            load_policy(policy),
            chat,
            rollout.max_new_tokens,
            rollout.temperature,
            rollout.slots,
            device=device,
            dtype=rollout.dtype,
        )

    def rest(self) -> None:
        """Keys and values went with the last response; what PyTorch keeps of their memory goes here."""
        assert not self.busy
        if is_gpu(self.device):
            release(self.device)

    @torch.no_grad()
    def set_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Of responses under way the next token is still that of the old weights, and what is kept of them stays."""
        takers = receivers(self.model)
        if takers.keys() != weights.keys():
            raise ValueError(
                f"weights of version {version} do not fit the policy: {takers.keys() ^ weights.keys()}"
            )
        for name, parts in takers.items():
            for take in parts:
                take(weights[name])
        self.version = version

    @property
    def busy(self) -> bool:
        return bool(self._waiting) or self._rows is not None

    def submit(self, item: WorkItem) -> int:
        """Takes a work item on, after those there are; the ticket under which `advance` returns it."""
        prompts = [self.dialogue.tokens(content) for content in item.prompts]
        self._tickets += 1
        job = _Job.of(self._tickets, item, prompts, self.max_new_tokens)
        self._waiting.extend(_Prompt(job, i, 0) for i in range(len(prompts)))
        return job.ticket

    @torch.inference_mode()
    def advance(self) -> list[tuple[int, Rollouts]]:
        """Samples a token of every response in the batch; the work items that this ends, by their tickets."""
        self._arrange()
        rows = self._rows
        assert rows is not None
        uniform, steps = self._uniform(rows)
        tokens, logprobs = draw(rows.logits / self.temperature, uniform)
        drawn, found = tokens.cpu().numpy(), logprobs.cpu().numpy()
        self._check(rows, found)
        going = self._record(rows, steps, drawn, found)
        done = [(job.ticket, self._rollouts(job)) for job in self._done]
        self._done = []
        if not going.any() and not (self._cache.joins and self._waiting):
            self._leave(rows, np.zeros(0, np.int64))
            self._cache.clear()
            self._rows = None
            return done
        free = self._cache.joins and self._waiting and going.sum() <= COMPACT_SHARE * self.slots
        if free or going.mean() <= COMPACT_SHARE:
            chosen = np.flatnonzero(going)
            rows = self._leave(rows, chosen)
            tokens = tokens[torch.from_numpy(chosen).to(tokens.device)]
        if len(rows):
            rows.logits = self._cache.step(tokens)
            rows.versions = np.full(len(rows), self.version, np.int32)
        self._rows = rows
        return done

    def _check(self, rows: _Rows, logprobs: np.ndarray) -> None:
        """Refuses what no distribution gave: logits that are not all numbers draw a token of probability nan."""
        bad = np.flatnonzero(~np.isfinite(logprobs))
        if len(bad):
            prompt = rows.prompts[bad[0]]
            item = prompt.job.item
            raise ValueError(
                f"policy of version {self.version}: {len(bad)} of {len(rows)} responses have logits that are not "
                f"numbers, the first to {str(item.prompts[prompt.index])[:80]!r} (work item {item.id}); its weights "
                "have diverged (lower align.learning_rate) or are broken"
            )

    def _arrange(self) -> None:
        """Lets waiting responses take the free slots."""
        rows = self._rows
        if not self._waiting or (rows is not None and not self._cache.joins):
            return
        free = self.slots - (0 if rows is None else len(rows))
        starts: list[_Prompt] = []
        while self._waiting and len(starts) < free:
            prompt = self._waiting[0]
            others = starts or ([] if rows is None else rows.prompts)
            if others and self._switched(prompt) != self._switched(others[0]):
                break  # until these have left
            take = min(free - len(starts), prompt.job.item.samples - prompt.first)
            starts += [prompt] * take
            prompt.first += take
            if prompt.first == prompt.job.item.samples:
                self._waiting.popleft()
        if not starts:
            return
        distinct = list({id(p): p for p in starts}.values())
        fresh = [p for p in distinct if p.handle is None or not self._cache.joins]
        if fresh:
            handles, logits = self._cache.prefill([p.job.prompts[p.index] for p in fresh])
            for prompt, handle, row in zip(fresh, handles, logits, strict=True):
                prompt.handle, prompt.logits, prompt.version = handle, row, self.version
        self._cache.join([p.handle for p in starts if p.handle is not None])
        index: list[np.ndarray] = []
        first_logits: list[torch.Tensor] = []
        versions: list[np.ndarray] = []
        for prompt in distinct:
            count = sum(p is prompt for p in starts)
            prompt.alive += count
            first = prompt.index * prompt.job.item.samples + prompt.first - count
            index.append(np.arange(first, first + count))
            assert prompt.logits is not None
            first_logits.append(prompt.logits.expand(count, -1))
            versions.append(np.full(count, prompt.version, np.int32))
        if rows is None:
            self._rows = _Rows(
                starts, np.concatenate(index), torch.cat(first_logits), np.concatenate(versions)
            )
        else:
            self._rows = _Rows(
                rows.prompts + starts,
                np.concatenate([rows.index, *index]),
                torch.cat([rows.logits, *first_logits]),
                np.concatenate([rows.versions, *versions]),
            )

    def _switched(self, prompt: _Prompt) -> bool:
        """Whether the prompt is on the far side of the model's switch: those on both sides never share a call."""
        return bool(self.reach.switched(np.array([len(prompt.job.prompts[prompt.index])]))[0])

    def _leave(self, rows: _Rows, chosen: np.ndarray) -> _Rows:
        """The chosen rows stay; prompts without rows or responses to start are forgotten."""
        self._cache.keep(torch.from_numpy(chosen))
        stay = set(chosen.tolist())
        for i, prompt in enumerate(rows.prompts):
            if i not in stay:
                prompt.alive -= 1
                if not prompt.alive and prompt.first == prompt.job.item.samples:
                    assert prompt.handle is not None
                    self._cache.release(prompt.handle)
        return _Rows(
            [rows.prompts[i] for i in chosen], rows.index[chosen], rows.logits[chosen], rows.versions[chosen]
        )

    def _jobs(self, rows: _Rows) -> list[tuple[_Job, np.ndarray]]:
        """The jobs of the rows, and which rows are whose."""
        places: dict[int, list[int]] = {}
        jobs: dict[int, _Job] = {}
        for i, prompt in enumerate(rows.prompts):
            jobs[id(prompt.job)] = prompt.job
            places.setdefault(id(prompt.job), []).append(i)
        return [(jobs[key], np.array(found)) for key, found in places.items()]

    def _uniform(self, rows: _Rows) -> tuple[torch.Tensor, np.ndarray]:
        numbers, steps = np.zeros(len(rows)), np.zeros(len(rows), np.int64)
        for job, places in self._jobs(rows):
            index = rows.index[places]
            steps[places] = job.lengths[index]
            alive = ~self._ended(job, index)
            if alive.any():
                numbers[places[alive]] = job.uniform(index[alive], steps[places[alive]])
        return torch.from_numpy(numbers).to(self.device), steps

    def _ended(self, job: _Job, index: np.ndarray) -> np.ndarray:
        return job.finished[index] | (job.lengths[index] == self.max_new_tokens)

    def _record(self, rows: _Rows, steps: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> np.ndarray:
        """Appends a token to the rows that had not ended; which go on. bool [R]"""
        going = np.zeros(len(rows), bool)
        for job, places in self._jobs(rows):
            alive = places[~self._ended(job, rows.index[places])]
            index = rows.index[alive]
            job.tokens[index, steps[alive]] = tokens[alive]
            job.logprobs[index, steps[alive]] = logprobs[alive]
            job.versions[index, steps[alive]] = rows.versions[alive]
            job.lengths[index] += 1
            job.finished[index] = np.isin(tokens[alive], self._ends)
            ended = self._ended(job, index)
            going[alive] = ~ended
            job.left -= int(ended.sum())
            if not job.left and ended.any():
                self._done.append(job)
        return going

    def _rollouts(self, job: _Job) -> Rollouts:
        responses = [
            Sampled(tokens[:n], logprobs[:n], versions[:n], bool(finished))
            for tokens, logprobs, versions, n, finished in zip(
                job.tokens, job.logprobs, job.versions, job.lengths, job.finished, strict=True
            )
        ]
        return self.dialogue.rollouts(job.item, job.prompts, responses, job.started)

    @torch.inference_mode()
    def logprobs(self, rollouts: Rollouts) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        rows = range(rollouts.responses)
        lay = self._policy.lay
        for batch in lay(rollouts.prompt_tokens, rollouts.tokens, rollouts.group, rows, self.budget):
            values = token_logprobs(self._policy, batch, rollouts.temperature)
            yield batch.index.numpy(), values.cpu().numpy()


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
