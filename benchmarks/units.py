"""Who moves when one reward changes its unit: the helpful reward model of the embedded world times 1/4, 1 and 4, five
seeds, every arm at the same KL.

    python -m benchmarks.units                      hours on two cores; run again, it goes on where it stopped
    python -m benchmarks.units --seeds 0 --experiment study_quick    a seed, in little

A scaled model is the trained one with its head, and so its temperature, multiplied: the same preferences in another
unit. The coefficients of an arm are searched, for every seed and scale, until one run ends a little below 2 nats and a
second a little above (`wanted`): only the measured KL decides, nothing else is tuned. The joint win rate, by the judge
that knows the truth, is that at 2 nats, on the line between the two; a seed of an arm that does not come so far is told
of, and left out. The scales are powers of two, so that an arm without units computes the same numbers in all of them:
the first seed is trained in every scale, and an arm whose runs were then equal to the last digit is trained in one
scale afterwards.

Writes benchmarks/units.json: {"joint": {arm: {scale: {"mean", "low", "high", "seeds"}}}, "moves": {arm: ...}}, and
"helpful" and "harmless" as "joint": shares with 95 % t-intervals over seeds. "calibrated_minus" is calibrated LSC minus
the arm, joint, seed by seed; "base" is the base policy's joint. An arm moves by the greatest difference of joint
between two scales, of each seed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.evaluate.equal_kl import Curve

ARMS = ("lsc_calibrated", "lsc", "linear", "zscore", "par", "gdpo")
SCALES = (0.25, 1.0, 4.0)
POINTS = ("medium", "weak")  # names for two coefficients
METRICS = ("joint", "helpful", "harmless")
EQUAL = 2.0  # nats a response
BELOW, ABOVE = (1.2, 2.0), (2.0, 3.2)  # nats between which a run must end to be of use
AIMS = (1.6, 2.5)  # nats, in these
MOST = 6  # runs of an arm in a seed and scale
FALL = 0.7  # of log KL by log coefficient, until two runs tell
FILE = Path(__file__).with_name("units.json")

Point = tuple[float, float]
"""KL coefficient and the KL that its run ended with, nats a response."""


def wanted(points: Sequence[Point], fall: float = FALL) -> float | None:
    """The coefficient to be tried next; None: there is a run on either side of EQUAL, or there are enough.

    >>> wanted([(0.4, 2.4), (0.7, 1.5)]) is None
    True
    >>> round(wanted([(0.4, 3.2)]), 2)  # one below is wanted next
    1.08
    """
    low = any(BELOW[0] <= kl <= BELOW[1] for _, kl in points)
    high = any(ABOVE[0] <= kl <= ABOVE[1] for _, kl in points)
    if (low and high) or len(points) >= MOST:
        return None
    return coefficient(points, AIMS[low], fall)


def coefficient(points: Sequence[Point], aim: float, fall: float = FALL) -> float:
    """Where a run would end with a KL of `aim`: on the line, log by log, through the two runs nearest to it, or of the
    slope `-fall` through the only one."""
    (value, kl), *others = nearest(points, aim)
    if others:
        fall = falls(points, aim)
    return value * min(max(max(kl, 0.01) / aim, 0.05), 20.0) ** (1 / fall)


def falls(points: Sequence[Point], aim: float = EQUAL) -> float:
    """How log KL falls by log coefficient around a KL; FALL where one run cannot tell."""
    if len(near := nearest(points, aim)) < 2 or near[0][0] == near[1][0]:
        return FALL
    (c, kl), (other, further) = near
    return min(max(-math.log(max(further, 0.01) / max(kl, 0.01)) / math.log(other / c), 0.4), 2.5)


def nearest(points: Sequence[Point], aim: float) -> list[Point]:
    """The two runs nearest to a KL, on either side of it where there are such; nearest first."""
    near = sorted(points, key=lambda point: abs(math.log(max(point[1], 0.01) / aim)))
    across = [p for p in near[1:] if (p[1] < aim) != (near[0][1] < aim)]
    return [*near[:1], *(across or near[1:])[:1]]


def rlhf(*overrides: str, **environment: str) -> None:
    command = [sys.executable, "-m", "rlhf", *overrides]
    if subprocess.run(command, env=os.environ | environment, check=False).returncode:
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


def kl_coefficients(arm: str) -> dict[str, float]:
    """An arm's coefficients in the study, by point."""
    from omegaconf import OmegaConf

    loaded = OmegaConf.to_container(
        OmegaConf.load(FILE.parents[1] / "conf" / "arm" / f"{arm}.yaml"), resolve=False
    )
    return loaded["study"]["kl_coefs"]


