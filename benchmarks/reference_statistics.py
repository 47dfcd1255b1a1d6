"""Speed, size and accuracy of the baseline statistics.

    python benchmarks/reference_statistics.py [--prompts 1000000] [--output summary.json]

Each case runs in a process of its own, so that its memory is its own. Rewards are added in items of 64 prompts with
all their samples, to two models in turn, with a reading of 64 prompts' references after every 100 items.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from datasketches import kll_floats_sketch, req_floats_sketch

from rlhf.utility.sketch import GridSketch
from rlhf.utility.statistics import BaselineStatistics, ReferenceRule

RULE = ReferenceRule("quantile", 0.85, "empirical", 0.0)
MODELS = ("helpful", "harmless")
GROUP = 64  # prompts of an item
MB = 1e6
Case = dict[str, Any]


def prompt_ids(prompts: int) -> np.ndarray:
    """Distinct 64-bit ids in no order: an odd multiplier permutes them."""
    return np.arange(1, prompts + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)


def fill(statistics: BaselineStatistics, prompts: int, count: int, read: bool = True) -> float:
    """Adds `count` rewards of each prompt to both models; seconds, without those that drawing them took."""
    rng, ids, spent = np.random.default_rng(0), prompt_ids(prompts), 0.0
    for item, start in enumerate(range(0, prompts, GROUP)):
        group = ids[start : start + GROUP]
        drawn = [rng.standard_normal(len(group) * count, np.float32) for _ in MODELS]
        started = time.perf_counter()
        repeated = np.repeat(group, count)
        for model, rewards in zip(MODELS, drawn, strict=True):
            statistics.add_samples(model, repeated, rewards, item)
        if read and item % 100 == 0:
            statistics.reference(MODELS[0], group, RULE)
        spent += time.perf_counter() - started
    return spent


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def resident() -> float:
    return psutil.Process().memory_info().rss / MB


def at_scale(prompts: int, count: int, compact: bool) -> Case:
    before = resident()
    statistics = BaselineStatistics()
    seconds = fill(statistics, prompts, count)
    frozen = timed(statistics.freeze)
    figures: Case = {"prompts": prompts, "models": len(MODELS), "samples": count, "compact": compact}
    rewards = prompts * count * len(MODELS)
    figures["million rewards/s, added and frozen"] = rewards / (seconds + frozen) / 1e6
    if compact:
        figures["seconds to compact"] = timed(lambda: statistics.compact(dict.fromkeys(MODELS, RULE)))
    figures["MB in memory"] = resident() - before
    figures["MB at the peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB - before
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "statistics.npz"
        figures["seconds to save"] = timed(lambda: statistics.save(path))
        figures["MB on disk"] = path.stat().st_size / MB
        figures["seconds to load"] = timed(lambda: BaselineStatistics.load(path))
    ids = prompt_ids(prompts)[:100_000]
    figures["seconds for r_ref of 100 000 prompts"] = timed(
        lambda: statistics.reference(MODELS[0], ids, RULE)
    )
    repeats = [timed(lambda: statistics.reference(MODELS[0], ids[:64], RULE)) for _ in range(100)]
    figures["ms for r_ref of 64 prompts"] = 1e3 * float(np.median(repeats))
    return figures


def against_a_dict(prompts: int, count: int) -> Case:
    """The same items into a dict of lists and numpy.quantile of each list."""
    rng, ids, taken = np.random.default_rng(0), prompt_ids(prompts), 0.0
    plain: dict[str, dict[int, list[float]]] = {model: defaultdict(list) for model in MODELS}
    for start in range(0, prompts, GROUP):
        group = ids[start : start + GROUP]
        drawn = [rng.standard_normal(len(group) * count, np.float32) for _ in MODELS]
        started = time.perf_counter()
        repeated = np.repeat(group, count).tolist()
        for model, rewards in zip(MODELS, drawn, strict=True):
            lists = plain[model]
            for prompt, reward in zip(repeated, rewards.tolist(), strict=True):
                lists[prompt].append(reward)
        taken += time.perf_counter() - started
    started = time.perf_counter()
    theirs = [[np.quantile(lists[prompt], 0.85) for prompt in ids.tolist()] for lists in plain.values()]
    plain_seconds = taken + time.perf_counter() - started
    statistics = BaselineStatistics()
    seconds = fill(statistics, prompts, count)
    started = time.perf_counter()
    ours = [statistics.reference(model, ids, RULE).r_ref for model in MODELS]
    seconds += time.perf_counter() - started
    rewards_held = prompts * count * len(MODELS)
    return {
        "prompts": prompts,
        "samples": count,
        "million rewards/s, added and r_ref of all": rewards_held / seconds / 1e6,
        "of a dict of lists": rewards_held / plain_seconds / 1e6,
        "ratio": plain_seconds / seconds,
        "greatest difference of r_ref": float(np.abs(np.array(ours) - np.array(theirs)).max()),
    }


def compact_error(prompts: int, count: int) -> Case:
    """Of quantiles that are not pinned, in units of the prompt's range and of the standard error of r_ref."""
    statistics = BaselineStatistics()
    fill(statistics, prompts, count, read=False)
    ids = prompt_ids(prompts)
    exact = statistics.reference(MODELS[0], ids, RULE)
    statistics.freeze()
    statistics.compact()
    error = np.abs(statistics.reference(MODELS[0], ids, RULE).r_ref - exact.r_ref)
    return {
        "samples": count,
        "greatest error / bound": float((error / ((exact.high - exact.low) / 510)).max()),
        "root mean square error / standard error": float(
            np.sqrt((error**2).mean()) / exact.standard_error.mean()
        ),
    }


