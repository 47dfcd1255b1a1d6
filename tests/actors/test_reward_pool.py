"""The reward pool: errors name the model, and a dead replica is replaced."""

import shutil
import time

import pytest
import ray

from actors.stages.sft import Sft
from actors.work import work_items
from tests.actors.conftest import run

pytestmark = pytest.mark.actors


def sampled(job):
    job.roles.generators.load(job.stages.of(Sft).policy_path)
    (one,) = job.roles.generators.sample(
        work_items(job.stages.data.prompts[:2], 2, 3, seed=1, purpose="test")
    )
    return one.rollouts


def test_nan_reward_is_an_error_with_model_and_sample(jobs, tmp_path, reward_folders):
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(reward_folders["helpful"])
    torch.nn.init.constant_(model.score.weight, float("inf"))
    model.save_pretrained(tmp_path / "nan")
    AutoTokenizer.from_pretrained(reward_folders["helpful"]).save_pretrained(tmp_path / "nan")
    job = jobs.make(f"reward_models.helpful.path={tmp_path / 'nan'}", bare=True, apart=True)
    with pytest.raises(
        ValueError, match=r"reward model 'helpful' returned nan for .* first for prompt 'what is"
    ):
        run(job, "baseline")


def test_a_model_that_cannot_be_loaded_is_one_line_and_leaves_nothing(jobs, tmp_path, reward_folders):
    """Also for its sibling, which could be loaded: its replicas are gone, and their CPUs are free."""
    from ray import serve
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(reward_folders["helpful"], tmp_path / "headless")
    weights = load_file(folder / "model.safetensors")
    weights["value_head.weight"] = weights.pop("score.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    job = jobs.make(f"reward_models.helpful.path={folder}", "resources.reward.count=2", bare=True, apart=True)
    _ = job.roles.baseline
    before, free = set(serve.status().applications), ray.available_resources()["CPU"]
    fault = "of the model's weights score.weight is not there; it has no place for value_head.weight"
    with pytest.raises(
        ValueError, match=rf"^reward model 'helpful': path={folder} cannot be loaded: {fault}$"
    ):
        _ = job.roles.rewards
    assert set(serve.status().applications) == before
    deadline = time.monotonic() + 60
    while ray.available_resources()["CPU"] < free - 1e-6:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_killed_replica_is_replaced_and_the_call_answered(jobs):
    job = jobs.make("resources.reward.count=2", apart=True)
    rollouts = sampled(job)
    before = ray.get(job.roles.rewards.raw(rollouts))
    prefix = f"SERVE_REPLICA::{job.roles.rewards.name}#reward-helpful"
    named = ray.util.list_named_actors(all_namespaces=True)
    actors = [actor for actor in named if actor["name"].startswith(prefix)]
    assert len(actors) == 2
    for actor in actors:  # all of them: only a restarted one can answer
        ray.kill(ray.get_actor(actor["name"], namespace=actor["namespace"]))
    deadline = time.monotonic() + 120
    while True:
        try:
            after = ray.get(job.roles.rewards.raw(rollouts))
            break
        except ray.exceptions.RayActorError:
            assert time.monotonic() < deadline
    assert (before == after).all()
