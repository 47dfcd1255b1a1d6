"""The policy while it is trained: a point for each evaluation, the best of them, and when to stop.

A response wins by a judge as in `rlhf.evaluate.wins`. Judges are `reward_models` (raw reward at least r_ref), `judge`
(one of its own, where there is one) and `evaluators` (reward models trained apart, where there are any). The reward
models choose, as only they are always there; the others show what the choice is worth.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np

from rlhf.evaluate.hacking import Lexicon, counted
from rlhf.evaluate.measures import by_evaluator
from rlhf.evaluate.samples import PolicySamples, applying
from rlhf.evaluate.wins import (
    JOINT,
    bootstrap,
    check_finite,
    cluster_index,
    mean,
    mean_and_error,
    prompt_wins,
)
from rlhf.evaluate.words import judged_by_rewards, percent
from rlhf.files import write_atomic

FILE = "evaluations.jsonl"
OPTIMISED, OWN, APART = "reward_models", "judge", "evaluators"
Interval = tuple[float, float]


@dataclass(frozen=True)
class Point:
    """The policy of a step on held-out prompts. Step 0 is the base policy: drawn, and never chosen."""

    step: int
    win_rate: Mapping[
        str, Mapping[str, float]
    ]  # judge -> property (then "joint") -> share of responses that win
    win_rate_ci: Mapping[str, Mapping[str, Interval]]  # likewise, 95 %, by clusters
    kl: float  # nats a response, from the base policy
    kl_standard_error: float
    hacking: Mapping[str, float]  # counter of `rlhf.evaluate.hacking` -> its value
    prompts: int
    samples: int  # responses to each

    def joint(self, judge: str) -> float:
        return self.win_rate[judge][JOINT]


def due(step: int, steps: int, every: int | None) -> bool:
    """Whether a point is made after this step of training: after each `every` steps, and the last."""
    return every is not None and (step % every == 0 or step == steps)


def point(step: int, samples: PolicySamples, lexicon: Lexicon) -> Point:
    """
    Raises:
        ValueError: a score, a reference or a log-ratio is not finite; it names whose, and the prompt.
    """
    judged = _by_judge(samples)
    if not np.isfinite(samples.log_ratio).all():
        at = int(np.flatnonzero(~np.isfinite(samples.log_ratio).all(axis=1))[0])
        raise ValueError(f"the log-ratio to the base policy is not finite on prompt {at}, at step {step}")
    clusters, _ = cluster_index(samples)
    rates: dict[str, dict[str, float]] = {}
    intervals: dict[str, dict[str, Interval]] = {}
    for judge, seen in judged.items():
        check_finite(f"policy of step {step}", seen)
        wins = prompt_wins(seen)
        ends = np.array(bootstrap(np.stack(list(wins.values()), axis=1), clusters)).T
        if clusters.max() == 0:
            ends[:] = (0.0, 1.0)
        rates[judge] = {name: mean(won) for name, won in wins.items()}
        intervals[judge] = {name: (float(a), float(b)) for name, (a, b) in zip(wins, ends, strict=True)}
    kl, error = mean_and_error(np.asarray(samples.log_ratio, np.float64).mean(axis=1), clusters)
    shape = samples.lengths.shape
    return Point(step, rates, intervals, kl, error, counted(samples, lexicon), *map(int, shape))


def _by_judge(samples: PolicySamples) -> dict[str, PolicySamples]:
    """The samples as each judge sees them."""
    found = {OPTIMISED: replace(samples, judged=applying(samples.rewards), judge_reference=samples.reference)}
    if samples.judged and not judged_by_rewards(samples):
        found[OWN] = samples
    if samples.evaluated:
        found[APART] = by_evaluator(samples)
    return found


@dataclass(frozen=True)
class Choice:
    """The step whose policy a run ends with, and why, in a line."""

    step: int
    why: str


def choose(points: Sequence[Point], policy: str, max_kl: float | None) -> Choice:
    """By `evaluate.policy` and `evaluate.max_kl`, of the points after step 0, of which there is one at least."""
    trained = [p for p in points if p.step > 0]
    assert trained, "nothing was evaluated"
    if policy == "last":
        return Choice(trained[-1].step, f"step {trained[-1].step}, the last: evaluate.policy=last")
    chosen = next(p for p in trained if p.step == best(trained, max_kl))
    rate = f"joint win rate by the reward models {percent(chosen.joint(OPTIMISED))} at KL {chosen.kl:.2f}"
    if max_kl is None:
        return Choice(chosen.step, f"step {chosen.step}, the best of {len(trained)} evaluated: {rate}")
    if chosen.kl > max_kl:
        return Choice(
            chosen.step,
            f"step {chosen.step}: none of {len(trained)} evaluated has a KL of at most evaluate.max_kl={max_kl:g}, "
            f"and this one has the least: {rate}",
        )
    within = sum(p.kl <= max_kl for p in trained)
    return Choice(
        chosen.step,
        f"step {chosen.step}, the best of {within} evaluated with a KL of at most evaluate.max_kl={max_kl:g}: {rate}",
    )


def best(points: Sequence[Point], max_kl: float | None) -> int:
    """The step of the highest joint win rate by the reward models at a KL of at most `max_kl` (None: at any), the
    earliest of equals; where no KL is that low, the step of the lowest."""
    within = [p for p in points if max_kl is None or p.kl <= max_kl]
    if not within:
        return min(points, key=lambda p: (p.kl, p.step)).step
    return max(within, key=lambda p: (p.joint(OPTIMISED), -p.step)).step


def should_stop(points: Sequence[Point], patience: int | None) -> str | None:
    """Why training ends early, in a line: the evaluators' joint win rate fell at each of the last `patience`
    evaluations, and the reward models' rose over them: what is gained is not what was meant. None: it goes on."""
    if patience is None or len(points) <= patience:
        return None
    last = points[-patience - 1 :]
    apart, optimised = ([p.joint(judge) for p in last] for judge in (APART, OPTIMISED))
    if optimised[-1] <= optimised[0] or any(b >= a for a, b in pairwise(apart)):
        return None
    fell, rose = (f"from {percent(r[0])} to {percent(r[-1])}" for r in (apart, optimised))
    return (
        f"stopped early after step {last[-1].step}: over {patience} evaluations the evaluators' joint win rate fell "
        f"{fell}, at each of them, while the reward models' rose {rose} (evaluate.patience={patience})"
    )


def write_points(path: Path, points: Sequence[Point]) -> None:
    """Replaces the file at once: JSON lines, in the order of steps, each step once."""
    steps = [p.step for p in points]
    assert steps == sorted(set(steps)), steps
    write_atomic(path, "".join(json.dumps(asdict(p), sort_keys=True, allow_nan=False) + "\n" for p in points))


def read_points(path: Path) -> list[Point]:
    """Of a file that is not there none."""
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        fields = json.loads(line)
        intervals = {j: {n: tuple(ends) for n, ends in of.items()} for j, of in fields["win_rate_ci"].items()}
        found.append(Point(**fields | {"win_rate_ci": intervals}))
    return found
