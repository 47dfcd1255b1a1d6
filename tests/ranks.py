"""Training runs that learner ranks do together, each in a process of its own, without Ray."""

from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import socket
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf.config import AlgorithmConfig, CriticConfig, DeepSpeedConfig, LoraConfig
from rlhf.learn import logprobs
from rlhf.learn.alignment import Aligner, ReferencePolicy
from rlhf.learn.batching import Layout
from rlhf.learn.critic import ValueModel
from rlhf.learn.logprobs import PolicyModel
from rlhf.learn.objectives import BradleyTerry, MicroBatch, PreferencePairs, Supervised, TokenPairs
from rlhf.learn.trainer import Trainer
from rlhf.models.classifier import Classifier
from rlhf.models.lora import adapter_off, with_adapter
from rlhf.types import Experience, Ragged, Rewards, Rollouts

WORDS = 500
CHUNK = 32 * WORDS
"""A head computes 32 tokens at a time."""

Steps = list[dict[str, float]]


class Ranks:
    """What a run is given: its rank, the stage, and engines around models."""

    def __init__(
        self,
        rank: int,
        world: int,
        stage: int,
        dtype: str = "float32",
        offload: bool = False,
        recompute: bool = False,
    ) -> None:
        self.rank, self.world, self.stage, self.dtype = rank, world, stage, dtype
        self.offload, self.recompute = offload, recompute

    def trainer(self, model: torch.nn.Module, budget: int, clip: float = 1.0) -> Trainer:
        settings = DeepSpeedConfig(self.stage, self.dtype, budget, self.offload, self.recompute)
        return Trainer(model, settings, 0.0, clip, self.rank, self.world)


def config(kind: str = "Llama", vocabulary: int = WORDS, **changes: Any) -> Any:
    values = {
        "vocab_size": vocabulary,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
        "initializer_range": 0.3,
    }
    return getattr(transformers, f"{kind}Config")(**(values | changes))


def causal(kind: str = "Llama", **changes: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(kind, **changes)).eval()


def classifier(kind: str = "Llama", **changes: Any) -> Any:
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_config(config(kind, num_labels=1, **changes)).eval()


def tokens(lengths: Any, vocabulary: int = WORDS, seed: int = 0) -> Ragged:
    rng = np.random.default_rng(seed)
    return Ragged.of([rng.integers(2, vocabulary, size=n) for n in lengths], np.int32)


def supervised(
    at: Ranks,
    lengths: list[int],
    vocabulary: int = WORDS,
    chunk: int = CHUNK,
    budget: int = 64,
    **changes: Any,
) -> tuple[Steps, Trainer]:
    policy = PolicyModel(causal(vocabulary=vocabulary, **changes), chunk)
    assert policy.by_chunks
    trainer = at.trainer(policy, budget)
    trainer.objective = Supervised(policy.lay)
    data = TokenPairs(tokens([3] * len(lengths), vocabulary, 1), tokens(lengths, vocabulary))
    return [trainer.step((data, np.arange(len(lengths))), 1e-3, step) for step in range(2)], trainer


def preferences(at: Ranks, lengths: list[int], budget: int = 128, **changes: Any) -> tuple[Steps, Trainer]:
    scorer = Classifier(classifier(vocabulary=60, **changes))
    trainer = at.trainer(scorer, budget)
    trainer.objective = BradleyTerry(scorer)
    data = PreferencePairs(*(tokens(lengths, 60, seed) for seed in (0, 1)))
    return [trainer.step((data, np.arange(len(lengths))), 1e-3, step) for step in range(2)], trainer


