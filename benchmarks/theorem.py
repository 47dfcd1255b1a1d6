"""Trains policies whose responses can be enumerated, through the real actors, and measures how far they end from the
closed form pi0 * exp(u / beta) / Z (arXiv 2402.00742).

    python -m benchmarks.theorem                     every case, and the two that must fail
    python -m benchmarks.theorem --steps 200 --cases rloo:lsc
    python -m benchmarks.theorem --output FOLDER     where summary.json goes

The world: a vocabulary of 6 with the end token, responses of at most 3 tokens, 4 prompts, and two reward models
made of random weights, scaled so that the closed form is well away from the base policy. Policy gradient learns from
what the base policy samples: a target that it practically never samples is not reached.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config import Config
from rlhf.config_checks import typed

VOCABULARY = ["<eos>", "a", "b", "c", "d", "e"]
PROMPTS = ["a b", "c d e", "e", "d d a c"]
LENGTH, BETA = 3, 1.0
LIMIT, LEAST = 0.02, 0.4  # nats: to the closed form after training, and of the closed form to the base policy
UTILITIES = {
    "lsc": ["utility=lsc"],
    "linear": ["utility=linear"],
    "par": ["utility=par"],
}
"""What is maximised. Rewards are scaled for each (`SCALE`), for PAR's utilities are within 0 and 1."""
SCALE = {"lsc": 3.0, "linear": 1.65, "par": 3.3}
BETAS = {"lsc": BETA, "linear": BETA, "par": 0.25}
ALGORITHMS = ("rloo", "ppo")


def world_of(folder: Path, scale: float) -> Path:
    """A policy, two reward models of this scale, and the prompts, in a folder of their own, made once. The same scale
    gives the same world."""
    world = folder / f"scale-{scale:g}"
    if not world.exists():
        _make_world(world, scale)
    return world


def _make_world(folder: Path, scale: float) -> None:
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(VOCABULARY)}, unk_token="<eos>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<eos>")
    common: dict[str, Any] = {
        "vocab_size": len(VOCABULARY),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 32,
        "pad_token_id": 0,
        "eos_token_id": 0,
        "bos_token_id": None,
        "initializer_range": 0.1,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**common)).save_pretrained(folder / "policy")
    tokenizer.save_pretrained(folder / "policy")
    for seed, name in enumerate(("helpful", "harmless"), start=1):
        torch.manual_seed(seed)
        model = LlamaForSequenceClassification(LlamaConfig(**common, num_labels=1))
        with torch.no_grad():
            model.score.weight.normal_(std=scale / 8)  # times the norm of a state, about 8
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    (folder / "eval.jsonl").write_text(json.dumps({"prompt": "b"}) + "\n")


def configure(world: Path, output: Path, steps: int, samples: int, overrides: Sequence[str]) -> Config:
    from hydra import compose, initialize_config_module

    peak = 3.0e-3
    rates = [[int(steps * t), peak * 0.5 * (1 + np.cos(np.pi * t))] for t in np.linspace(0, 1, 11)]
    given = [
        "data=files",
        f"data.prompts={world / 'prompts.jsonl'}",
        f"data.eval_prompts={world / 'eval.jsonl'}",
        f"policy.path={world / 'policy'}",
        *(f"reward_models.{n}.path={world / n}" for n in ("helpful", "harmless")),
        "reward_models.harmless.reference=quantile",
        "reward_models.harmless.canned=[]",
        "stages=[baseline,align]",
        f"output_dir={output}",
        f"rollout.max_new_tokens={LENGTH}",
        f"rollout.prompts_per_item={len(PROMPTS)}",
        f"align.steps={steps}",
        f"align.prompts_per_step={len(PROMPTS)}",
        f"align.samples_per_prompt={samples}",
        f"align.learning_rate={[[s, float(f'{r:.6g}')] for s, r in rates]}".replace(" ", ""),
        "baseline.samples=64",
        "resources.generators.count=1",
        "resources.learner.count=1",
        "logging={live: 'off', loggers: []}",
    ]
    with initialize_config_module("conf", version_base=None):
        return typed(compose("config", overrides=[*given, *overrides]))


def train(config: Config, session: Any) -> Any:
    """Runs the stages, and returns them."""
    from actors.job import run
    from actors.preflight import preflight
    from actors.stages.stage import Stages
    from rlhf.store import Store

    output = Path(config.output_dir)
    run(config, output / "run", "", session)
    store = Store(output / "store")
    return Stages(config, preflight(config, store), store)


