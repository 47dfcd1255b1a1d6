"""How roles are placed: what each process asks Ray for, and whether a cluster can give it."""

from __future__ import annotations

import ctypes
import math
import os
import socket
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors.address import check_form, given_address
from rlhf.config import Config, RoleConfig
from rlhf.models.device import Compute, gpu_count


def actor_options(role: RoleConfig) -> dict[str, Any]:
    return {"num_cpus": role.cpus, "num_gpus": role.gpus}


def beside_driver() -> dict[str, Any]:
    """For small processes that all others need: they end with no other node than the driver's."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    node = ray.get_runtime_context().get_node_id()
    return {"num_cpus": 0, "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False)}


def set_threads(count: int) -> None:
    """An actor computes with as many threads as `Compute` says."""
    os.environ["OMP_NUM_THREADS"] = str(count)
    import torch

    torch.set_num_threads(count)


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


def asked(config: Config) -> dict[str, RoleConfig]:
    """What all processes of each role ask for, by the role's key. Rewards that are models, on a GPU, and others, which
    need none, are two."""
    r, sources = config.resources, [*config.reward_models.values(), *config.evaluators.values()]
    models = sum(source.uses_device for source in sources)
    others = len(sources) - models
    return {
        "resources.generators": r.generators,
        "resources.learner": r.learner,
        "resources.reward": replace(r.reward, count=r.reward.count * models),
        "resources.reward, of sources without a model": replace(
            r.reward, count=r.reward.count * others, gpus=0.0
        ),
    }


def check_machine(config: Config) -> None:
    """What can be known before Ray starts.

    Raises:
        ValueError: more learner ranks, CPUs or GPUs than there are here, GPUs that PyTorch cannot use, a port in use,
            or an address that is none; it names the key and the number.
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
        check_gpus(config)
        wanted = any(role.gpus for role in asked(config).values())
        check_offer(config, [{"CPU": here, "GPU": gpu_count()} if wanted else {"CPU": here}])
    for key in ("master_port", "dashboard_port"):
        port = getattr(resources, key)
        if port is not None:
            check_port(f"resources.{key}", port)


def check_gpus(config: Config) -> None:
    """For roles that run on this machine.

    Raises:
        ValueError: a role asks for GPUs, and this PyTorch can use none; it names the role.
    """
    for key, role in asked(config).items():
        if role.count:
            Compute.of(role).check(key)


def check_offer(config: Config, nodes: Sequence[Mapping[str, float]]) -> None:
    """Refuses what can never be placed. `nodes`: what is known of each, by "CPU" and "GPU".

    An autoscaling cluster may yet grow: there nothing is refused. What is accepted may still not fit, where roles of
    several sizes share nodes: the log then says who waits.

    Raises:
        ValueError: it names the role, what it asks for and what there is.
    """
    if config.resources.autoscaling:
        return
    roles = {key: role for key, role in asked(config).items() if role.count}
    for kind in ("CPU", "GPU"):
        if not all(kind in node for node in nodes):
            continue
        have = sum(node[kind] for node in nodes)
        every = {key: role.count * _share(role, kind) for key, role in roles.items()}
        total = sum(every.values())
        if total > have + 1e-6:
            listed = ", ".join(f"{key} for {n:g}" for key, n in every.items() if n)
            raise ValueError(
                f"resources: the roles ask for {total:g} {kind}s together, there are {have:g} ({listed}); lower "
                f"the counts or {kind.lower()}s of resources.{{generators,learner,reward}}, "
                "or set resources.autoscaling=true"
            )
    for key, role in roles.items():
        places = sum(_places(role, node) for node in nodes)
        if places < role.count:
            raise ValueError(
                f"{key} asks for {role.count} processes of {role.cpus:g} CPUs and {role.gpus:g} GPUs each, and there "
                f"is room for {places:g} ({_listed(nodes)}): a process is on one node, and a part of a GPU on one GPU; "
                "lower its count, cpus or gpus, or set resources.autoscaling=true"
            )


def _share(role: RoleConfig, kind: str) -> float:
    return role.cpus if kind == "CPU" else role.gpus


def _places(role: RoleConfig, node: Mapping[str, float]) -> float:
    """Processes of a role that have room on a node, if it is alone there.

    >>> _places(RoleConfig(count=1, cpus=2, gpus=0.4), {"CPU": 64, "GPU": 3})
    6
    """
    small = 1e-6  # of sums of fractions
    found = math.inf
    if role.cpus > 0 and "CPU" in node:
        found = math.floor(node["CPU"] / role.cpus + small)
    if role.gpus > 0 and "GPU" in node:
        gpus = math.floor(node["GPU"] + small)
        fit = gpus * math.floor(1 / role.gpus + small) if role.gpus < 1 else math.floor(gpus / role.gpus)
        found = min(found, fit)
    return found


def _listed(nodes: Sequence[Mapping[str, float]]) -> str:
    """
    >>> _listed([{"CPU": 8.0}, {"CPU": 96.0, "GPU": 8.0}, {"CPU": 96.0, "GPU": 8.0}])
    '1 node of 8 CPUs, 2 nodes of 96 CPUs and 8 GPUs'
    """
    alike = Counter(" and ".join(f"{node[k]:g} {k}s" for k in ("CPU", "GPU") if k in node) for node in nodes)
    return ", ".join(f"{n} node{'s' if n > 1 else ''} of {kind}" for kind, n in alike.items())


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