def experiences(lengths: list[list[int]]) -> list[Experience]:
    """One of each prompt, whose responses have these lengths."""
    rng, made = np.random.default_rng(0), []
    for item, own in enumerate(lengths):
        responses = tokens(own, seed=item)
        n = len(own)
        rollouts = Rollouts(
            item=item,
            version=0,
            seed=0,
            temperature=0.7,
            prompts=("",),
            prompt_ids=np.zeros(1, np.uint64),
            prompt_tokens=tokens([4 + item], seed=100 + item),
            group=np.zeros(n, np.int32),
            tokens=responses,
            logprobs=(-np.log(WORDS) + 0.1 * rng.normal(size=sum(own))).astype(np.float32),
            versions=np.zeros(sum(own), np.int32),
            finished=np.ones(n, bool),
            texts=("",) * n,
        )
        columns = {k: np.zeros((n, 2), np.float32) for k in ("raw", "reference", "p_good", "slope")}
        combined = rng.normal(size=n).astype(np.float32)
        columns["utility"] = np.random.default_rng(item).normal(size=(n, 2)).astype(np.float32)
        rewards = Rewards(item, 0, ("a", "b"), (1.0, 0.5), combined=combined, **columns)
        made.append(Experience(rollouts, rewards))
    return made


def aligner(at: Ranks, lora: str | None = None, noise: float = 0.0, **algorithm: Any) -> Aligner:
    """RLOO, or what `algorithm` changes of it; with the adapter off as its reference, if there is one."""
    values = {
        "advantage": "leave_one_out",
        "scale": "none",
        "aggregate": "token_mean",
        "epochs": 1,
        "minibatches": 1,
        "clip_low": 0.2,
        "clip_high": 0.2,
        "importance_cap": 2.0,
        "entropy_coef": 0.0,
        "kl": "reward",
        "kl_estimator": "k1",
        "kl_target": None,
        "kl_horizon": 1000.0,
        "critic": None,
    }
    settings = AlgorithmConfig(**(values | algorithm))
    inner = causal()
    if lora is not None:
        inner = with_adapter(inner, LoraConfig(rank=2, alpha=4.0, target_modules=lora), 0)
        reference = ReferencePolicy(None, lambda: adapter_off(inner))
    else:
        reference = ReferencePolicy(PolicyModel(causal(), CHUNK))
    policy = PolicyModel(inner, CHUNK)
    moved(policy, noise)
    lay, critic = policy.lay, None
    if settings.critic is not None:
        value = ValueModel(classifier())
        moved(value, noise)
        tried = Classifier(value.inner)
        lay = lay.both(Layout(tried.packs, tried.reach))
        critic = at.trainer(value, 64)
    return Aligner(at.trainer(policy, 64), reference, critic, settings, 800, lay)


def moved(model: torch.nn.Module, by: float) -> None:
    """Changes what is trained."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += by


def aligned(
    at: Ranks, lengths: list[list[int]], lora: str | None = None, **algorithm: Any
) -> tuple[Steps, Trainer]:
    learner = aligner(at, lora, **algorithm)
    batch = experiences(lengths)
    steps = [learner.step(batch, 0.1, 1e-3, 1e-3, number=n) for n in range(2)]
    if learner.critic is not None:
        found = learner.critic.weights()
        norms = [] if found is None else [v.double().norm().item() for v in found.tensors().values()]
        steps[-1] |= {f"critic/{i}": norm for i, norm in enumerate(norms)}
    return steps, learner.policy


PPO: dict[str, Any] = {
    "advantage": "gae",
    "epochs": 2,
    "scale": "batch",
    "critic": CriticConfig(init_from=None, learning_rate=1e-3, trace=0.9, clip=0.2),
}
GDPO: dict[str, Any] = {"advantage": "gdpo", "kl": "loss", "kl_estimator": "k3"}
TARGETS = "(.*(q|v)_proj)|lm_head"
MANY, ONE = [[70, 9], [40, 20], [90, 3]], [[70, 9]]
RUNS: dict[str, Callable[[Ranks], tuple[Steps, Trainer]]] = {
    "sft, 50 000 words": lambda at: supervised(
        at, [400, 20], vocabulary=50_000, chunk=logprobs.CHUNK, budget=512, tie_word_embeddings=True
    ),
    "sft": lambda at: supervised(at, [70, 30, 90]),
    "sft, one example": lambda at: supervised(at, [70], tie_word_embeddings=True),
    "sft, one is beyond the window": lambda at: supervised(at, [70, 9, 9], kind="Mistral", sliding_window=32),
    "pairs": lambda at: preferences(at, [100, 40, 9]),
    "pairs, rows padded": lambda at: preferences(at, [100, 40, 9], kind="Falcon", alibi=False),
    "pairs, no padding token": lambda at: preferences(at, [100, 40, 9], kind="Falcon", pad_token_id=None),
    "pairs, one pair": lambda at: preferences(at, [100]),
    "rloo": lambda at: aligned(at, MANY),
    "rloo, one prompt": lambda at: aligned(at, ONE, kl="loss", kl_estimator="k3", entropy_coef=0.1),
    "reinforce++, one prompt": lambda at: aligned(at, ONE, advantage="batch_mean", scale="batch"),
    "gdpo": lambda at: aligned(at, MANY, **GDPO),
    "gdpo, one prompt": lambda at: aligned(at, ONE, **GDPO),
    "ppo": lambda at: aligned(at, MANY, **PPO),
    "ppo, one prompt": lambda at: aligned(at, ONE, **PPO),
    "lora": lambda at: aligned(at, MANY, TARGETS, epochs=2),
    "lora, one prompt": lambda at: aligned(at, ONE, TARGETS, epochs=2),
}


class Factors(torch.nn.Module):
    """A model whose gradients are what it is called with."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.values = torch.nn.Parameter(torch.zeros(size))

    def forward(self, factors: torch.Tensor) -> torch.Tensor:
        return self.values.float() * factors


