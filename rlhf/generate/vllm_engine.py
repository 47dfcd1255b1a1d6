"""Sampling by vLLM, in this process: for GPUs, where it is fast. Needs vLLM (README).

Its engine is stepped between calls, as the embedded one is. Every sample has a seed of its own, so that it is the same
alone and beside others; log-probabilities are those of the distribution that was sampled. New weights are taken in
place: what was computed with the old ones is forgotten, responses under way go on with the new ones alone, and each
token is told the version that it was sampled by.

With `rollout.options.enable_sleep_mode` (CUDA and ROCm only) it sleeps when there is no work: its weights wait in the
host's memory, and its keys and values are given up.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch

from rlhf.config import RolloutConfig
from rlhf.data.chat import ChatFormat
from rlhf.generate.dialogue import Dialogue, Sampled
from rlhf.generate.engine import Engine
from rlhf.learn.logprobs import PolicyModel, token_logprobs
from rlhf.models.load import end_tokens, load_policy, policy_outline
from rlhf.models.precision import dtype_of
from rlhf.models.reach import Reach
from rlhf.models.source import trusted
from rlhf.types import Rollouts, WorkItem

BUDGET = 4096  # tokens of one forward pass of `logprobs`
CPU_POSITIONS = 8192  # on CPUs a prompt is computed in one call, for which memory is set aside
CPU_CACHE = 2**30  # bytes of keys and values
SEEDS = 2**62  # of prompts: far enough apart for their samples', which are counted from them
OURS = {
    "model", "tokenizer", "skip_tokenizer_init", "dtype", "seed", "max_num_seqs", "generation_config", "logprobs_mode",
    "weight_transfer_config", "async_scheduling", "trust_remote_code",
}  # fmt: skip
"""Arguments of vLLM that other keys of the configuration decide, or that what is promised here depends on."""


@dataclass
class _Job:
    """A work item being sampled."""

    item: WorkItem
    prompts: list[list[int]]
    responses: list[Sampled | None]  # [B]
    left: int  # prompts
    started: float


class VllmEngine(Engine):
    """One at a time in a process: vLLM takes the default process group. `rollout.options` are arguments of its
    `EngineArgs`."""

    def __init__(
        self,
        policy: str,
        chat: ChatFormat,
        max_new_tokens: int,
        temperature: float,
        slots: int = 128,
        device: str = "cpu",
        dtype: str = "float32",
        options: Mapping[str, Any] | None = None,
    ) -> None:
        outline = policy_outline(policy)
        self._policy, self._device, self._dtype = policy, device, dtype_of(dtype, device)
        self._shapes = {name: parameter.shape for name, parameter in outline.named_parameters()}
        self.max_new_tokens, self.temperature = max_new_tokens, temperature
        self.notes = []
        reach = Reach.of(outline.config)
        given = dict(options or {})
        if device == "cpu":
            torch._dynamo.config.disable = True  # it would compile the log-probabilities, for 20 s
            positions = min(reach.limit or CPU_POSITIONS, CPU_POSITIONS)
            given = _on_cpu(given.pop("max_model_len", positions)) | given
        arguments = {
            "model": policy,
            "skip_tokenizer_init": True,
            "dtype": str(self._dtype).removeprefix("torch."),
            "seed": 0,
            "max_num_seqs": slots,
            "generation_config": "vllm",  # sampling is what the configuration says, and nothing else
            "logprobs_mode": "processed_logprobs",  # at the temperature
            "weight_transfer_config": _transfer(),
            "async_scheduling": False,  # a step would be under way with old weights
            "trust_remote_code": trusted(),
        }
        self._engine, note = _engine(policy, arguments | given)
        self.notes += note
        limit = self._engine.vllm_config.model_config.max_model_len
        if reach.limit is None or limit < reach.limit:
            self.notes.append(
                f"vLLM: prompts and responses have {limit} positions (rollout.options.max_model_len)"
            )
            reach = dataclasses.replace(reach, limit=limit)
        self._words = self._engine.vllm_config.model_config.get_vocab_size()
        self.dialogue = Dialogue(chat, end_tokens(outline), reach, max_new_tokens, temperature)
        self._jobs: dict[int, _Job] = {}
        self._tickets = 0
        self._sleeps, self._asleep = bool(given.get("enable_sleep_mode")), False
        self._latest: Mapping[str, torch.Tensor] | None = None  # weights of a version above 0
        self._scorer: PolicyModel | None = None
        self._set_version(0)

    @classmethod
    def check(cls, rollout: RolloutConfig, gpus: float) -> None:
        vllm, options = _vllm(), rollout.options
        _check_versions()
        known = {field.name for field in dataclasses.fields(vllm.EngineArgs)}
        for name in options:
            if name in OURS:
                raise ValueError(f"rollout.options.{name} is set by other keys, or must be what it is")
            if name not in known:
                raise ValueError(
                    f"rollout.options.{name} is no argument of vLLM {vllm.__version__}'s EngineArgs"
                )
        parts = options.get("tensor_parallel_size", 1)
        if gpus and parts > gpus:
            raise ValueError(
                f"rollout.options.tensor_parallel_size={parts} needs as many GPUs for each generator: "
                f"resources.generators.gpus={gpus:g}"
            )

        if 0 < gpus < 1 and not {"gpu_memory_utilization", "kv_cache_memory_bytes"} & set(options):
            raise ValueError(
                f"resources.generators.gpus={gpus:g}: vLLM would take most of a GPU that it shares; give "
                "rollout.options.gpu_memory_utilization, the part of its memory that vLLM may take"
            )

    @classmethod
    def identity(cls, rollout: RolloutConfig) -> object:
        return (super().identity(rollout), importlib.metadata.version(_distribution()))

    @classmethod
    def open(cls, policy: str, chat: ChatFormat, rollout: RolloutConfig, device: str) -> Self:
        return cls(
            policy,
            chat,
            rollout.max_new_tokens,
            rollout.temperature,
            rollout.slots,
            device,
            rollout.dtype,
            rollout.options,
        )

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self._wake()  # its allocator frees what is there
        self._engine.engine_core.shutdown()
        del self._engine
        self._scorer = self._latest = None
        cleanup_dist_env_and_memory()

    def rest(self) -> None:
        assert not self.busy
        if self._sleeps and not self._asleep:
            self._engine.sleep(
                level=1
            )  # at 2 the weights would be lost, and what was computed of them when loaded
            self._asleep = True

    def _wake(self) -> None:
        if self._asleep:
            self._engine.wake_up()
            self._asleep = False

    def set_weights(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        if weights.keys() != self._shapes.keys():
            odd = sorted(weights.keys() ^ self._shapes.keys())
            raise ValueError(f"weights of version {version} do not fit the policy: {', '.join(odd[:4])}")
        shaped = {}
        for name, shape in self._shapes.items():
            if weights[name].numel() != shape.numel():
                raise ValueError(
                    f"weights of version {version} do not fit the policy: {name} has {weights[name].numel()} numbers, "
                    f"not {list(shape)}"
                )
            shaped[name] = weights[name].view(shape).to(self._dtype)
        self._wake()
        for call, arguments in (
            ("start_weight_update", ()),
            ("update_weights", ({"weights": shaped},)),
            ("finish_weight_update", ()),
        ):
            self._engine.collective_rpc(call, args=arguments)
        if not self._engine.reset_prefix_cache(reset_running_requests=True):
            raise RuntimeError("vLLM keeps what it computed with old weights")
        self._latest = weights
        if self._scorer is not None:
            self._fill(self._scorer)
        self._set_version(version)

    def _set_version(self, version: int) -> None:
        self._engine.set_weight_version(str(version))
        self.version = version

    @property
    def busy(self) -> bool:
        return bool(self._jobs)

    def submit(self, item: WorkItem) -> int:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        prompts = [self.dialogue.tokens(content) for content in item.prompts]
        self._wake()
        self._tickets += 1
        ticket = self._tickets
        self._jobs[ticket] = _Job(
            item, prompts, [None] * (len(prompts) * item.samples), len(prompts), time.perf_counter()
        )
        seeds = np.random.SeedSequence(item.seed).generate_state(len(prompts), np.uint64) % SEEDS
        for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            settings = SamplingParams(
                n=item.samples,
                temperature=self.temperature,
                max_tokens=self.max_new_tokens,
                seed=int(seed),
                stop_token_ids=sorted(end for end in self.dialogue.ends if end < self._words),
                logprobs=0,
                flat_logprobs=True,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
            )
            self._engine.add_request(f"{ticket}/{number}", {"prompt_token_ids": prompt}, settings)
        return ticket

    def advance(self) -> list[tuple[int, Rollouts]]:
        done = []
        for output in self._engine.step():
            if output.finished:
                ticket, number = map(int, output.request_id.split("/"))
                job = self._jobs[ticket]
                for answer in output.outputs:
                    job.responses[number * job.item.samples + answer.index] = self._sampled(answer)
                job.left -= 1
                if not job.left:
                    done.append((ticket, self._rollouts(self._jobs.pop(ticket))))
        return done

    def _sampled(self, answer: Any) -> Sampled:
        tokens = np.array(answer.token_ids, np.int32)
        logprobs = np.array(answer.logprobs.logprobs, np.float32)
        versions = np.concatenate(
            [np.full(span.end - span.start, int(span.version), np.int32) for span in answer.weight_versions]
        )
        if not len(tokens) == len(logprobs) == len(versions):
            raise RuntimeError(
                f"vLLM gave {len(tokens)} tokens, {len(logprobs)} log-probabilities and {len(versions)} versions"
            )
        if not np.isfinite(logprobs).all():
            raise ValueError(
                f"policy of version {self.version}: a response has logits that are not numbers; its weights have "
                "diverged (lower align.learning_rate) or are broken"
            )
        return Sampled(tokens, logprobs, versions, int(tokens[-1]) in self.dialogue.ends)

    def _rollouts(self, job: _Job) -> Rollouts:
        responses = [response for response in job.responses if response is not None]
        assert len(responses) == len(job.responses)
        return self.dialogue.rollouts(job.item, job.prompts, responses, job.started)

    @torch.inference_mode()
    def logprobs(self, rollouts: Rollouts) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """By a model of our own: vLLM's of given tokens are those at temperature 1."""
        config = self._engine.vllm_config
        if self._scorer is None:
            with _eager(config):
                self._scorer = PolicyModel(load_policy(self._policy, dtype=self._dtype).to(self._device))
            self._fill(self._scorer)
        scorer, rows = self._scorer, range(rollouts.responses)
        for batch in scorer.lay(rollouts.prompt_tokens, rollouts.tokens, rollouts.group, rows, BUDGET):
            with _eager(config):
                values = token_logprobs(scorer, batch, rollouts.temperature)
            yield batch.index.numpy(), values.cpu().numpy()

    @torch.no_grad()
    def _fill(self, scorer: PolicyModel) -> None:
        if self._latest is not None:
            for name, parameter in scorer.inner.named_parameters():
                parameter.copy_(self._latest[name].view(parameter.shape))