class Search:
    """The runs of a seed and scale, kept in a file: {arm: [figures with "coefficient"]}."""

    def __init__(self, folder: Path, scale: float) -> None:
        self._path, self._scale = folder / f"figures-{scale:g}.json", f"{scale:g}"
        self.figures: dict[str, list[dict[str, Any]]] = (
            json.loads(self._path.read_text()) if self._path.exists() else {arm: [] for arm in ARMS}
        )

    def points(self, arm: str) -> list[Point]:
        return [(f["coefficient"], math.inf if f["diverged"] else f["kl"]) for f in self.figures[arm]]

    def run(self, common: Sequence[str], coefficients: Mapping[str, Sequence[float]], sweep: Path) -> None:
        """Runs of each arm, as many as the others'."""
        points = POINTS[: len(next(iter(coefficients.values())))]
        names = dict(enumerate(kl_coefficients(next(iter(coefficients)))))  # of points, by their numbers
        cells = {
            (arm, point): c for arm, own in coefficients.items() for point, c in zip(points, own, strict=True)
        }
        shutil.rmtree(sweep, ignore_errors=True)
        rlhf(
            *common, f"arm={','.join(coefficients)}", f"study.point={','.join(points)}", f"hydra.sweep.dir={sweep}",
            "align.kl_coef='${oc.decode:${oc.env:UNITS_${study.arm}_${study.point}}}'",
            **{f"UNITS_{arm}_{point}": repr(value) for (arm, point), value in cells.items()},
        )  # fmt: skip
        for figures in json.loads((sweep / "summary.json").read_text())["figures"]:
            if (cell := (figures["arm"], names[figures["point"]])) in cells:
                self.figures[cell[0]].append({**figures, "coefficient": cells[cell]})
        self.keep()
        for arm in coefficients:
            told = "  ".join(f"{c:.3g}: {kl:.2f} nats" for c, kl in self.points(arm))
            print(f"{arm} times {self._scale}: {told}", flush=True)

    def keep(self) -> None:
        self._path.write_text(json.dumps(self.figures))


def seen(figures: Mapping[str, Any]) -> dict[str, float]:
    """What of a run has no unit: its coefficient, and what it did to the responses."""
    values = {k: v for k, v in figures["values"].items() if k.startswith(("win/", "hacking/"))}
    return values | {"kl": figures["kl"], "coefficient": figures["coefficient"]}


def unitless(found: Mapping[float, Mapping[str, Sequence[Mapping[str, Any]]]]) -> set[str]:
    """The arms that gave the same numbers in every scale, with the same coefficient."""
    first = {arm: [seen(by_arm[arm][0]) for by_arm in found.values()] for arm in ARMS}
    return {arm for arm, runs in first.items() if all(run == runs[0] for run in runs)}


def train(
    seed: int,
    output: Path,
    overrides: Sequence[str],
    starts: dict[tuple[str, float], list[Point]],
    free: Collection[str],
) -> dict[float, dict[str, list[dict[str, Any]]]]:
    """Figures of all runs of a seed, by scale and arm.

    Args:
        starts: the runs of the seed before, from which the first coefficients are taken; this seed's on return.
        free: arms without units.
    """
    common = [f"output_dir={output}", *overrides, f"seed={seed}", "evaluators=none"]
    folder = output / "units" / f"seed-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for scale in sorted(SCALES, key=lambda scale: scale != 1):
        model = folder / f"helpful-{scale:g}"
        if not model.exists():
            rlhf(*common, "hydra.mode=RUN", "arm=lsc", "stages=[sft,reward_models]")
            scaled((output / "latest" / "reward_models" / "helpful").resolve(), model, scale)
        search = Search(folder, scale)
        if scale != 1:
            search.figures.update({arm: found[1][arm] for arm in free})
            search.keep()
        given = [*common, f"reward_models.helpful.path={model}"]
        number = len(list(folder.glob(f"sweep-{scale:g}-*")))
        while True:
            coefficients = {}
            for arm in ARMS:
                points = search.points(arm)
                before = starts[arm, scale]
                if not points:
                    coefficients[arm] = [coefficient(before, aim) for aim in AIMS[: len(before)]]
                elif (following := wanted(points, falls(before))) is not None:
                    coefficients[arm] = [following]
            if not coefficients:
                break
            search.run(given, coefficients, folder / f"sweep-{scale:g}-{number}")
            number += 1
        starts.update({(arm, scale): search.points(arm) for arm in ARMS})
        found[scale] = search.figures
    return found


