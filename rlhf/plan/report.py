"""A plan in words."""

from __future__ import annotations

from collections.abc import Mapping

from rlhf.plan.memory import Need
from rlhf.plan.roles import Plan

GIB = 2**30


def lines(plan: Plan) -> list[str]:
    """What a run needs, role by role and together."""
    every = sum(plan.parameters.values())
    models = ", ".join(f"{name} {millions(size)}" for name, size in plan.parameters.items())
    found = [f"models: {models} parameters, {millions(every)} together; {millions(plan.trained)} are trained"]
    found.append(f"a step: {_step(plan)}")
    width = max(len(need.role) for need in plan.needs)
    found += [_role(need, width) for need in plan.needs]
    return found + plan.notes


def _step(plan: Plan) -> str:
    w = plan.work
    return (
        f"{w.prompts} prompts (mean {w.mean_prompt:.0f} tokens, {max(w.prompt_lengths)} at most) with {w.samples} "
        f"responses of {w.response_tokens} tokens: {w.step_tokens} tokens"
    )


def _role(need: Need, width: int) -> str:
    parts = sorted(need.own.items(), key=lambda part: -part[1])
    told = ", ".join(f"{name} {gib(size)}" for name, size in parts if size >= 0.01 * need.total)
    times = f"{need.count} x " if need.count > 1 else ""
    shape = f"; {need.shape}" if need.shape else ""
    return f"{need.role:<{width}}  {times}{gib(need.total)} GiB: {told}{shape}"


def node(plan: Plan, free: int | None) -> list[str]:
    """Of all roles on one node.

    Args:
        free: bytes that it has; None: the roles are on several nodes, of which nothing is known.
    """
    parts = f"processes {gib(plan.own)}, object store {gib(plan.store)}, weights read where they lie {gib(plan.files)}"
    if free is None:
        return [
            f"all nodes together: {gib(plan.total)} GiB ({parts}); each node has its roles, as Ray places them"
        ]
    found = [f"this node: {gib(plan.total)} GiB ({parts}); free are {gib(free)}"]
    if plan.total > free:
        found.append(
            "it does not fit: deepspeed.activation_checkpointing=true, a lower deepspeed.micro_batch_tokens, "
            "dtype=bfloat16, policy.lora or fewer processes need less"
        )
    return found


def gib(size: float) -> str:
    return f"{size / GIB:.2f}"


def millions(count: int) -> str:
    """
    >>> millions(134515008)
    '134.5 M'
    """
    return f"{count / 1e6:.1f} M"


def timed(seconds: Mapping[str, float]) -> str:
    """Estimated seconds of stages, by name."""
    told = ", ".join(f"{name} {hours(value)}" for name, value in seconds.items())
    return f"time, if responses stay as long: {told}; together {hours(sum(seconds.values()))}"


def hours(seconds: float) -> str:
    """
    >>> hours(42), hours(600), hours(9000)
    ('42 s', '10.0 min', '2.5 h')
    """
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