def accumulated(at: Ranks) -> list[tuple[float, torch.Tensor]]:
    """The gradient norm and the weights after each of two steps at a learning rate of 1/8. The gradient of each of 16
    weights, over micro-batches and ranks, is 1 + 31 / 512, of which bfloat16 would keep the 1."""
    trainer = at.trainer(Factors(16), 64, clip=1e6)
    each = [1.0, *[2.0**-9] * 31][at.rank :: at.world]
    parts = [MicroBatch(lambda m, g=g: (m(torch.full((16,), g)).sum(), {}), 1) for g in each]
    return [
        (trainer.update(parts, 0.125, step)["grad_norm"], trainer._parameters()["values"].clone())
        for step in range(2)
    ]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _work(rank: int, world: int, port: int, work: Callable[[int, int], Any], folder: str) -> None:
    torch.set_num_threads(1)
    gc.freeze()  # DeepSpeed collects garbage for each engine
    logging.disable(logging.WARNING)
    import deepspeed
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK="0"
    )
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    torch.save(work(rank, world), Path(folder, f"{world}-{rank}"))


def together(
    work: Callable[[int, int], Any], worlds: tuple[int, ...], seconds: float
) -> dict[int, list[Any]]:
    """What `work(rank, world)` returns on each rank of worlds of processes, all at once, by the size of the world.

    Raises:
        AssertionError: a process failed, or was not done after `seconds`: then all are killed.
    """
    os.environ["DS_ACCELERATOR"], os.environ["DEEPSPEED_LOG_LEVEL"] = "cpu", "error"
    context: Any = multiprocessing.get_context("forkserver")  # all begin where one has imported everything
    context.set_forkserver_preload(["tests.ranks", "deepspeed"])
    ports = {world: free_port() for world in worlds}
    ranks = [(rank, world) for world in worlds for rank in range(world)]
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_work, args=(rank, world, ports[world], work, folder), daemon=True)
            for rank, world in ranks
        ]
        for process in processes:
            process.start()
        running, end = {p.sentinel: p for p in processes}, time.monotonic() + seconds
        while running and not any(p.exitcode for p in processes) and time.monotonic() < end:
            for sentinel in wait(list(running), end - time.monotonic()):
                running.pop(sentinel).join()
        codes = {at: process.exitcode for at, process in zip(ranks, processes, strict=True)}
        for process in processes:
            process.kill()
        assert set(codes.values()) == {0}, f"(rank, world) to exit status: {codes}"
        load = {at: torch.load(Path(folder, f"{at[1]}-{at[0]}"), weights_only=False) for at in ranks}
    return {world: [load[rank, world] for rank in range(world)] for world in worlds}
