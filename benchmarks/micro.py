"""Parts of the system alone, each against a peer or a limit measured in the same process run. Prints one JSON line.

python -m benchmarks.micro generation     sampling against transformers' generate, fixed and geometric lengths
python -m benchmarks.micro smollm2        the same of SmolLM2-135M-Instruct, and against vLLM (after make vllm)
python -m benchmarks.micro learner        a learner step against a bare PyTorch loop: speed and peak memory
python -m benchmarks.micro publication    weights from a learner to a generator, against a copy of as many bytes
python -m benchmarks.micro queue          items/s through the experience queue's actor
python -m benchmarks.micro quantiles      samples/s into the baseline statistics, against numpy's quantile
python -m benchmarks.micro rewards        transform and combination, against the scoring of the same responses
python -m benchmarks.micro tokens         a learner step's time from 1 to 16 times the tokens
python -m benchmarks.micro scale          1, 4, 16, 64 simulated generators through the real controller
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.workloads import PER_STEP, SAMPLES, WORKLOADS, Workload, make

TURNS = 3
SLOTS = PER_STEP * SAMPLES
VLLM = Path(__file__).parents[1] / ".venv-vllm"


def threads() -> int:
    return len(os.sched_getaffinity(0))


def median(work: Callable[[], object], turns: int = TURNS) -> float:
    """Seconds, after one call that does not count."""
    work()
    found = []
    for _ in range(turns):
        started = time.perf_counter()
        work()
        found.append(time.perf_counter() - started)
    return statistics.median(found)


def prompts_of(world: Path) -> list[Any]:
    return [json.loads(line)["prompt"] for line in (world / "prompts.jsonl").read_text().splitlines()]


def generation() -> dict[str, Any]:
    """W3 (fixed) in one batch of 64, and 256 responses of W2 (geometric), 64 at a time; bfloat16, all threads."""
    with tempfile.TemporaryDirectory() as folder:
        fixed = _sampling(WORKLOADS["W3"], Path(folder) / "W3", PER_STEP)
        short = _sampling(WORKLOADS["W1"], Path(folder) / "W1", PER_STEP)
        geometric = _sampling(WORKLOADS["W2"], Path(folder) / "W2", 4 * PER_STEP)
    return {"W1 fixed": short, "W3 fixed": fixed, "W2 geometric": geometric}


def smollm2() -> dict[str, Any]:
    """W4, 64 responses at a time; bfloat16, all threads. vLLM has a process and an environment of its own."""
    workload = WORKLOADS["W4"]
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder) / "W4"
        found: dict[str, Any] = _sampling(workload, world, PER_STEP)
        if not VLLM.exists():
            return found | {"vllm_tokens_per_s": f"not measured: no {VLLM.name} (make vllm)"}
        command = [str(VLLM / "bin" / "python"), "-m", "benchmarks.micro", "_vllm", "W4", str(world)]
        rates = []
        for _ in range(2):
            out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            rates.append(json.loads(out.strip().splitlines()[-1]))
            rates.append(_turns(_embedded(workload, world, PER_STEP)))
    theirs, ours = rates[::2], rates[1::2]
    return found | {
        "vllm_tokens_per_s": theirs,
        "ours_in_turn_with_vllm": ours,
        "ratio_vllm": round(statistics.fmean(ours) / statistics.fmean(theirs), 2),
    }


def _turns(work: Callable[[], float]) -> int:
    """The median tokens/s of some turns after the first."""
    work()
    return round(statistics.median(work() for _ in range(TURNS)))


def _sampled(engine: Any, texts: Sequence[Any]) -> Callable[[], float]:
    """Tokens/s of a call."""
    from rlhf.types import WorkItem

    seeds = iter(range(1000))

    def once() -> float:
        started = time.perf_counter()
        rollouts = engine.generate(WorkItem(0, tuple(texts), SAMPLES, next(seeds)))
        return len(rollouts.tokens.values) / (time.perf_counter() - started)

    return once


def _chat(world: Path) -> Any:
    from rlhf.data.chat import ChatFormat
    from rlhf.models.load import load_tokenizer

    return ChatFormat(load_tokenizer(str(world / "policy"), "policy.path"), "policy")


def _embedded(workload: Workload, world: Path, prompts: int) -> Callable[[], float]:
    import torch

    from rlhf.generate.transformers_engine import TransformersEngine
    from rlhf.models.load import load_policy

    torch.set_num_threads(threads())
    engine = TransformersEngine(
        load_policy(str(world / "policy")), _chat(world), workload.new, 1.0, SLOTS, dtype="bfloat16"
    )
    return _sampled(engine, prompts_of(world)[:prompts])


def _vllm(name: str, folder: str) -> int:
    """Tokens/s of vLLM, in its own environment."""
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    from rlhf.generate.vllm_engine import VllmEngine

    workload, world = WORKLOADS[name], Path(folder)
    engine = VllmEngine(
        str(world / "policy"),
        _chat(world),
        workload.new,
        1.0,
        SLOTS,
        "cpu",
        "bfloat16",
        {"max_model_len": 256},
    )
    try:
        return _turns(_sampled(engine, prompts_of(world)[:PER_STEP]))
    finally:
        engine.close()


def _sampling(workload: Workload, world: Path, prompts: int) -> dict[str, Any]:
    """Tokens/s of both sides, with the same weights and at most 64 responses at a time."""
    import torch

    from rlhf.models.load import load_policy

    make(workload, world)
    chat, texts = _chat(world), prompts_of(world)[:prompts]
    ours = _embedded(workload, world, prompts)
    model = load_policy(str(world / "policy"), dtype=torch.bfloat16)
    rows = [chat.prompt_tokens(text) for text in texts]
    end = chat.tokenizer.eos_token_id

    def theirs() -> float:
        torch.manual_seed(next(seeds))
        started, tokens = time.perf_counter(), 0
        for start in range(0, prompts, PER_STEP):
            batch = chat.tokenizer.pad(
                {"input_ids": rows[start : start + PER_STEP]}, return_tensors="pt", padding_side="left"
            )
            out = model.generate(
                input_ids=batch["input_ids"],
                attention_mask=batch["attention_mask"],
                num_return_sequences=SAMPLES,
                do_sample=True,
                top_k=0,
                max_new_tokens=workload.new,
            )
            ended = (out[:, batch["input_ids"].shape[1] :] == end).int()
            tokens += int((ended.cumsum(-1) - ended == 0).sum())
        return tokens / (time.perf_counter() - started)

    seeds = iter(range(1000))
    with torch.inference_mode():
        theirs(), ours()
        pairs = [(ours(), theirs()) for _ in range(TURNS)]
    a, b = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {"ours_tokens_per_s": round(a), "generate_tokens_per_s": round(b), "ratio": round(a / b, 2)}


def learner() -> dict[str, Any]:
    """W3: an optimiser step, without a reference; each side in a process of its own, for its peak memory."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        world = Path(folder)
        make(WORKLOADS["W3"], world)
        for dtype in ("float32", "bfloat16"):
            for side in ("_ours", "_bare"):
                command = [sys.executable, "-m", "benchmarks.micro", side, folder, dtype]
                out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
                found[f"{dtype}{side}"] = json.loads(out.strip().splitlines()[-1])
            ours, bare = found[f"{dtype}_ours"], found[f"{dtype}_bare"]
            found[f"{dtype}_speed_ratio"] = round(bare["seconds"] / ours["seconds"], 2)
            found[f"{dtype}_memory_ratio"] = round(ours["peak_mb"] / bare["peak_mb"], 3)
    return found