def sketch_error(draw: str, rewards: int, repeats: int) -> Case:
    """Root mean square error of the 0.85 quantile against the exact one, in stds, and bytes; seeds 0..repeats."""
    draws: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
        "normal": lambda rng: rng.normal(size=rewards),
        "exponential": lambda rng: rng.exponential(size=rewards),
        "lognormal": lambda rng: rng.lognormal(size=rewards),
        "t(3)": lambda rng: rng.standard_t(3, size=rewards),
        "Cauchy": lambda rng: rng.standard_cauchy(size=rewards),
    }
    errors: dict[str, list[float]] = defaultdict(list)
    sizes: dict[str, int] = {}
    for seed in range(repeats):
        values = draws[draw](np.random.default_rng(seed)).astype(np.float32)
        exact = float(np.quantile(values.astype(np.float64), 0.85))
        spread = float(
            np.subtract(*np.quantile(values, [0.8413, 0.1587])) / 2
        )  # a normal's std, whatever the tails
        grid, kll, req = GridSketch(), kll_floats_sketch(360), req_floats_sketch(12, True)
        for part in np.array_split(values, 50):
            grid.add(part)
            kll.update(part)
            for value in part.tolist():
                req.update(value)
        sizes = {
            "grid": grid.edges.nbytes + grid.counts.nbytes,
            "KLL": len(kll.serialize()),
            "REQ": len(req.serialize()),
        }
        found = {"grid": grid.quantiles(np.array([0.85]))[0], "KLL": kll.get_quantile(0.85)}
        for name, quantile in (found | {"REQ": req.get_quantile(0.85)}).items():
            errors[name].append((float(quantile) - exact) / spread)
    figures: Case = {"rewards": rewards, "runs": repeats}
    for name, size in sizes.items():
        figures[f"{name} error"] = float(np.sqrt(np.mean(np.square(errors[name]))))
        figures[f"{name} bytes"] = size
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=1_000_000, help="of the cases at scale")
    parser.add_argument("--output", type=Path, help="where to write the figures as JSON")
    args = parser.parse_args()
    cases: dict[str, tuple[Callable[..., Case], tuple[Any, ...]]] = {
        "exact, 16 samples": (at_scale, (args.prompts, 16, False)),
        "compact, 64 samples": (at_scale, (args.prompts, 64, True)),
        "against a dict of lists": (against_a_dict, (min(args.prompts, 20_000), 16)),
        "compact quantiles": (compact_error, (min(args.prompts, 20_000), 64)),
    }
    for draw in ("normal", "exponential", "lognormal", "t(3)", "Cauchy"):
        cases[f"sketches, {draw}"] = (sketch_error, (draw, 20_000, 20))
    summary = {}
    context = multiprocessing.get_context("spawn")
    for name, (measure, arguments) in cases.items():
        with ProcessPoolExecutor(1, mp_context=context) as pool:
            summary[name] = pool.submit(measure, *arguments).result()
        print(name)
        for what, figure in summary[name].items():
            print(f"  {what:<45} {figure:.4g}" if isinstance(figure, float) else f"  {what:<45} {figure}")
    if args.output:
        args.output.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main()
