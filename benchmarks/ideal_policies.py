"""What each arm of the study would win if training reached its closed form pi0 * exp(u / beta), and if its reward
models were perfect: tells a weakness of the objective from one of the reward models or of the training.

    rlhf experiment=study                            first: it makes the policies and reward models
    python -m benchmarks.ideal_policies              reads them from outputs/store

Nothing is trained. The base policy answers each held-out prompt many times; the closed form is those responses,
weighted by exp(u / beta), with beta chosen for a given mean KL. Rewards are those of the study's reward models, or the
judge's own scores in nats of its preferences. r_ref, what wins, and the closed form come from samples of their own.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config import Config

ARMS = ("lsc", "linear", "zscore", "par", "worst_case", "lsc_uncentred", "lsc_median", "lsc_quantile")
JUDGED_ARMS = tuple(
    arm for arm in ARMS if arm != "zscore"
)  # where every sample scores alike there is no deviation
KLS = (0.5, 1.0, 1.5)  # nats; a weighting of 64 samples cannot show much more
REFERENCE, BAR, WEIGHTED = (
    32,
    32,
    64,
)  # samples of each prompt: for r_ref, for what wins, and for the closed form
EVERY = REFERENCE + BAR + WEIGHTED
Scores = Mapping[str, np.ndarray]


def composed(*overrides: str) -> Config:
    from hydra import compose, initialize_config_module

    from rlhf.config_checks import typed

    with initialize_config_module("conf", version_base=None):
        return typed(compose("config", overrides=["experiment=study", *overrides]))


def tilted(utility: np.ndarray, target: float) -> np.ndarray:
    """Weights exp(u / beta) of each row, normalised, whose mean KL from equal weights is `target` nats. [P, n]

    >>> w = tilted(np.array([[0.0, 1.0, 2.0, 3.0]]), 0.5)
    >>> round(float((w * np.log(w * 4)).sum()), 3)
    0.5
    """
    low, high = -12.0, 12.0  # log beta: KL falls with it
    for _ in range(60):
        middle = (low + high) / 2
        scores = (utility - utility.max(-1, keepdims=True)) / np.exp(middle)
        weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        kl = (weights * np.log(np.maximum(weights, 1e-300) * utility.shape[1])).sum(-1).mean()
        low, high = (middle, high) if kl > target else (low, middle)
    return weights


def one_seed(seed: int, output: str) -> dict[str, dict[str, dict[str, float]]]:
    """Whose rewards -> arm -> KL -> joint win rate by the judge; "base" has that of the base policy."""
    from actors.stages.reward_models import RewardModels
    from actors.stages.sft import Sft
    from actors.stages.stage import Stages
    from actors.work import work_items
    from rlhf.data.chat import ChatFormat
    from rlhf.data.microcosm import LABEL_SCALE
    from rlhf.data.prepare import prepare
    from rlhf.evaluate.judges import MicrocosmJudge
    from rlhf.generate.transformers_engine import TransformersEngine
    from rlhf.models.load import load_policy, load_tokenizer
    from rlhf.models.reward import RewardScorer
    from rlhf.store import Store

    def stages(*overrides: str) -> Stages:
        config = composed(f"seed={seed}", f"output_dir={output}", *overrides)
        store = Store(Path(output).absolute() / "store")
        return Stages(config, prepare(config, store), store)

    made = stages("arm=lsc")
    prompts, config, judge = made.data.eval_prompts, made.config, MicrocosmJudge()
    policy = made.of(Sft).policy_path
    chat = ChatFormat(load_tokenizer(policy, "policy.path"), "policy")
    engine = TransformersEngine(load_policy(policy), chat, config.rollout.max_new_tokens, 1.0)
    items = work_items(prompts, 8, EVERY, seed, "ideal policies")
    flat = [text for item in items for text in engine.generate(item).texts]
    texts = [flat[i : i + EVERY] for i in range(0, len(flat), EVERY)]
    contents = [p.content for p in prompts]
    canned = config.reward_models["harmless"].canned
    gold = judge.score(prompts, texts)
    judged_canned = judge.score(prompts, [canned] * len(prompts))
    scorers = {n: RewardScorer(n, path) for n, path in made.of(RewardModels).paths("reward_models").items()}
    learnt = {n: scored(s, contents, texts) for n, s in scorers.items()}
    learnt_canned = {
        n: np.stack([s.score(contents, [text] * len(contents)) for text in canned], 1)
        for n, s in scorers.items()
    }
    sources = {
        "reward models": (learnt, learnt_canned),
        "judge": (
            {n: LABEL_SCALE * s for n, s in gold.items()},
            {n: LABEL_SCALE * s for n, s in judged_canned.items()},
        ),
    }
    bar = judge.reference({n: s[:, REFERENCE:-WEIGHTED] for n, s in gold.items()})
    won = np.logical_and.reduce([gold[n][:, -WEIGHTED:] >= bar[n][:, None] for n in gold])
    ids = np.array([p.id for p in prompts], np.uint64)
    found: dict[str, dict[str, dict[str, float]]] = {"base": {"base": {"0": float(won.mean())}}}
    for source, (rewards, fixed) in sources.items():
        found[source] = {}
        for arm in ARMS if source == "reward models" else JUDGED_ARMS:
            utility = combined(stages(f"arm={arm}"), ids, rewards, fixed)
            found[source][arm] = {f"{k:g}": float((tilted(utility, k) * won).sum(-1).mean()) for k in KLS}
    return found


def scored(scorer: Any, contents: Sequence[Any], texts: Sequence[Sequence[str]]) -> np.ndarray:
    """Rewards of every text, float32 [P, n]; a few of each prompt at a time, to keep masks small."""
    few = 8
    columns = []
    for start in range(0, len(texts[0]), few):
        part = [row[start : start + few] for row in texts]
        repeated = [c for c, row in zip(contents, part, strict=True) for _ in row]
        columns.append(scorer.score(repeated, [t for row in part for t in row]).reshape(len(contents), -1))
    return np.concatenate(columns, 1)


def combined(made: Any, ids: np.ndarray, rewards: Scores, canned: Scores) -> np.ndarray:
    """An arm's utility of the weighted samples, float64 [P, WEIGHTED]."""
    from actors.stages.align import Align
    from actors.stages.baseline import Baseline
    from rlhf.utility.statistics import BaselineStatistics

    statistics = BaselineStatistics()
    for name, scores in rewards.items():
        before = scores[:, :REFERENCE].astype(np.float32)
        statistics.add_samples(name, np.repeat(ids, REFERENCE), before.ravel(), 0)
        for i, column in enumerate(canned[name].T):
            statistics.add_canned(name, ids, column.astype(np.float32), i)
    rules = made.of(Baseline).rules
    references = {n: statistics.reference(n, ids, rule, 256) for n, rule in rules.items()}
    raw = np.stack([rewards[n][:, -WEIGHTED:].ravel() for n in rules], 1).astype(np.float32)
    group = np.repeat(np.arange(len(ids)), WEIGHTED)
    utility = made.of(Align).utility
    return utility.combined(raw, references, group).reshape(len(ids), WEIGHTED).astype(np.float64)


