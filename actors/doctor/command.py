"""The checklist of `rlhf doctor`, line by line.

rlhf doctor                                            this machine, and models of its own making
rlhf doctor resources=gpu8 rollout.engine=vllm         also whether these roles and this engine can be had
rlhf doctor policy.path=... reward_models.NAME.path=...    your models instead, on what their roles are given
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from actors.doctor import machine
from actors.doctor.finding import FAIL, OK, WARN, Finding
from actors.errors import told
from actors.resources import set_threads
from rlhf.config import Config
from rlhf.models.device import CPU, GPU, Compute, gpu_count
from rlhf.selftest.models import Models, tiny

DTYPES = ("float32", "bfloat16")
Check = tuple[str, Callable[[], Iterator[Finding]]]


def examine(config: Config, folder: Path, say: Callable[[str], None]) -> bool:
    """Tells of everything, and whether nothing failed. `folder`: for models, which nobody keeps."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # DeepSpeed, which comes with what is imported here, would look for itself and print a warning
    os.environ.setdefault("DS_ACCELERATOR", GPU if gpu_count() else CPU)
    started = time.perf_counter()
    set_threads(Compute.of(config.resources.generators).threads)
    counts = dict.fromkeys((OK, WARN, FAIL), 0)
    for name, check in _checks(config, folder):
        for finding in _found(name, check):
            counts[finding.level] += 1
            say(str(finding))
    listed = ", ".join(f"{n} {level}" for level, n in counts.items())
    say(f"doctor: {listed}, in {time.perf_counter() - started:.0f} s")
    return not counts[FAIL]


def _checks(config: Config, folder: Path) -> Iterator[Check]:
    yield "packages", machine.versions
    yield "engine", partial(machine.engine, config)
    yield "gpu", partial(machine.devices, config)
    yield "roles", partial(machine.placement, config)
    yield "host", partial(machine.host, config)
    made = tiny(folder)
    models = _models(config, made)
    for device in _devices(config, models.policy != made.policy):
        for dtype in DTYPES:
            yield f"{device} {dtype}", partial(_compared, config, models, made, device, dtype)
    yield "ray", partial(_on_ray, config, made.policy)


def _found(name: str, check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a check finds; what it fails by is a finding too, and the others go on."""
    try:
        yield from check()
    except Exception as error:
        yield Finding(FAIL, name, told(error).removeprefix("error: "))


def _models(config: Config, made: Models) -> Models:
    """The given ones, and where none is given those made here."""
    given = {
        name: str(source.path)
        for name, source in config.reward_models.items()
        if source.kind == "classifier" and source.path is not None and not source.heads
    }
    return Models(config.policy.path or made.policy, given or made.rewards)


def _devices(config: Config, given: bool) -> Sequence[str]:
    """What models are tried on: small ones on all that there is, given ones on what their roles compute on."""
    if not given:
        return [CPU, GPU] if gpu_count() else [CPU]
    roles = (config.resources.generators, config.resources.learner, config.resources.reward)
    return sorted({Compute.of(role).device for role in roles})


def _compared(config: Config, models: Models, made: Models, device: str, dtype: str) -> Iterator[Finding]:
    from rlhf.selftest.compare import gaps

    templates = {
        name: getattr(source, "chat_template", None) for name, source in config.reward_models.items()
    }
    templates |= {"policy": config.policy.chat_template}
    for gap in gaps(models, config.rollout, templates, device, dtype, models.policy == made.policy):
        text = f"{gap.found:.2g} {gap.unit}, from plain transformers (limit {gap.limit:.2g})"
        advice = "" if gap.passed else "do not train with it: tell the project, with this list"
        yield Finding(OK if gap.passed else FAIL, f"{gap.what} on {device} in {dtype}", text, advice)


def _on_ray(config: Config, policy: str) -> Iterator[Finding]:
    from actors.doctor.learner import on_ray

    yield from on_ray(config, policy)