def distances(world: Path, stages: Any, utility: str, beta: float) -> dict[str, float]:
    """KL of the trained policy to the closed form, of the base policy to it, and the size of both terms, nats."""
    from actors.stages.align import Align
    from actors.stages.baseline import Baseline
    from rlhf.data.chat import ChatFormat
    from rlhf.evaluate.closed_form import kl, log_distribution, optimum, responses
    from rlhf.models.load import load_policy, load_tokenizer
    from rlhf.models.reward import RewardScorer
    from rlhf.types import prompt_id
    from rlhf.utility.pipeline import Utility
    from rlhf.utility.statistics import BaselineStatistics

    tokenizer = load_tokenizer(str(world / "policy"), "policy.path")
    chat = ChatFormat(tokenizer, "policy")
    every = responses(len(VOCABULARY), 0, LENGTH)
    prompts = [chat.prompt_tokens(p) for p in PROMPTS]
    ids = np.array([prompt_id(p) for p in PROMPTS], np.uint64)
    group = np.repeat(np.arange(len(PROMPTS)), len(every))
    rows = [list(r) for r in every] * len(PROMPTS)
    texts = chat.response_texts(PROMPTS, prompts, group, rows, set(chat.end_tokens()))
    names = ("helpful", "harmless")
    raw = np.stack(
        [RewardScorer(n, str(world / n)).score([PROMPTS[g] for g in group], texts) for n in names],
        1,
    )
    baseline = stages.of(Baseline)
    statistics, rules = BaselineStatistics.load(baseline.statistics_path), baseline.rules
    references = {n: statistics.reference(n, ids, rules[n], 256) for n in names}
    target = Utility(utility, "and" if utility == "lsc" else "weighted_sum", {}, dict.fromkeys(names, 1.0))
    u = target.combined(raw, references, group).reshape(len(PROMPTS), -1).astype(np.float64)
    base = log_distribution(load_policy(str(world / "policy")), prompts, every)
    trained = log_distribution(load_policy(str(stages.of(Align).policy_path)), prompts, every)
    best = optimum(base, u, beta)
    return {
        "to_closed_form": kl(trained, best),
        "base_to_closed_form": kl(base, best),
        "closed_form_to_base": kl(best, base),
        "trained_to_base": kl(trained, base),
        "total_probability": float(np.exp(trained).sum(-1).mean()),
    }


def case(
    algorithm: str,
    utility: str,
    steps: int,
    samples: int,
    session: Any,
    folder: Path,
    fault: str | None = None,
) -> dict[str, Any]:
    """Trains one case and compares it with the closed form of what was meant. Cases in one folder share worlds.

    fault: "uncentred" trains on log sigmoid(r) in place of log sigmoid(r - r_ref); "kl_sign" turns the sign of the KL
    coefficient round. Either must end away from the closed form.
    """
    started = time.perf_counter()
    world, beta = world_of(folder, SCALE[utility]), BETAS[utility]
    overrides = UTILITIES[utility] if fault != "uncentred" else ["utility=log_sigmoid"]
    overrides = [*overrides, f"algorithm={algorithm}", f"align.kl_coef={beta}"]
    output = folder / "-".join(filter(None, ("output", algorithm, utility, fault)))
    config = configure(world, output, steps, samples, overrides)
    if fault == "kl_sign":
        config = replace(config, align=replace(config.align, kl_coef=-beta))
    found = distances(world, train(config, session), utility, beta)
    ok = found["to_closed_form"] <= LIMIT and found["closed_form_to_base"] >= LEAST
    return {
        "algorithm": algorithm,
        "utility": utility,
        "fault": fault,
        "beta": beta,
        "steps": steps,
        **found,
        "reached": ok,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--samples", type=int, default=128, help="responses to each prompt and step")
    parser.add_argument("--cases", nargs="*", help="algorithm:utility[:fault]; default: all")
    parser.add_argument("--output", type=Path, default=Path("outputs/theorem"))
    given = parser.parse_args()
    os.environ.setdefault("RLHF_OUTPUT_DIR", str(given.output))
    from transformers.utils import logging

    from actors.session import Session

    logging.disable_progress_bar()
    wanted = given.cases or [f"{a}:{u}" for a in ALGORITHMS for u in UTILITIES] + [
        "rloo:lsc:uncentred",
        "rloo:lsc:kl_sign",
    ]
    session, rows = Session(), []
    print(f"{'case':<22}{'closed form to base':>20}{'trained to closed form':>24}   verdict")
    worlds = tempfile.TemporaryDirectory()
    try:
        for name in wanted:
            algorithm, utility, *fault = name.split(":")
            row = case(algorithm, utility, given.steps, given.samples, session, Path(worlds.name), *fault)
            rows.append(row)
            verdict = "reached" if row["reached"] else "not reached"
            print(
                f"{name:<22}{row['closed_form_to_base']:>15.3f} nats{row['to_closed_form']:>19.4f} nats   {verdict}"
                f" ({row['seconds']:.0f} s)",
                flush=True,
            )
    finally:
        session.stop()
        worlds.cleanup()
    right = all(row["reached"] == (row["fault"] is None) for row in rows)
    given.output.mkdir(parents=True, exist_ok=True)
    summary = {"limit": LIMIT, "least": LEAST, "as_expected": right, "cases": rows}
    (given.output / "summary.json").write_text(json.dumps(summary, indent=1))
    print(f"{given.output / 'summary.json'}")
    sys.exit(0 if right else "error: a case did not end as it must")


if __name__ == "__main__":
    main()