def _engine(policy: str, arguments: dict[str, Any]) -> tuple[Any, list[str]]:
    """vLLM's engine of a policy, and a note if it samples it by transformers' code.

    Raises:
        ValueError: vLLM does not take the policy.
    """
    from vllm.distributed import cleanup_dist_env_and_memory

    vllm = _vllm()

    def start(**more: str) -> Any:
        return vllm.LLMEngine.from_engine_args(vllm.EngineArgs(**arguments, **more))

    refused = f"policy ({policy}): vLLM {vllm.__version__} does not take it"
    try:
        return start(), []
    except Exception as error:  # whatever vLLM has against a model
        if "model_impl" in arguments:
            raise ValueError(f"{refused}: {error}") from error
        reason = error
    cleanup_dist_env_and_memory()
    try:
        engine = start(model_impl="transformers")
    except Exception as error:
        raise ValueError(f"{refused}: {reason}; nor by transformers' code: {error}") from error
    return engine, [
        f"vLLM: the policy is sampled by transformers' code, as vLLM's own does not take it: {reason}"
    ]


@contextmanager
def _eager(config: Any) -> Iterator[None]:
    """Within it, models of transformers are made and called as they are. (Where vLLM samples by transformers' code it
    changes its classes, which then want vLLM's configuration.)"""
    from vllm.config import CompilationConfig, CompilationMode, set_current_vllm_config

    plain = copy(config)
    plain.compilation_config = CompilationConfig(mode=CompilationMode.NONE)
    with set_current_vllm_config(plain):
        yield


