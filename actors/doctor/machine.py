"""What can be seen of a machine without computing on it: versions, GPUs, memory, limits."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import resource
from collections.abc import Iterator
from pathlib import Path

from actors.doctor.finding import FAIL, OK, WARN, Finding, gib
from actors.resources import asked, check_machine, free_memory
from rlhf.config import Config
from rlhf.generate.engines import engine_class
from rlhf.models.device import built_for, collectives, gpu_fault, gpus

SHOWN = ("ray", "torch", "transformers", "deepspeed")
FILES = 8192  # open files that a few hundred actors and connections need
FREE = 0.8  # of a GPU's memory that should be free
HOST = 2 * 2**30  # bytes of memory that Ray and a small run need
DRIVERS = {"NVIDIA": Path("/proc/driver/nvidia/version"), "AMD": Path("/sys/module/amdgpu/version")}


def versions() -> Iterator[Finding]:
    """Python, and the packages that this one asks for."""
    from packaging.requirements import Requirement

    yield Finding(OK, "python", f"{platform.python_version()}, {platform.machine()}")
    try:
        wanted = [Requirement(line) for line in importlib.metadata.requires("rlhf") or ()]
    except importlib.metadata.PackageNotFoundError:
        advice = "pip install -c constraints.txt -e ."
        yield Finding(WARN, "packages", "rlhf is not installed, so what it asks for is not known", advice)
        return
    bad = []
    for one in wanted:
        if one.marker is None or one.marker.evaluate({"extra": ""}):
            found = _version(one.name)
            if found is None or not one.specifier.contains(found, prereleases=True):
                bad.append(f"{one.name}{one.specifier} is asked for, {found or 'none'} is installed")
    if bad:
        yield Finding(FAIL, "packages", "; ".join(bad), "pip install -c constraints.txt -e .")
    else:
        yield Finding(OK, "packages", ", ".join(f"{name} {_version(name)}" for name in SHOWN))


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def engine(config: Config) -> Iterator[Finding]:
    """The engine that samples: whether it is there, and goes with the other packages."""
    rollout = config.rollout
    engine_class(rollout).check(rollout, config.resources.generators.gpus)
    yield Finding(OK, "engine", f"rollout.engine={rollout.engine}")


def devices(config: Config) -> Iterator[Finding]:
    """GPUs, by the eyes of PyTorch and of the system."""
    build, drivers = built_for(), {name: path for name, path in DRIVERS.items() if path.exists()}
    listed = ", ".join(f"{name}'s driver {_driver(path)}" for name, path in drivers.items())
    fault = gpu_fault()
    if fault is not None:
        wanted = any(role.gpus for role in asked(config).values())
        if not drivers and not wanted:
            yield Finding(
                OK, "gpu", f"none here; PyTorch is built for {build or 'CPUs'}, and no role asks for one"
            )
        else:
            level = FAIL if wanted else WARN
            yield Finding(level, "gpu", f"{listed or 'no driver here'}, but {fault}")
        return
    for one in gpus():
        text = f"{one.index} {one.name}, capability {one.capability}, {listed}, PyTorch for {build}, "
        text += f"{gib(one.free)} of {gib(one.total)} free"
        if one.free < FREE * one.total:
            yield Finding(WARN, "gpu", text, "another process uses it: nvidia-smi says which")
        elif not one.bfloat16:
            yield Finding(WARN, "gpu", text, "it does not multiply bfloat16: dtype=auto is float32 there")
        else:
            yield Finding(OK, "gpu", f"{text}, bfloat16")
    library = collectives()
    if library is None:
        advice = "install PyTorch's own build"
        yield Finding(FAIL, "collectives", "this PyTorch has no NCCL, by which learner ranks add up", advice)
    else:
        yield Finding(OK, "collectives", library)


def _driver(path: Path) -> str:
    """Its version. NVIDIA's file says "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  ..."."""
    text = path.read_text()
    found = re.search(r"\b\d+\.\d+(?:\.\d+)*\b", text)
    return found[0] if found else text.splitlines()[0]


def placement(config: Config) -> Iterator[Finding]:
    """Whether what the roles ask for is here; of a given cluster, the job itself looks."""
    check_machine(config)
    roles = [
        f"{key.removeprefix('resources.')} {role.count} x ({role.cpus:g} CPUs, {role.gpus:g} GPUs)"
        for key, role in asked(config).items()
        if role.count
    ]
    where = "on this machine" if config.resources.address is None else f"at {config.resources.address}"
    yield Finding(OK, "roles", f"{', '.join(roles)} {where}")


def host(config: Config) -> Iterator[Finding]:
    """Memory, processor and limits of the host."""
    from rlhf.models.precision import dtype_of, processor_flags
    from rlhf.native import library

    free = free_memory()
    level, advice = (OK, "") if free >= HOST else (WARN, f"free {gib(HOST)} at least")
    yield Finding(level, "memory", f"{gib(free)} free, {len(os.sched_getaffinity(0))} CPUs", advice)
    if "avx512_bf16" not in processor_flags():
        kind = str(dtype_of("auto", "cpu")).removeprefix("torch.")
        yield Finding(OK, "compiled layers", f"not for this processor; dtype=auto is {kind} on it")
    elif library() is None:
        advice = "install a C compiler (cc) for fast bfloat16 on CPUs; GPUs need none"
        yield Finding(WARN, "compiled layers", "rlhf/native could not be compiled", advice)
    else:
        yield Finding(OK, "compiled layers", "rlhf/native is compiled for this processor")
    files, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    level, advice = (OK, "") if files >= FILES else (WARN, f"ulimit -n {min(65536, most)}")
    yield Finding(level, "open files", f"{files} at most", advice)


def shared_memory(store: float, folder: str = "/dev/shm") -> Finding:
    """Whether Ray's object store, of so many bytes, has room where it should be: else it is on disk, and slow."""
    place = os.statvfs(folder)
    size = place.f_frsize * place.f_blocks
    text = f"{folder} has {gib(size)}, Ray's object store takes {gib(store)} at most"
    if size >= store:
        return Finding(OK, "shared memory", text)
    return Finding(
        WARN, "shared memory", text, f"docker run --shm-size={store / 2**30:.0f}g, or remount it larger"
    )
