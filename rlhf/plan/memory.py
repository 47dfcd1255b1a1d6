"""The memory that each role's process needs, by what the code keeps and when.

Three kinds are told apart. A process's *own* memory; the *object store*, which the processes of a node share; and
*files* of weights that are computed with where they lie in the system's cache, which processes share, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from rlhf.config import DeepSpeedConfig
from rlhf.plan.models import Outline
from rlhf.plan.work import Work, largest

MIB = 2**20
LEARNER, GENERATOR, REWARD, INGRESS = 460 * MIB, 350 * MIB, 370 * MIB, 240 * MIB
DRIVER, SMALL, CONTROLLER = 470 * MIB, 60 * MIB, 115 * MIB
"""Of a process before it has a model, as measured on Linux with Ray 2.60 and torch 2.13: Python, Ray's worker and the
modules that it imports. `SMALL`: the baseline estimator and the queue; `CONTROLLER`: of Ray Serve."""
HEAP, ADAPTED, PASSES = 1.1, 1.4, 2.0
"""How much more than the tensors of training, of training adapters in float32, and of passes without gradient is taken
for them, as measured: pieces of many sizes leave gaps, and oneDNN has buffers of its own."""
TRIALS = 1000
"""Rows of logits, float32, that a model's trials take while it is loaded."""
VERSIONS = 2
"""Published weights in the object store: the newest, and those that generators still have."""


@dataclass(frozen=True)
class Need:
    """Bytes that a process of a role needs, at most at one time."""

    role: str
    count: int
    own: Mapping[str, int]  # by what for
    files: Mapping[str, int] = field(default_factory=dict)  # by path: weights that are read where they lie
    shape: str = ""  # of its work, in words

    @property
    def total(self) -> int:
        return sum(self.own.values())


def learner(
    policy: Outline,
    path: str,
    mapped: bool,
    work: Work,
    settings: DeepSpeedConfig,
    reference: bool,
    critic: Outline | None = None,
) -> Need:
    """A rank that aligns.

    Args:
        path: of the policy.
        mapped: whether its file holds float32, which is then not copied until it is changed.
        reference: whether the KL is measured.
        critic: trained after the policy in each step, so its passes take the place of the policy's.
    """
    sizes, trained, size = policy.sizes, policy.trained, policy.dtype.itemsize
    adapted = policy.model is not policy.plain
    float32 = policy.dtype == torch.float32
    stage = settings.zero_stage if float32 else max(settings.zero_stage, 1)
    ranks = work.ranks if stage else 1
    own = {"process": LEARNER}
    in_place = mapped and float32 and adapted  # frozen, so never copied
    weights = 4 * trained if in_place else size * (sizes.every + trained * adapted)
    own["weights"] = weights // (work.ranks if stage == 3 else 1)
    if stage:
        own["float32 weights"] = 4 * trained // ranks
    own["Adam's moments"] = 8 * trained // ranks
    batches = work.micro_batches()
    passes = policy.training_peak(batches[:2], settings.activation_checkpointing)
    own["activations and gradients"] = round((ADAPTED if adapted and float32 else HEAP) * passes)
    if not float32:
        own["sums of gradients"] = 4 * trained
    if reference and not adapted:
        frozen = size * (sizes.linear if mapped and float32 else sizes.every)
        own["reference policy"] = frozen
    own["published weights"] = size * sizes.every
    if adapted:
        own["merged weights"] = 4 * sizes.linear
    own["checkpoint's copy"] = 12 * trained // work.ranks
    if critic is not None:
        state = (4 * bool(stage) + 8) * critic.trained // ranks + 12 * critic.trained // work.ranks
        weights = critic.dtype.itemsize * critic.sizes.every // (work.ranks if stage == 3 else 1)
        own["critic"] = weights + state + (0 if float32 else 4 * critic.trained)
    files = {path: 4 * sizes.every} if mapped and float32 and (adapted or reference) else {}
    tokens = max(batch.input_ids.numel() for batch in batches)
    shape = f"{len(batches)} micro-batch{'es' * (len(batches) > 1)} of {tokens} tokens at most"
    return Need("learner rank", work.ranks, own, files, shape)


def generator(policy: Outline, path: str, mapped: bool, work: Work, count: int) -> Need:
    sizes, size = policy.sizes, policy.dtype.itemsize
    own = {"process": GENERATOR}
    own["packed weights"] = size * (sizes.linear + sizes.tied)
    in_place = mapped and policy.dtype == torch.float32
    own["other weights"] = size * (sizes.rest if in_place else sizes.every)  # all, until they are packed
    rows, prompt = work.rows, max(work.longest)
    own["keys and values"] = policy.kept_per_token * size * (work.item * prompt + rows * work.response_tokens)
    logits = rows * policy.vocabulary * (4 + 4 + 4 + 8 + 8)  # scores, by temperature, log-probabilities, sums
    prefill = policy.inference_peak(largest(work.prefill()), "predict")
    trials = 4 * TRIALS * policy.vocabulary - own["keys and values"]
    own["logits and passes"] = max(logits + round(PASSES * prefill), trials)
    own["new weights being packed"] = size * max(sizes.widest, sizes.tied)
    files = {path: 4 * sizes.every} if mapped and policy.dtype == torch.float32 else {}
    return Need("generator", count, own, files, f"{rows} responses at a time")


def reward_model(
    name: str, model: Outline, path: str, mapped: bool, work: Work, budget: int, count: int
) -> Need:
    """A replica of a classifier.

    Args:
        budget: tokens of a pass.
    """
    sizes, size = model.sizes, model.dtype.itemsize
    in_place = mapped and model.dtype == torch.float32
    own = {"process": REWARD, "packed weights": size * (sizes.linear if in_place else sizes.every)}
    batch = largest(work.scored(budget))
    passes = model.inference_peak(batch, "predict")
    loading = 0 if in_place else size * sizes.linear
    own["passes"] = max(round(PASSES * passes), loading)
    files = {path: 4 * sizes.every} if in_place else {}
    return Need(name, count, own, files, f"{batch.input_ids.numel()} tokens at a time")


def services() -> list[Need]:
    """Processes without a model."""
    return [
        Need("driver", 1, {"process": DRIVER}),
        Need("baseline", 1, {"process": SMALL}),
        Need("queue", 1, {"process": SMALL}),
        Need("reward ingress", 1, {"process": INGRESS}),
        Need("serve controller", 1, {"process": CONTROLLER}),
    ]


def object_store(policy: Outline) -> int:
    """Bytes of published weights, of the versions that are there at once; rollouts are small beside them."""
    return VERSIONS * policy.dtype.itemsize * policy.sizes.every
