"""Who moves when one reward changes its unit: the helpful reward model of the embedded world times 1/4, 1 and 4, every
arm trained to two KLs, five seeds.

    python -m benchmarks.units                      hours on two cores; run again, it goes on where it stopped
    python -m benchmarks.units --seeds 0 --experiment study_quick    a seed, in little

A scaled model is the trained one with its head, and so its temperature, multiplied: the same preferences in another
unit. The KL coefficient starts from the arm's own and is adapted to the two targets (algorithm.kl_target), so that
nothing is tuned. The joint win rate, by the judge that knows the truth, is that at 2 nats, on straight lines through
the base policy and the two measured points; a seed of an arm that did not come so far is told of, and left out.

Writes benchmarks/units.json: {"joint": {arm: {scale: {"mean", "low", "high", "seeds"}}}, "moves": {arm: ...}}, shares
with 95 % t-intervals over seeds; an arm moves by the greatest difference between two scales, of each seed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.evaluate.equal_kl import Curve

ARMS = ("lsc_calibrated", "lsc", "linear", "zscore", "par", "gdpo")
SCALES = (0.25, 1.0, 4.0)
TARGETS = {"weak": 1.5, "medium": 3.0}  # nats a response, by point of the arm's coefficients
EQUAL = 2.0  # nats a response
HORIZON = 128  # responses over which the coefficient is adapted: one step
FILE = Path(__file__).with_name("units.json")


def rlhf(*overrides: str) -> None:
    targets = {f"UNITS_{point}": f"{kl}" for point, kl in TARGETS.items()}
    command = [sys.executable, "-m", "rlhf", *overrides]
    if subprocess.run(command, env=os.environ | targets, check=False).returncode:
        raise SystemExit(f"error: {' '.join(command)} failed")


def scaled(model: Path, folder: Path, scale: float) -> None:
    """A copy of a trained reward model whose rewards are `scale` times as large."""
    from safetensors.torch import load_file, save_file

    beside = folder.with_name(f".{folder.name}")
    shutil.rmtree(beside, ignore_errors=True)
    shutil.copytree(model, beside)
    weights = load_file(beside / "model.safetensors")
    weights["score.weight"] = weights["score.weight"] * scale
    save_file(weights, beside / "model.safetensors", {"format": "pt"})
    path = beside / "calibration.json"
    calibration = json.loads(path.read_text())
    calibration["temperature"] *= scale
    path.write_text(json.dumps(calibration))
    (beside / "checksums.json").unlink(missing_ok=True)
    beside.rename(folder)


def train(seed: int, output: Path, overrides: Sequence[str]) -> dict[float, list[dict[str, Any]]]:
    """Figures of all cells of a seed, by scale."""
    common = [f"output_dir={output}", *overrides]
    folder = output / "units" / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for scale in SCALES:
        kept, model = folder / f"figures-{scale:g}.json", folder / f"helpful-{scale:g}"
        if not kept.exists():
            if not model.exists():
                one = ["hydra.mode=RUN", "arm=lsc", "stages=[sft,reward_models]", "evaluators=none"]
                rlhf(*common, f"seed={seed}", *one)
                scaled((output / "latest" / "reward_models" / "helpful").resolve(), model, scale)
            rlhf(
                *common, f"seed={seed}", f"arm={','.join(ARMS)}", f"study.point={','.join(TARGETS)}",
                "algorithm.kl_target='${oc.decode:${oc.env:UNITS_${study.point}}}'",
                f"algorithm.kl_horizon={HORIZON}", f"reward_models.helpful.path={model}",
                f"hydra.sweep.dir={folder / f'sweep-{scale:g}'}",
            )  # fmt: skip
            summary = json.loads((folder / f"sweep-{scale:g}" / "summary.json").read_text())
            kept.write_text(json.dumps([f for f in summary["figures"] if f["arm"] in ARMS]))
        found[scale] = json.loads(kept.read_text())
    return found


def at_equal_kl(figures: Sequence[Mapping[str, Any]], arm: str, metric: str) -> float | None:
    """A metric of one seed and scale; None: the arm did not come so far."""
    own = [f for f in figures if f["arm"] == arm and f["diverged"] is None]
    points = [(f["kl"], f["values"][metric]) for f in own]
    if not points:
        return None
    curve = Curve.through(points, own[0]["base"][metric])
    return curve.at(EQUAL) if curve.covers(EQUAL) else None


def interval(values: Sequence[float]) -> dict[str, float | int]:
    from scipy.stats import t

    mean, count = float(np.mean(values)), len(values)
    half = (
        float(t.ppf(0.975, count - 1) * np.std(values, ddof=1) / np.sqrt(count))
        if count > 1
        else float("inf")
    )
    return {"mean": mean, "low": mean - half, "high": mean + half, "seeds": count}


def table(every: Mapping[int, Mapping[float, Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    joint: dict[str, Any] = {}
    moves: dict[str, Any] = {}
    for arm in ARMS:
        by_seed = {
            seed: [at_equal_kl(found[scale], arm, "win/gold/joint") for scale in SCALES]
            for seed, found in every.items()
        }
        for seed, values in by_seed.items():
            for scale, value in zip(SCALES, values, strict=True):
                if value is None:
                    print(f"{arm} times {scale:g}, seed {seed}: did not come to {EQUAL:g} nats")
        columns = [[v for v in column if v is not None] for column in zip(*by_seed.values(), strict=True)]
        joint[arm] = {f"{s:g}": interval(column) for s, column in zip(SCALES, columns, strict=True) if column}
        whole = [[v for v in values if v is not None] for values in by_seed.values() if None not in values]
        if whole:
            moves[arm] = interval([max(values) - min(values) for values in whole])
    return {"joint": joint, "moves": moves, "nats": EQUAL}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--experiment", default="study")
    parser.add_argument("--output", type=Path, default=Path("outputs/units"))
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    overrides = [f"experiment={given.experiment}", *given.overrides]
    every = {seed: train(seed, given.output.absolute(), overrides) for seed in seeds}
    found = table(every)
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    for arm, scales in found["joint"].items():
        shown = "  ".join(
            f"{s}: {v['mean']:.3f} ({v['low']:.3f} to {v['high']:.3f})" for s, v in scales.items()
        )
        print(f"{arm:<16}{shown}")


if __name__ == "__main__":
    main()
