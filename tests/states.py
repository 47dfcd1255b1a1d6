"""What learner ranks do with states of trainers: save and load them, and keep them where a step is left out."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlhf.learn import logprobs
from rlhf.learn.alignment import Aligner
from rlhf.learn.logprobs import PolicyModel
from rlhf.learn.objectives import MicroBatch, Supervised, TokenPairs
from rlhf.learn.state import Snapshot, restore
from rlhf.learn.trainer import NotFinite, Trainer
from rlhf.types import Experience
from tests.ranks import (
    CHUNK,
    MANY,
    PPO,
    TARGETS,
    WORDS,
    Factors,
    Ranks,
    aligner,
    causal,
    experiences,
    moved,
    tokens,
)

Trainers = dict[str, Trainer]
Step = Callable[[int], dict[str, float]]
WAIT = 200.0  # seconds for other processes' files


def supervised(at: Ranks, noise: float, wide: bool = False) -> tuple[Trainers, Step]:
    changes: dict[str, Any] = {"vocabulary": 50_000, "tie_word_embeddings": True} if wide else {}
    policy = PolicyModel(causal(**changes), logprobs.CHUNK if wide else CHUNK)
    moved(policy, noise)
    trainer = at.trainer(policy, 128)
    trainer.objective = Supervised(policy.lay)
    data = TokenPairs(tokens([3] * 3, WORDS, 1), tokens([40, 20, 30], WORDS))
    return {"model": trainer}, lambda step: trainer.step((data, np.arange(3)), 1e-3, step)


def trainers_of(learner: Aligner) -> Trainers:
    also = {} if learner.critic is None else {"critic": learner.critic}
    return {"policy": learner.policy, **also}


def alignment(at: Ranks, noise: float, **changes: Any) -> tuple[Trainers, Step]:
    learner = aligner(at, noise=noise, **changes)
    batch = experiences(MANY)
    return trainers_of(learner), lambda step: learner.step(batch, 0.1, 1e-3, 1e-3, number=step)


MAKE: dict[str, Callable[[Ranks, float], tuple[Trainers, Step]]] = {
    "sft": supervised,
    "sft, 50 000 words": lambda at, noise: supervised(at, noise, wide=True),
    "rloo": alignment,
    "ppo": lambda at, noise: alignment(at, noise, **PPO),
    "lora": lambda at, noise: alignment(at, noise, lora=TARGETS),
}
DTYPES = ("float32", "bfloat16")
SOME = [(0, "float32"), (1, "bfloat16"), (2, "bfloat16"), (3, "float32")]
CASES = [
    ("sft, 50 000 words", 3, "float32"),
    *(("sft", stage, dtype) for stage in range(4) for dtype in DTYPES),
    *(("ppo", stage, dtype) for stage, dtype in SOME),
    *(("lora", stage, dtype) for stage, dtype in SOME),
    ("rloo", 2, "float32"),
    ("rloo", 3, "bfloat16"),
]
ACROSS = [
    *((name, (2, 3), (1, 0), "float32") for name in ("sft", "ppo")),
    *((name, (1, 0), (2, 2), "float32") for name in ("sft", "ppo")),
    ("sft", (2, 1), (1, 3), "float32"),
    ("sft", (2, 2), (2, 0), "float32"),
    ("sft", (2, 3), (1, 1), "bfloat16"),
    ("sft", (1, 2), (2, 3), "bfloat16"),
]
"""Model, (ranks, ZeRO stage) that save, those that load, dtype."""


def whole(trainers: Trainers) -> dict[str, torch.Tensor]:
    """All parameters as the models compute with them."""
    return {
        f"{label}/{name}": value.to(trainer._dtype, copy=True)
        for label, trainer in trainers.items()
        for name, value in trainer._parameters().items()
    }


def copies(trainers: Trainers) -> dict[str, torch.Tensor]:
    snapshot = Snapshot()
    snapshot.take(trainers)
    return snapshot._copies


def same(some: dict[str, torch.Tensor], others: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return some.keys() == others.keys() and all(torch.equal(value, others[k]) for k, value in some.items())


def _name(at: Ranks) -> str:
    return f"rank-{at.rank}-of-{at.world}.safetensors"


def _folder(root: Path, name: str, world: int, stage: int, dtype: str, step: int) -> Path:
    return root / f"{name}, {world} ranks, stage {stage}, {dtype}, step {step}"


def _barrier(at: Ranks) -> None:
    if at.world > 1:
        torch.distributed.barrier()


def resumed(at: Ranks, root: Path, name: str) -> dict[str, Any]:
    """Two steps; the state before each is written while the step goes on; then the same from a state, in trainers that
    began elsewhere."""
    trainers, step = MAKE[name](at, 0.0)
    snapshot, steps, middle, alike = Snapshot(), [], {}, True
    for n in range(2):
        snapshot.take(trainers)
        if n == 0:
            memory = {key: copy.data_ptr() for key, copy in snapshot._copies.items()}
        folder = _folder(root, name, at.world, at.stage, at.dtype, n)
        folder.mkdir(exist_ok=True)
        held, beats = Snapshot(), []
        assert not held.take(trainers, room=snapshot.size - 1)
        held.write(root / f"held by {at.rank} of {at.world}", partial(beats.append, 1))
        writing = threading.Thread(target=snapshot.write, args=(folder / _name(at),))
        writing.start()
        middle = whole(trainers)
        steps.append(step(n))
        writing.join()
        alike &= (root / f"held by {at.rank} of {at.world}").read_bytes() == (folder / _name(at)).read_bytes()
        alike &= len(beats) == len(snapshot._copies) and not held._copies
    again = all(snapshot._copies[key].data_ptr() == place for key, place in memory.items())
    end, state = whole(trainers), copies(trainers)
    _barrier(at)
    found = {"same memory": again, "alike without room": alike, "middle": middle, "steps": steps, "end": end}
    for n in (0, 1) if name == "sft" else (1,):
        trainers, step = MAKE[name](at, 0.5)
        restore(_folder(root, name, at.world, at.stage, at.dtype, n), trainers)
        found[f"steps from {n}"] = [step(k) for k in range(n, 2)]
        found[f"end from {n}"] = same(whole(trainers), end) and same(copies(trainers), state)
    (root / f"{name}, {at.world}, {at.stage}, {at.dtype}, {at.rank}").touch()
    return found


def restored(at: Ranks, root: Path, name: str) -> dict[str, torch.Tensor]:
    """The weights of trainers that began elsewhere, after the load of what `resumed` saved before its second step."""
    trainers, _ = MAKE[name](at, 0.5)
    restore(_folder(root, name, at.world, at.stage, at.dtype, 1), trainers)
    return whole(trainers)


def across(at: Ranks, root: Path, name: str, world: int, stage: int) -> tuple[Any, ...]:
    """Weights after the load of a state of other ranks or another stage, then steps, and weights again."""
    end = time.monotonic() + WAIT
    while not all((root / f"{name}, {world}, {stage}, {at.dtype}, {rank}").exists() for rank in range(world)):
        assert time.monotonic() < end, (name, world, stage)
        time.sleep(0.05)
    trainers, step = MAKE[name](at, 0.5)
    restore(_folder(root, name, world, stage, at.dtype, 1), trainers)
    loaded = whole(trainers)
    return loaded, [step(1)], whole(trainers)


def everything(rank: int, world: int, root: Path) -> Iterator[tuple[Any, Any]]:
    for name, stage, dtype in CASES:
        yield ("resumed", name, stage, dtype), resumed(Ranks(rank, world, stage, dtype), root, name)
    for name, source, (ranks, stage), dtype in ACROSS:
        if ranks == world:
            key = ("across", name, source, (ranks, stage), dtype)
            yield key, across(Ranks(rank, world, stage, dtype), root, name, *source)
    for stage, dtype in itertools.product(range(4), DTYPES):
        at = Ranks(rank, world, stage, dtype)
        yield ("refused", stage, dtype), refused(at)
        if (stage, dtype) in SOME:
            yield ("skipped", stage, dtype), skipped(at)
    yield "another model", another(Ranks(rank, world, 0), root)


def another(at: Ranks, root: Path) -> str:
    """The error of a state of another model."""
    trainers, _ = MAKE["sft"](at, 0.0)
    try:
        restore(_folder(root, "sft, 50 000 words", at.world, 3, "float32", 1), trainers)
    except ValueError as error:
        return str(error)
    return ""


def refused(at: Ranks) -> list[tuple[str, bool, bool]]:
    """Of a loss that is NaN on the last rank alone, and of a gradient that is NaN: the error, whether the state is what
    it was, and whether what is learnt after is what is learnt without."""
    found = []

    def good(model: torch.nn.Module) -> Any:
        return model(torch.ones(16)).sum(), {}

    def no_loss(model: torch.nn.Module) -> Any:
        last = at.rank == at.world - 1
        return model(torch.ones(16)).sum() + (torch.nan if last else 0.0), {}  # whose gradient is finite

    def no_gradient(model: torch.nn.Module) -> Any:
        values = model(torch.ones(16))
        return ((values - values.detach()) ** 2).sum().sqrt(), {}  # of 0, where it has none

    def update(trainer: Trainer, *losses: Any) -> None:
        trainer.update([MicroBatch(loss, 1, (f"row {at.rank}",)) for loss in losses], 0.125, 6)

    plain = at.trainer(Factors(16), 64)
    for _ in range(2):
        update(plain, good, good)
    for loss in (no_loss, no_gradient):
        trainer = at.trainer(Factors(16), 64)
        update(trainer, good, good)
        before = copies(trainer_of(trainer))
        try:
            update(trainer, loss, good)
        except NotFinite as error:
            kept = same(copies(trainer_of(trainer)), before)
            update(trainer, good, good)
            found.append((str(error), kept, same(copies(trainer_of(trainer)), copies(trainer_of(plain)))))
    return found


def trainer_of(trainer: Trainer) -> Trainers:
    return {"model": trainer}


def skipped(at: Ranks) -> tuple[list[dict[str, float]], bool, str]:
    """A batch, one with a reward that is not finite, and the first again: metrics of each, whether the second left no
    trace, and its error where nothing may be left out."""
    batch = experiences(MANY)
    bad = [batch[0], _poisoned(batch[1]), batch[2]]
    learner, plain = (aligner(at, **PPO) for _ in range(2))
    for n in range(2):
        plain.step(batch, 0.1, 1e-3, 1e-3, number=n)
    steps = [learner.step(part, 0.1, 1e-3, 1e-3, strict=False) for part in (batch, bad, batch)]
    alike = same(copies(trainers_of(learner)), copies(trainers_of(plain)))
    try:
        learner.step(bad, 0.1, 1e-3, 1e-3, number=3)
    except NotFinite as error:
        return steps, alike, str(error)
    return steps, alike, ""


def _poisoned(experience: Experience) -> Experience:
    combined = experience.rewards.combined.copy()
    combined[0] = np.nan
    return replace(experience, rewards=replace(experience.rewards, combined=combined))