def table(found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and the paired differences lsc - arm with their 95 % t-interval."""
    from rlhf.evaluate.comparison import paired
    from rlhf.evaluate.intervals import estimate

    summary: dict[str, Any] = {"base": estimate([f["base"]["base"]["0"] for f in found])}
    for source in ("reward models", "judge"):
        summary[source] = {
            arm: {
                f"{k:g}": {
                    "joint": estimate([f[source][arm][f"{k:g}"] for f in found]),
                    "lsc_minus": paired(
                        [f[source]["lsc"][f"{k:g}"] - f[source][arm][f"{k:g}"] for f in found]
                    ),
                }
                for k in KLS
            }
            for arm in found[0][source]
        }
    return summary


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--outputs", default="outputs", help="the output_dir of the study")
    parser.add_argument("--output", type=Path, default=Path("outputs/ideal_policies"))
    given = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    found = []
    for seed in given.seeds:
        started = time.perf_counter()
        found.append(one_seed(seed, given.outputs))
        print(f"seed {seed}: {time.perf_counter() - started:.0f} s", flush=True)
    summary = table(found)
    given.output.mkdir(parents=True, exist_ok=True)
    (given.output / "summary.json").write_text(json.dumps({"seeds": given.seeds} | summary, indent=1))
    print(
        f"joint win rate by the judge, %; base policy {100 * summary['base']['mean']:.1f}. In brackets: lsc - arm."
    )
    for source in ("reward models", "judge"):
        print(f"\nrewards of the {source:<15}" + "".join(f"{f'KL {k:g}':>32}" for k in KLS))
        for arm, row in summary[source].items():
            cells = []
            for k in KLS:
                joint, minus = row[f"{k:g}"]["joint"]["mean"], row[f"{k:g}"]["lsc_minus"]
                span = (
                    ""
                    if minus["low"] is None
                    else f" ({100 * minus['low']:+.1f} to {100 * minus['high']:+.1f})"
                )
                cells.append(f"{100 * joint:.1f} [{100 * minus['mean']:+.1f}{span}]")
            print(f"{arm:<30}" + "".join(f"{c:>32}" for c in cells))
    print(f"\n{given.output / 'summary.json'}")


if __name__ == "__main__":
    main()
