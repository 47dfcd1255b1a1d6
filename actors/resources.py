"""How roles are placed: what each process asks Ray for, and whether a cluster can give it."""

from __future__ import annotations

import ctypes
import os
import socket
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from actors.address import check_form, given_address
from rlhf.config import Config, RoleConfig


def actor_options(role: RoleConfig) -> dict[str, Any]:
    return {"num_cpus": role.cpus, "num_gpus": role.gpus}


def beside_driver() -> dict[str, Any]:
    """For small processes that all others need: they end with no other node than the driver's."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def threads(cpus: float) -> int:
    return max(1, int(cpus))


def set_threads(cpus: float) -> None:
    """An actor computes with as many threads as it was given CPUs, one at least."""
    os.environ["OMP_NUM_THREADS"] = str(threads(cpus))
    import torch

    torch.set_num_threads(threads(cpus))


def keep_memory() -> None:
    """Lets this process keep the memory it frees: the system clears each page that it gives again, which costs a
    forward pass on the CPU a sixth of its time. For glibc; other allocators are left alone."""
    if sys.platform != "linux" or not hasattr(libc := ctypes.CDLL(None), "mallopt"):
        return
    trim_threshold, mmap_threshold = -1, -3  # as malloc.h has them
    libc.mallopt(mmap_threshold, 32 * 2**20)  # the most it takes
    libc.mallopt(trim_threshold, 2**31 - 1)


def yield_to_learners() -> None:
    """Lowers this process's priority: where roles share CPUs, learner ranks go first. They wait for each other, and all
    wait for them."""
    os.nice(10)


def free_memory() -> int:
    """Bytes that processes may still take: of the machine, or what the limit of a control group (a container's)
    leaves. What the system keeps of files counts as free."""
    import psutil

    free, group = psutil.virtual_memory().available, Path("/sys/fs/cgroup")
    with suppress(OSError, ValueError):  # no such group, or "max": no limit
        limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat["inactive_file"]))
    return max(0, free)


def room() -> str:
    """What a cluster has, and what of it is free: for lines about what is waited for."""
    import ray

    every, free = ray.cluster_resources(), ray.available_resources()
    kinds = [kind for kind in ("CPU", "GPU") if kind in every]
    return "free are " + ", ".join(f"{free.get(k, 0):g} of {every[k]:g} {k}s" for k in kinds)


def asked(config: Config) -> dict[str, float]:
    """CPUs and GPUs that all roles ask for together."""
    r, sources = config.resources, [*config.reward_models.values(), *config.evaluators.values()]
    models = sum(source.uses_device for source in sources)
    roles = (r.generators, r.learner)
    return {
        "CPU": sum(role.cpus * role.count for role in roles) + r.reward.cpus * r.reward.count * len(sources),
        "GPU": sum(role.gpus * role.count for role in roles) + r.reward.gpus * r.reward.count * models,
    }


def check_machine(config: Config) -> None:
    """What can be known before Ray starts.

    Raises:
        ValueError: more learner ranks or CPUs than there are here, a port in use, or an address that is none; it names
            the key and the number.
    """
    resources = config.resources
    given = given_address(resources)
    if given is not None:
        check_form(*given)
    else:
        here = len(os.sched_getaffinity(0))
        ranks = resources.learner.count
        if ranks > here:
            raise ValueError(
                f"resources.learner.count={ranks} asks for {ranks} learner ranks, but this machine has {here} CPUs; "
                "lower it, or give a cluster by resources.address"
            )
        check_offer(config, {"CPU": here})
    for key in ("master_port", "dashboard_port"):
        port = getattr(resources, key)
        if port is not None:
            check_port(f"resources.{key}", port)


def check_offer(config: Config, offered: dict[str, float]) -> None:
    """Refuses what can never be placed; `offered` has what is known, by "CPU" and "GPU".

    An autoscaling cluster may yet grow: there nothing is refused.
    """
    if config.resources.autoscaling:
        return
    roles = asked(config)
    for kind, have in offered.items():
        if roles[kind] > have + 1e-6:
            raise ValueError(
                f"resources: the roles ask for {roles[kind]:g} {kind}s together, there are {have:g}; lower "
                f"the counts or {kind.lower()}s of resources.{{generators,learner,reward}}, "
                "or set resources.autoscaling=true"
            )


def check_port(key: str, port: int, host: str = "127.0.0.1") -> None:
    try:
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise ValueError(f"{key}={port}: {host} is no address of this machine ({error.strerror})") from None
    with socket.socket(family, kind) as s:
        s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            s.bind(place)
        except OSError as error:
            raise ValueError(f"{key}={port}: the port is in use ({error.strerror}); choose another") from None