def at_equal_kl(figures: Sequence[Mapping[str, Any]], metric: str) -> float | None:
    """A metric of one arm, seed and scale; None: the arm did not come so far."""
    kept = [f for f in figures if f["diverged"] is None]
    if not kept:
        return None
    curve = Curve.through([(f["kl"], f["values"][metric]) for f in kept], kept[0]["base"][metric])
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


def _minus(
    one: Mapping[int, Sequence[float | None]], other: Mapping[int, Sequence[float | None]], scale: int
) -> list[float]:
    """Differences at a scale, of the seeds in which both came so far."""
    pairs = [(one[seed][scale], other[seed][scale]) for seed in one]
    return [a - b for a, b in pairs if a is not None and b is not None]


def table(every: Mapping[int, Mapping[float, Mapping[str, Sequence[Mapping[str, Any]]]]]) -> dict[str, Any]:
    result: dict[str, Any] = {"nats": EQUAL, "moves": {}, "calibrated_minus": {}}
    leading: dict[int, list[float | None]] = {}
    for name in METRICS:
        result[name] = {}
        for arm in ARMS:
            by_seed = {
                seed: [at_equal_kl(found[scale][arm], f"win/gold/{name}") for scale in SCALES]
                for seed, found in every.items()
            }
            columns = [[v for v in column if v is not None] for column in zip(*by_seed.values(), strict=True)]
            result[name][arm] = {
                f"{s:g}": interval(column) for s, column in zip(SCALES, columns, strict=True) if column
            }
            if name != METRICS[0]:
                continue
            leading = leading or by_seed
            result["calibrated_minus"][arm] = {
                f"{scale:g}": interval(differences)
                for i, scale in enumerate(SCALES)
                if (differences := _minus(leading, by_seed, i))
            }
            for seed, values in by_seed.items():
                for scale, value in zip(SCALES, values, strict=True):
                    if value is None:
                        print(f"{arm} times {scale:g}, seed {seed}: did not come to {EQUAL:g} nats")
            whole = [
                [v for v in values if v is not None] for values in by_seed.values() if None not in values
            ]
            if whole:
                result["moves"][arm] = interval([max(values) - min(values) for values in whole])
    base = [found[SCALES[0]][ARMS[0]][0]["base"]["win/gold/joint"] for found in every.values()]
    return result | {"base": interval(base)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", default="0,1,2,3,4")
    parser.add_argument("--experiment", default="study")
    parser.add_argument("--output", type=Path, default=Path("outputs/units"))
    given = parser.parse_args()
    seeds = [int(seed) for seed in given.seeds.split(",")]
    overrides = [f"experiment={given.experiment}", *given.overrides]
    starts = {(arm, scale): [(kl_coefficients(arm)["medium"], EQUAL)] for arm in ARMS for scale in SCALES}
    every: dict[int, dict[float, dict[str, list[dict[str, Any]]]]] = {}
    for seed in seeds:
        free = unitless(every[seeds[0]]) if every else ()
        every[seed] = train(seed, given.output.absolute(), overrides, starts, free)
    found = table(every)
    FILE.write_text(json.dumps(found, indent=1) + "\n")
    for arm, scales in found["joint"].items():
        shown = "  ".join(
            f"{s}: {v['mean']:.3f} ({v['low']:.3f} to {v['high']:.3f})" for s, v in scales.items()
        )
        print(f"{arm:<16}{shown}")


if __name__ == "__main__":
    main()