def _batch(
    vocabulary: int, prompt: int, lengths: np.ndarray, samples: int = SAMPLES
) -> tuple[Any, Any, np.ndarray]:
    """Random prompts and responses, `samples` to a prompt."""
    from rlhf.types import Ragged

    rng = np.random.default_rng(0)
    prompts = Ragged.of(
        [rng.integers(vocabulary, size=prompt) for _ in range(len(lengths) // samples)], np.int32
    )
    responses = Ragged.of([rng.integers(vocabulary, size=n) for n in lengths], np.int32)
    return prompts, responses, np.repeat(np.arange(len(prompts)), samples)


def _rss_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def _measured(step: Callable[[], object], before: float) -> dict[str, float]:
    seconds = median(step)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    return {"seconds": round(seconds, 3), "peak_mb": round(peak - before, 1)}


def _trainer(policy: str, dtype: str, budget: int) -> Any:
    os.environ.update(
        DS_ACCELERATOR="cpu",
        DEEPSPEED_LOG_LEVEL="error",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="0",
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
    )
    import deepspeed
    import deepspeed.ops

    from rlhf.config import DeepSpeedConfig
    from rlhf.learn.logprobs import PolicyModel
    from rlhf.learn.trainer import Trainer
    from rlhf.models.load import load_policy

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    return Trainer(PolicyModel(load_policy(policy)), DeepSpeedConfig(0, dtype, budget, False), 0.0, 1.0)


def _parts(trainer: Any, batch: tuple[Any, Any, np.ndarray]) -> list[Any]:
    """The micro-batches of a policy-gradient step whose advantages are all 1."""
    from rlhf.learn.logprobs import token_logprobs
    from rlhf.learn.objectives import MicroBatch

    prompts, responses, group = batch
    total = len(responses.values)

    def part(tokens: Any) -> MicroBatch:
        def call(model: Any) -> tuple[Any, dict[str, float]]:
            return -token_logprobs(model, tokens).sum() / total, {}

        return MicroBatch(call, tokens.input_ids.numel())

    lay = trainer.engine.module.lay
    return [part(b) for b in lay(prompts, responses, group, range(len(responses)), trainer.budget)]


def _ours(folder: str, dtype: str) -> dict[str, float]:
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(threads())
    import deepspeed  # noqa: F401

    before = _rss_mb()
    trainer = _trainer(f"{folder}/policy", dtype, 4096)
    parts = _parts(trainer, _batch(1000, 256, np.full(PER_STEP * SAMPLES, 32)))
    return _measured(lambda: trainer.update(parts, 0.0), before)


def _bare(folder: str, dtype: str) -> dict[str, float]:
    """The plain way: a row for each response, full logits, AdamW; rows in micro-batches of as many tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(threads())
    before = _rss_mb()
    model = AutoModelForCausalLM.from_pretrained(f"{folder}/policy", dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    prompts, responses, group = _batch(1000, 256, np.full(PER_STEP * SAMPLES, 32))
    rows = torch.tensor(np.stack([np.concatenate([prompts[g], responses[i]]) for i, g in enumerate(group)]))
    rows = rows.long()
    size = 4096 // rows.shape[1]

    def step() -> None:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
                logits = model(input_ids=part, use_cache=False).logits[:, 255:-1].float()
                loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 256:].flatten())
            (loss * len(part) / len(rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return _measured(step, before)


def tokens() -> dict[str, Any]:
    """Seconds of a learner step by tokens, bfloat16, micro-batches of 4096: the plot is docs/tokens.png."""
    import torch

    torch.set_num_threads(threads())
    found: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as folder:
        make(WORKLOADS["W3"], Path(folder))
        trainer = _trainer(f"{folder}/policy", "bfloat16", 4096)
        for times in (1, 2, 4, 8, 16):
            parts = _parts(trainer, _batch(1000, 64, np.full(2 * SAMPLES * times, 32)))
            count = sum(p.tokens for p in parts)
            found[str(count)] = round(median(lambda parts=parts: trainer.update(parts, 0.0)), 3)
    x, y = np.array(list(map(int, found))), np.array(list(found.values()))
    slope, intercept = np.polyfit(x, y, 1)
    _plot(x, y, slope, intercept)
    residual = y - (slope * x + intercept)
    return {
        "seconds_by_tokens": found,
        "seconds_per_1000_tokens": round(1000 * slope, 4),
        "seconds_whatever_the_tokens": round(intercept, 4),
        "r_squared": round(1 - float((residual**2).sum() / ((y - y.mean()) ** 2).sum()), 5),
    }


def _plot(x: np.ndarray, y: np.ndarray, slope: float, intercept: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot(x, y, "o", label="measured")
    axes.plot(x, slope * x + intercept, label="straight line")
    axes.set_xlabel("tokens of a batch")
    axes.set_ylabel("seconds of a learner step")
    axes.set_xlim(0)
    axes.set_ylim(0)
    axes.legend()
    figure.savefig(Path(__file__).parent.parent / "docs" / "tokens.png", dpi=100, bbox_inches="tight")


def publication() -> dict[str, Any]:
    """34 M parameters in bfloat16: flattened, stored, read by another process and copied into its parameters."""
    import ray
    import torch

    from rlhf.learn.trainer import Weights

    sizes = {f"layer{i}": (2048, 512) for i in range(32)}

    class Puller:
        def __init__(self) -> None:
            self.parameters = {n: torch.zeros(s, dtype=torch.bfloat16) for n, s in sizes.items()}

        def pull(self, weights: Any) -> None:
            for name, value in weights.tensors().items():
                self.parameters[name].copy_(value.view(self.parameters[name].shape))

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    named = {n: torch.randn(s).bfloat16() for n, s in sizes.items()}
    puller = ray.remote(Puller).options(num_cpus=1).remote()
    whole = median(lambda: ray.get(puller.pull.remote(Weights.of(named, torch.bfloat16))), 7)
    source = torch.cat([v.flatten() for v in named.values()])
    target = torch.empty_like(source)
    copy = median(lambda: target.copy_(source), 7)
    ray.shutdown()
    return {
        "mb": round(source.numel() * 2 / 1e6, 1),
        "publication_ms": round(1e3 * whole, 1),
        "memcpy_ms": round(1e3 * copy, 1),
        "ratio": round(whole / copy, 1),
    }


def queue() -> dict[str, Any]:
    import ray

    from actors.queue import start_queue

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    actor = start_queue()
    payload = (ray.put(1), ray.put(2))
    count = 500

    def cycle() -> None:
        first = next(numbers) * count
        items = list(range(first, first + count))
        ray.get([actor.put.remote(i, payload) for i in items])
        lease = ray.get(actor.lease.remote(items))
        ray.get(actor.acknowledge.remote(lease.id))

    numbers = iter(range(1000))
    seconds = median(cycle)
    ray.shutdown()
    return {"items_per_s": round(count / seconds)}


def quantiles() -> dict[str, Any]:
    """64 samples of each of 2000 prompts; numpy's quantile of the same samples is the limit."""
    from rlhf.utility.statistics import BaselineStatistics, ReferenceRule

    ids = np.arange(1, 2001, dtype=np.uint64)
    rewards = np.random.default_rng(0).standard_normal((len(ids), 64), np.float32)
    rule = ReferenceRule("quantile", 0.85, "empirical", 0.0)

    def ours() -> None:
        kept = BaselineStatistics()
        for item, start in enumerate(range(0, len(ids), 64)):
            chosen = slice(start, start + 64)
            kept.add_samples("a", np.repeat(ids[chosen], 64), rewards[chosen].ravel(), item)
        kept.reference("a", ids, rule)

    seconds, limit = median(ours), median(lambda: np.quantile(rewards, 0.85, axis=1))
    return {
        "samples_per_s": round(rewards.size / seconds),
        "numpy_samples_per_s": round(rewards.size / limit),
        "ratio": round(limit / seconds, 3),
    }


def rewards() -> dict[str, Any]:
    """64 responses of W2 by two reward models: LSC-AND of their rewards, against one model's scoring."""
    import torch

    from rlhf.models.reward import RewardScorer
    from rlhf.types import Ragged, Rollouts
    from rlhf.utility.pipeline import Utility
    from rlhf.utility.statistics import BaselineStatistics, ReferenceRule

    torch.set_num_threads(threads())
    workload, rng = WORKLOADS["W2"], np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        make(workload, Path(folder))
        scorer = RewardScorer("rm0", f"{folder}/rm0", dtype="bfloat16")
        contents = prompts_of(Path(folder))[:PER_STEP]
    texts = [" ".join(f"w{w}" for w in rng.integers(12, size=n)) for n in rng.geometric(1 / 22, 64)]
    each = [c for c in contents for _ in range(SAMPLES)]
    scoring = median(lambda: scorer.score(each, texts))
    ids = np.arange(1, PER_STEP + 1, dtype=np.uint64)
    kept, rule = BaselineStatistics(), ReferenceRule("quantile", 0.85, "empirical", 0.0)
    for name in ("a", "b"):
        kept.add_samples(name, np.repeat(ids, 64), rng.standard_normal(PER_STEP * 64, np.float32), 0)
    group = np.repeat(np.arange(PER_STEP, dtype=np.int32), SAMPLES)
    rollouts = Rollouts(
        item=0,
        version=0,
        seed=0,
        temperature=1.0,
        prompts=tuple(contents),
        prompt_ids=ids,
        prompt_tokens=Ragged.of([[1]] * PER_STEP, np.int32),
        group=group,
        tokens=Ragged.of([[1]] * 64, np.int32),
        logprobs=np.zeros(64, np.float32),
        versions=np.zeros(64, np.int32),
        finished=np.ones(64, bool),
        texts=tuple(texts),
    )
    utility = Utility("lsc", "and", {}, {"a": 1.0, "b": 1.0})
    raw = rng.standard_normal((64, 2), np.float32)

    def combine() -> None:
        utility.rewards(rollouts, raw, {n: kept.reference(n, ids, rule) for n in ("a", "b")})

    seconds = median(combine, 15)
    return {
        "transform_and_combine_ms": round(1e3 * seconds, 2),
        "scoring_ms": round(1e3 * scoring, 1),
        "share": round(seconds / scoring, 4),
    }


def scale() -> dict[str, Any]:
    from benchmarks.scale import run

    return run()


if __name__ == "__main__":
    name, *given = sys.argv[1:]
    print(json.dumps(globals()[name](*given)))
