"""One rank of a learner: a DeepSpeed engine driven by an objective.

Gradients accumulate over any number of micro-batches, of any size, and one optimiser step ends the batch. DeepSpeed
averages gradients over ranks, so losses are scaled by the number of ranks to make it a sum. Ranks
differ in their number of micro-batches at times; those that have fewer add empty ones, because the
collectives of ZeRO 2 and 3 must be entered by all. In bfloat16, too, gradients add up in float32, over micro-batches
and over ranks.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from rlhf.config import DeepSpeedConfig
from rlhf.learn.batching import TokenBatch
from rlhf.learn.critic import ValueModel
from rlhf.learn.engine import deepspeed_settings
from rlhf.learn.logprobs import PolicyModel
from rlhf.learn.objectives import Metrics, MicroBatch, Objective
from rlhf.learn.recompute import recompute_layers
from rlhf.learn.sums import sum_in_float32
from rlhf.models.classifier import Classifier
from rlhf.models.lora import is_adapted, merged_parameters

Part = TypeVar("Part")
Pass = Callable[[torch.nn.Module, TokenBatch], torch.Tensor]


@dataclass(frozen=True)
class Weights:
    """All parameters of a model in one flat buffer, which an object store shares without a copy."""

    names: tuple[str, ...]
    offsets: np.ndarray  # int64 [parameters + 1]
    buffer: np.ndarray  # float32, or the bits of bfloat16 as int16, [sum of sizes]

    @classmethod
    def of(
        cls, named: Mapping[str, torch.Tensor], dtype: torch.dtype, over: Weights | None = None
    ) -> Weights:
        """A copy of the parameters; in the memory of `over`, earlier weights of the same model, if given."""
        sizes = [value.numel() for value in named.values()]
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        flat = torch.empty(int(offsets[-1]), dtype=dtype)
        if over is not None:
            flat = torch.from_numpy(over.buffer).view(dtype)
        for value, part in zip(named.values(), flat.split(sizes), strict=True):
            part.copy_(value.detach().reshape(-1))
        bits = flat.view(torch.int16) if dtype == torch.bfloat16 else flat
        return cls(tuple(named), offsets, bits.numpy())

    def tensors(self) -> dict[str, torch.Tensor]:
        """Name to a flat view of the buffer, to be read only."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch cannot mark a tensor as read-only, and warns
            flat = torch.from_numpy(self.buffer)
        flat = flat.view(torch.bfloat16) if flat.dtype == torch.int16 else flat
        spans = zip(self.names, self.offsets, self.offsets[1:], strict=False)
        return {name: flat[start:end] for name, start, end in spans}


