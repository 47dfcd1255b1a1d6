"""The time of a run, from steps of it that were measured."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf.config import Config


@dataclass(frozen=True)
class Steps:
    """Means of measured steps of align."""

    seconds: float  # from one step to the next
    sampling: float  # of these, seconds in which responses were sampled or rewarded
    tokens: float  # of a response


def estimate(config: Config, steps: Steps, prompts: int, evaluated: int) -> dict[str, float]:
    """Seconds of the configured stages that follow the models, by name, where sampling and rewarding take as long a
    response as in the measured steps.

    Args:
        prompts: of training. evaluated: of evaluation.
    """
    align, e = config.align, config.evaluate
    response = steps.sampling / (align.prompts_per_step * align.samples_per_prompt)
    every = {
        "baseline": response * prompts * config.baseline.samples,
        "align": steps.seconds * align.steps,
        "evaluate": response * evaluated * (2 * e.samples + e.judge_samples),
    }
    if e.every is not None:
        every["align"] += response * evaluated * e.during_samples * (align.steps // e.every)
    return {name: seconds for name, seconds in every.items() if name in config.stages}
