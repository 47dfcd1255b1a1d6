"""A learner rank on a Ray of this machine, on a GPU if there is one: the very process of a run, at two steps."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import ray

from actors.cluster import Cluster
from actors.doctor.finding import FAIL, OK, Finding
from actors.doctor.machine import shared_memory
from actors.learner_group import LearnerGroup
from rlhf.config import Config, RoleConfig, TrainingConfig
from rlhf.models.device import Compute
from rlhf.selftest.learning import LIMIT, STEPS, examples, plain_loss, task

RATE = 1e-3


def on_ray(config: Config, policy: str) -> Iterator[Finding]:
    """Ray's own start, its memory, and what a rank learns of a policy that is small."""
    alone = replace(
        config.resources, address="local", autoscaling=True
    )  # what the roles ask for is not asked for here
    cluster = Cluster(replace(config, resources=alone))
    try:
        offer = ray.cluster_resources()
        yield Finding(OK, "ray", f"{cluster.describe()}, started in {cluster.seconds:.1f} s")
        yield shared_memory(offer.get("object_store_memory", 0.0))
        cpus = min(1.0, config.resources.learner.cpus)
        role = RoleConfig(count=1, cpus=cpus, gpus=min(1.0, offer.get("GPU", 0.0)))
        yield _learns(config, role, policy)
    finally:
        cluster.stop()


def _learns(config: Config, role: RoleConfig, policy: str) -> Finding:
    compute, data = Compute.of(role), examples(policy)
    learner = LearnerGroup(replace(config.deepspeed, dtype="float32"), role, None, config.recovery)
    try:
        learner.load(task(policy, config.policy.architecture), 0.0)
        training = TrainingConfig(STEPS, len(data), RATE, 0, 0.0)
        first, *_, last = (step["loss"] for step in learner.fit(ray.put(data), training, 0, 0, STEPS))
    finally:
        learner.stop()
    gap = abs(first - plain_loss(policy, data))
    text = f"a rank on {compute.device} by {compute.backend}, ZeRO {config.deepspeed.zero_stage}: loss {first:.6f} is "
    text += f"{gap:.2g} from the plain one (limit {LIMIT:g}), and {last:.4f} after {STEPS - 1} steps"
    return Finding(OK if gap <= LIMIT and last < first else FAIL, "learner on ray", text)