class Trainer:
    """Trains one model. Every rank holds one, and every rank calls the same methods in the same order."""

    def __init__(
        self,
        model: torch.nn.Module,
        config: DeepSpeedConfig,
        weight_decay: float,
        max_grad_norm: float,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        import deepspeed
        from deepspeed.utils import set_z3_leaf_module

        self.rank, self.world, self.budget, self.stage = (
            rank,
            world,
            config.micro_batch_tokens,
            config.zero_stage,
        )
        wrapped = isinstance(model, Classifier | PolicyModel | ValueModel)
        self.model: Any = model.inner if wrapped else model  # what is saved
        model.eval()  # without dropout: the sampler has none, and importance weights compare the two
        sum_in_float32(model)
        if config.activation_checkpointing:
            recompute_layers(model)
        if isinstance(model, PolicyModel) and model.gathered is not None:
            set_z3_leaf_module(model.gathered, True)
        parameters = [p for p in model.parameters() if p.requires_grad]
        device = next(model.parameters()).device.type
        settings = deepspeed_settings(config, 1e-3, weight_decay, max_grad_norm, device)
        with redirect_stdout(StringIO()):  # DeepSpeed prints the memory it takes
            self.engine, *_ = deepspeed.initialize(model=model, model_parameters=parameters, config=settings)
        self.objective: Objective | None = None
        self.beats = 0  # passes made, for who wants to know whether it gets on
        self._norm: float | None = None
        if not self.engine.zero_optimization():  # then DeepSpeed clips but keeps no norm
            self.engine.clip_fp32_gradients = self._clip
        # one rank has nothing to add up, but DeepSpeed would copy all gradients into a buffer and back
        if config.zero_stage == 0:
            self.engine.enable_backward_allreduce = world > 1

    def step(self, batch: Any, learning_rate: float, step: int = 0) -> Metrics:
        """One optimiser step on a batch of the objective."""
        assert self.objective is not None
        parts = self.objective.micro_batches(batch, self.rank, self.world, self.budget)
        return self.update(parts, learning_rate, step)

    def update(self, parts: list[MicroBatch], learning_rate: float, step: int = 0) -> Metrics:
        """One optimiser step on this rank's micro-batches. Metrics are this rank's part of sums over ranks; grad_norm
        is the whole gradient's, before clipping.

        Raises:
            NotFinite: a loss or the gradient is; on every rank. Weights, moments and step count are what they were,
                nothing of the gradient is left, and training may go on.
        """
        for group in self.engine.optimizer.param_groups:
            group["lr"] = learning_rate
        metrics: Metrics = {}
        losses = []
        for part in self._even(parts, MicroBatch(_nothing, 0)):
            loss, sums = part.loss(self.engine)
            if not torch.isfinite(loss):
                losses.append(f"the loss of {_listed(part.rows)} is {loss.item()}")
                loss = loss * torch.nan  # so that no rank finds a finite gradient
            self.engine.backward(loss * self.world)
            self.beats += 1
            for key, value in sums.items():
                metrics[key] = metrics.get(key, 0.0) + value
        norm = self._stepped()
        if not math.isfinite(norm):
            rows = [row for part in parts for row in part.rows]
            raise NotFinite(
                f"step {step + 1}: {self._first(losses, rows)}: the model's weights may hold NaN, or they grew without "
                f"bound: look at them, or lower the learning rate ({learning_rate})"
            )
        assert not losses
        metrics["grad_norm"] = norm
        return metrics

    def _stepped(self) -> float:
        """The whole gradient's norm, after a step with it; without one, if the norm is not finite."""
        self.engine.step()
        norm = self._norm if self._norm is not None else self.engine.get_global_grad_norm()
        assert norm is not None
        return float(norm)

    def _first(self, losses: list[str], rows: list[str]) -> str:
        """What is not finite, of all ranks: the same on each."""
        own = [(0, loss) for loss in losses]
        if rows:
            own.append((1, f"the gradient of {_listed(rows)} is not finite"))
        every = [own]
        if self.world > 1:
            every = [[] for _ in range(self.world)]
            torch.distributed.all_gather_object(every, own)
        return min((what for found in every for what in found), key=lambda what: what[0])[1]

    @torch.no_grad()
    def passes(self, batches: list[TokenBatch], call: Pass) -> list[torch.Tensor]:
        """What `call` makes of the model and each batch, without gradient, on the CPU.

        Under ZeRO 3 every rank makes as many passes as the one that has the most: each is a collective.
        """
        found = []
        every: list[TokenBatch | None] = list(batches)
        for batch in self._even(every, None) if self.stage == 3 else every:
            self.beats += 1
            if batch is None:
                _nothing(self.engine)
            else:
                found.append(call(self.engine, batch).float().cpu())
        return found

    @torch.no_grad()
    def values(self, data: Any, indices: np.ndarray) -> np.ndarray:
        """What the objective measures each of these rows by (margins of pairs), float32 [len(indices)], the same on
        every rank."""
        assert self.objective is not None
        parts = self.objective.micro_batches((data, indices), self.rank, self.world, self.budget)
        found = torch.zeros(len(data))
        for part in self._even(parts, MicroBatch(_nothing, 0)) if self.stage == 3 else parts:
            self.beats += 1
            if part.values is None:
                part.loss(self.engine)
            else:
                found[list(part.numbers)] = part.values(self.engine).float().cpu()
        return self.over_ranks(found)[indices].numpy()

    def over_ranks(self, sums: torch.Tensor) -> torch.Tensor:
        """Adds up a tensor over all ranks."""
        if self.world == 1:
            return sums
        everywhere = sums.to(self.engine.device)
        torch.distributed.all_reduce(everywhere)
        return everywhere.cpu()

    def _clip(self) -> None:
        """Of parts of gradients first: a norm of millions of float32 squares, added one by one, is off by 1e-4."""
        parameters = [p for p in self.engine.module.parameters() if p.grad is not None]
        parts = [part for p in parameters for part in p.grad.flatten().split(2**15)]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(parts)))
        self._norm = float(norm)
        if not math.isfinite(self._norm):
            self.engine.zero_grad()  # to none: Adam leaves out what has no gradient
            return
        torch.nn.utils.clip_grads_with_norm_(parameters, self.engine.gradient_clipping(), norm)

    def _even(self, parts: list[Part], empty: Part) -> list[Part]:
        """Every rank's list made as long as the longest, by parts that change nothing."""
        most = len(parts)
        if self.world > 1:
            count = torch.tensor([most], device=self.engine.device)
            torch.distributed.all_reduce(count, torch.distributed.ReduceOp.MAX)
            most = int(count.item())
        return parts + [empty] * (most - len(parts))

    def _full(self, parameter: torch.nn.Parameter) -> torch.Tensor:
        """A whole parameter, float32 on the CPU; every rank takes part (ZeRO 3 keeps parameters apart)."""
        if self.stage == 3 and parameter.requires_grad:
            from deepspeed.utils import safe_get_full_fp32_param

            return safe_get_full_fp32_param(parameter).detach().float().cpu()
        if self.stage == 3:  # a frozen one has no float32 copy
            import deepspeed

            with deepspeed.zero.GatheredParameters([parameter]):
                return parameter.detach().float().cpu().clone()
        return parameter.detach().float().cpu()

    def _parameters(self) -> dict[str, torch.Tensor]:
        """Every parameter as the plain model names it, whole, float32 on the CPU; adapters are merged in."""
        full = {name: self._full(parameter) for name, parameter in self.model.named_parameters()}
        return merged_parameters(self.model, full) if is_adapted(self.model) else full

    def weights(self, over: Weights | None = None) -> Weights | None:
        """The current parameters in the format they compute in, in the memory of earlier ones if given; on the ranks
        other than 0, None."""
        own = self.stage == 3 or is_adapted(self.model)
        named = self._parameters() if own else dict(self.model.named_parameters())
        return Weights.of(named, self._dtype, over) if self.rank == 0 else None

    @property
    def _dtype(self) -> torch.dtype:
        return next(self.model.parameters()).dtype

    def save(self, path: Path) -> None:
        """Writes the model, adapters merged in, as `from_pretrained` reads it; and an adapter apart, to `path`/adapter
        (rank 0 writes)."""
        adapted = is_adapted(self.model)
        plain = self.model.get_base_model() if adapted else self.model
        state = None
        if self.stage == 3 or adapted:
            kept = {n: b.detach().cpu() for n, b in plain.named_buffers() if n in plain.state_dict()}
            state = {n: p.to(self._dtype) for n, p in self._parameters().items()} | kept
        adapter = {n: self._full(p) for n, p in self.model.named_parameters() if ".lora_" in n}
        if self.rank == 0:
            plain.save_pretrained(path, state_dict=state)
            if adapted:
                self.model.save_pretrained(path / "adapter", state_dict=adapter)


class NotFinite(ValueError):
    """A loss or a gradient is not finite, so no step was taken."""


def _nothing(model: torch.nn.Module) -> tuple[torch.Tensor, Metrics]:
    """An empty micro-batch: it calls what a full one calls, and its gradient is 0."""
    device = next(model.parameters()).device
    ids = torch.zeros(1, 1, dtype=torch.long, device=device)
    output = model(input_ids=ids, attention_mask=torch.ones_like(ids))
    return output[..., :0].float().sum(), {}


def _listed(rows: Sequence[str], most: int = 8) -> str:
    """The first of some names.

    >>> _listed(["example 3", "example 9", "example 4"], most=2)
    'example 3, example 9 and 1 more'
    """
    more = f" and {len(rows) - most} more" if len(rows) > most else ""
    return ", ".join(rows[:most]) + more