def _on_cpu(positions: int) -> dict[str, Any]:
    """What vLLM needs on CPUs."""
    return {
        "max_model_len": positions,
        "max_num_batched_tokens": positions,
        "enable_chunked_prefill": False,  # with it, requests with seeds end in an error
        "block_size": 32,  # of 128, half of a short prompt would be computed again for each sample
        "kv_cache_memory_bytes": CPU_CACHE,
        "enforce_eager": True,
    }


def _transfer() -> Any:
    from vllm.config import WeightTransferConfig

    from rlhf.generate import vllm_weights

    vllm_weights.register()
    return WeightTransferConfig(backend=vllm_weights.BACKEND)


def _distribution() -> str:
    """The package that brings vLLM: that for GPUs, or for CPUs."""
    return importlib.metadata.packages_distributions()["vllm"][0]


def _check_versions() -> None:
    """
    Raises:
        ValueError: torch or transformers are not those that this vLLM goes with.
    """
    from packaging.requirements import Requirement

    package = _distribution()
    for wanted in map(Requirement, importlib.metadata.requires(package) or ()):
        if wanted.name not in ("torch", "transformers") or (wanted.marker and not wanted.marker.evaluate()):
            continue
        found = importlib.metadata.version(wanted.name)
        if not wanted.specifier.contains(found, prereleases=True):
            raise ValueError(
                f"rollout.engine=vllm: {package} {importlib.metadata.version(package)} goes with {wanted.name} "
                f"{wanted.specifier}, and {found} is installed; constraints-vllm.txt has versions that go together"
            )


def _vllm() -> Any:
    """The module.

    Raises:
        ValueError: it is not installed.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # the engine is in this process
    # else every generator binds itself to core 0
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    try:
        import vllm
    except ImportError as error:
        raise ValueError(
            f"rollout.engine=vllm: vLLM cannot be imported ({error}); see README, vLLM"
        ) from error
    return vllm
