"""KL coefficients that bring every arm of a study to the same KL, from one pilot run of three coefficients each.

    rlhf experiment=study seed=100                                    a seed that the study does not use
    python -m benchmarks.study_coefficients outputs/sweeps/DATE/summary.json

This is all the tuning there is, and the same for every arm. KL is a power of the coefficient between two neighbouring
points; beyond the outer points the outermost power goes on, a little. Where a target is farther away the arm needs
another pilot run, whose summary.json is given beside the first. The figures go into conf/arm.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

TARGETS = (1.1, 2.6, 5.0)  # nats a response
BEYOND = 1.5  # how many times the greatest KL measured, or less than the least, a target may be


def coefficient(points: Sequence[tuple[float, float]], target: float) -> float:
    """The coefficient at a KL, from (coefficient, KL) points.

    Raises:
        ValueError: the KL is too far from what was measured.

    >>> round(coefficient([(1.0, 1.0), (0.5, 2.0), (0.25, 8.0)], 4.0), 4)
    0.3536
    """
    ordered = sorted((math.log(kl), math.log(c)) for c, kl in points)
    least, most = math.exp(ordered[0][0]), math.exp(ordered[-1][0])
    if len(ordered) < 2 or not least / BEYOND <= target <= most * BEYOND:
        raise ValueError(
            f"{target:g} nats is too far from the {least:.2f} to {most:.2f} nats measured: pilot again"
        )
    spans = list(pairwise(ordered))
    aim = math.log(target)
    (x0, y0), (x1, y1) = next((s for s in spans if aim <= s[1][0]), spans[-1])
    return math.exp(y0 + (aim - x0) * (y1 - y0) / (x1 - x0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("summaries", type=Path, nargs="+")
    given = parser.parse_args()
    measured: dict[str, list[tuple[float, float]]] = {}
    for path in given.summaries:
        for f in json.loads(path.read_text())["figures"]:
            if f["kl_coef"] > 0 and f["diverged"] is None:
                measured.setdefault(f["arm"], []).append((f["kl_coef"], f["kl"]))
    for arm, points in measured.items():
        shown = "  ".join(f"{c:g}: {kl:.2f}" for c, kl in sorted(points, reverse=True))
        try:
            found = "  ".join(f"{target:g} nats at {coefficient(points, target):.2g}" for target in TARGETS)
        except ValueError as error:
            found = str(error)
        print(f"{arm:<16}{found}   (coefficient: KL {shown})")


if __name__ == "__main__":
    main()
