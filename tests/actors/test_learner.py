"""Learner ranks against a plain PyTorch loop."""

import numpy as np
import pytest
import ray
import torch

from actors.learner_group import LearnerGroup
from rlhf.config import ArchitectureConfig, DeepSpeedConfig, RecoveryConfig, RoleConfig, TrainingConfig
from rlhf.learn.objectives import TokenPairs
from rlhf.learn.schedule import learning_rate
from rlhf.learn.tasks import SupervisedTask, batch_indices
from rlhf.models.load import load_policy
from rlhf.types import Ragged
from tests.tiny import save_policy

pytestmark = pytest.mark.actors
TRAINING = TrainingConfig(steps=4, batch_size=6, learning_rate=0.01, warmup_steps=1, weight_decay=0.1)
RECOVERY = RecoveryConfig(restarts=0, backoff=0.0, silence=60.0, startup=60.0, grace=0.0)
ARCHITECTURE = ArchitectureConfig(0, 0, 0, 0, 0, "", 0.0)  # not used: the task starts from a policy


def data() -> TokenPairs:
    rng = np.random.default_rng(0)
    rows = [[rng.integers(2, 20, size=rng.integers(1, 9)) for _ in range(10)] for _ in range(2)]
    return TokenPairs(Ragged.of(rows[0], np.int32), Ragged.of(rows[1], np.int32))


@pytest.fixture(scope="module")
def expected(policy_folder) -> dict[str, np.ndarray]:
    """The parameters after TRAINING, by torch.optim.AdamW and transformers' own loss on single sequences."""
    model, pairs = load_policy(str(policy_folder)), data()
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=TRAINING.weight_decay)
    for step in range(TRAINING.steps):
        chosen = batch_indices(len(pairs), TRAINING.batch_size, step, seed=3)
        optimizer.zero_grad()
        for i in chosen:
            ids = torch.as_tensor(np.concatenate([pairs.prompts[i], pairs.responses[i]]).astype(np.int64))[
                None
            ]
            labels = ids.clone()
            labels[:, : len(pairs.prompts[i])] = -100
            share = len(pairs.responses[i]) / pairs.responses.lengths[chosen].sum()
            (model(input_ids=ids, labels=labels).loss * share).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, TRAINING)
        optimizer.step()
    return {name: p.detach().numpy() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (0, 2), (1, 1), (2, 2), (3, 2)])
def test_training_equals_plain_pytorch(cluster, policy_folder, expected, tmp_path, stage, ranks):
    """Also with micro-batches of one tree, of which the ranks have different numbers, and without the dropout that the
    model asks for: the sampler has none."""
    config = DeepSpeedConfig(
        stage, "float32", micro_batch_tokens=16, offload_optimizer=False, activation_checkpointing=False
    )
    group = LearnerGroup(config, RoleConfig(ranks, 0.1, 0), None, RECOVERY)
    start = str(save_policy(tmp_path / "dropout", attention_dropout=0.5))
    assert load_policy(start).config.attention_dropout == 0.5
    group.load(SupervisedTask(start, ARCHITECTURE, start, 0), TRAINING.weight_decay)
    steps = group.fit(ray.put(data()), TRAINING, 3, 0, TRAINING.steps)
    weights = ray.get(group.weights()).tensors()
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(weights[name].numpy(), value.ravel(), atol=2e-4, err_msg=name)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(np.isfinite(step["grad_norm"]) for step in steps)
    group.save(tmp_path)
    for name, p in load_policy(str(tmp_path)).named_parameters():
        np.testing.assert_allclose(p.detach().numpy().ravel(), weights[name], atol=1e-6)
    group.stop()


@pytest.mark.parametrize(("stage", "ranks"), [(0, 1), (3, 2)])
def test_bfloat16_moves_the_parameters_as_float32_does(cluster, policy_folder, expected, stage, ranks):
    config = DeepSpeedConfig(
        stage, "bfloat16", micro_batch_tokens=64, offload_optimizer=False, activation_checkpointing=False
    )
    group = LearnerGroup(config, RoleConfig(ranks, 0.1, 0), None, RECOVERY)
    group.load(SupervisedTask(str(policy_folder), ARCHITECTURE, str(policy_folder), 0), TRAINING.weight_decay)
    group.fit(ray.put(data()), TRAINING, 3, 0, TRAINING.steps)
    weights = ray.get(group.weights()).tensors()
    start = dict(load_policy(str(policy_folder)).named_parameters())

    def moved(values) -> torch.Tensor:
        return torch.cat(
            [torch.as_tensor(values[n]).float().ravel() - start[n].detach().ravel() for n in start]
        )

    found, truth = moved(weights), moved(expected)
    assert torch.nn.functional.cosine_similarity(found, truth, dim=0) >= 0.95
    group.stop()
