"""What ends with a process or a node is done again, and neither waited for nor tried for ever."""

import os
import signal
import time

import numpy as np
import pytest
import ray
import torch

from actors.fault import Fault
from actors.generator_pool import GeneratorPool, ready
from actors.stages.sft import Sft
from actors.work import work_items
from rlhf.config import RecoveryConfig, RoleConfig
from rlhf.types import Prompt
from tests.actors.conftest import composed
from tests.actors.frail import Brittle, Frail, Stillborn
from tests.actors.test_align import align, expected, without_times  # noqa: F401

pytestmark = pytest.mark.actors


@ray.remote(num_cpus=0)
class Owner:
    def put(self):
        return [ray.put(None)]


def lost_object():
    """The reference of an object that was lost, as with a node that ends."""
    owner = Owner.remote()
    (reference,) = ray.get(owner.put.remote())
    ray.kill(owner)
    for _ in range(300):
        try:
            ray.get(reference)
        except ray.exceptions.OwnerDiedError:
            return reference
        time.sleep(0.1)
    raise AssertionError("it is still there")


def recovery(silence):
    return RecoveryConfig(restarts=0, backoff=0.0, silence=silence, startup=60.0, grace=0.0)


def pids(pool):
    return ray.get([actor.__ray_call__.remote(lambda _: os.getpid()) for actor in pool._actors])


@pytest.fixture(scope="module")
def frail(cluster, policy_folder, tmp_path_factory):
    """Two generators that fail as they are asked, and the folder of their flags."""
    flags = tmp_path_factory.mktemp("flags")
    rollout = composed("rollout.max_new_tokens=4", "rollout.slots=2").rollout
    pool = GeneratorPool(rollout, str(flags), RoleConfig(2, 0.1, 0), recovery(5.0), Frail)
    yield pool, flags
    pool.stop()


def work(*texts):
    return work_items([Prompt(text) for text in texts], 1, 2, seed=1, purpose="test")


def tokens(sampled):
    rollouts = ray.get([s.rollouts for s in sorted(sampled, key=lambda s: s.item.id)])
    return [r.tokens.values.tolist() for r in rollouts]


def until(pool, condition):
    while not condition():
        assert pool.tend() == []
        for ref in ready(pool.pending):
            assert pool.take(ref) == []


def test_work_of_a_generator_that_hangs_is_sampled_elsewhere(frail, policy_folder):
    pool, flags = frail
    pool.load(str(policy_folder))
    items = work("tea", "bread", "lock", "yes")
    (flags / "hang").touch()
    found = tokens(pool.sample(items))
    assert not (flags / "hang").exists()
    assert found == tokens(pool.sample(items))  # undisturbed


def test_a_generator_that_loads_slowly_is_told_once_and_comes_back_with_the_newest_weights(
    frail, policy_folder
):
    from rlhf.learn.trainer import Weights
    from rlhf.models.load import load_policy

    pool, flags = frail
    pool.load(str(policy_folder))
    (flags / "loads").write_text("")
    (flags / "slow load").touch()
    os.kill(pids(pool)[0], signal.SIGKILL)
    items = work(*["tea", "bread", "lock", "yes", "no", "good"] * 2)
    assert len(list(pool.sample(items))) == 12  # by the other
    until(pool, lambda: (flags / "loads").read_text())
    named = dict(load_policy(str(policy_folder)).named_parameters())
    weights = [Weights.of({n: p * k for n, p in named.items()}, torch.float32) for k in (2, 3)]
    pool.set_weights(ray.put(weights[0]), 1)
    until(pool, lambda: pool.settled)
    assert pool.version == 1
    pool.set_weights(lost_object(), 2)
    until(pool, lambda: pool.wants_weights)
    assert pool.version == 1
    pool.set_weights(ray.put(weights[1]), 2)
    until(pool, lambda: pool.settled)
    assert (pool.version, pool._fleet.ready(0)) == (2, False)
    (flags / "slow load").unlink()
    until(pool, lambda: pool._fleet.ready(0))
    assert (flags / "loads").read_text() == "0\n"
    engines = [actor.__ray_call__.remote(lambda actor: actor._engine.version) for actor in pool._actors]
    assert ray.get(engines) == [2, 2]


def test_items_within_the_limit_may_queue(frail, policy_folder):
    """Six items given to one generator at once, which takes 1.6 s for each, 9.6 s together, and may be silent for 5."""
    pool, flags = frail
    pool.load(str(policy_folder))
    before, left = pids(pool), set(range(6))
    (flags / "slow").touch()
    for item in work(*["tea"] * 6):
        pool.submit(item, 0)
    while left:
        assert pool.tend() == []  # nothing is given up
        for ref in ready(pool.pending):
            for item, sampled in pool.take(ref):
                assert sampled is not None
                left.remove(item.id)
    (flags / "slow").unlink()
    assert pids(pool) == before


@pytest.fixture
def brittle(cluster):
    pool = GeneratorPool(composed().rollout, None, RoleConfig(2, 0.1, 0), recovery(60.0), Brittle)
    yield pool
    pool.stop()


def test_an_item_that_ends_its_generators_is_named(brittle):
    """SIGKILL each time it is sampled. Those beside it are done."""
    brittle.load("a policy")
    found = []
    with pytest.raises(ValueError, match=r"work item 1 \(prompts 'kill'\): .* died, .* 3 times") as error:
        found.extend(brittle.sample(work("tea", "kill", "bread", "lock")))
    assert "\n" not in str(error.value)
    assert {s.item.id for s in found} <= {0, 2, 3}
    assert [s.item.id for s in brittle.sample(work("tea"))] == [0]  # it goes on


def test_a_generator_that_never_comes_up_is_an_error(cluster, brittle):
    error = r"generator \d ended 3 times while it took the policy, the last time by Actor\w+Error"
    with pytest.raises(Fault, match=error):
        brittle.load("kill")
    pool = GeneratorPool(composed().rollout, None, RoleConfig(1, 0.1, 0), recovery(5.0), Stillborn)
    with pytest.raises(ValueError, match=r"generator 0 cannot start: .*no such device"):
        pool.load("a policy")
    pool.stop()


def test_same_metrics_when_rollouts_or_rewards_are_lost(jobs, expected, monkeypatch):  # noqa: F811
    """Rollouts before they are rewarded, rewards on their way to the controller, and both at the learner."""
    job = jobs.make()
    pool, learner = job.roles.rewards, job.roles.learner
    rewards, train, calls, batches = pool.rewards, learner.align, [], []

    def reward(rollouts, *how):
        calls.append(rollouts)
        if len(calls) == 1:
            return rewards(lost_object(), *how)
        if len(calls) == 4:
            return lost_object()
        return rewards(rollouts, *how)

    def learn(batch, coefficients):
        batches.append(batch)
        if len(batches) == 2:
            batch = [(lost_object(), batch[0][1]), (batch[1][0], lost_object())]
        return train(batch, coefficients)

    monkeypatch.setattr(pool, "rewards", reward)
    monkeypatch.setattr(learner, "align", learn)
    assert without_times(align(job)) == expected
    assert (len(calls), len(batches)) == (10, 4)


def test_what_is_always_lost_is_an_error(jobs, monkeypatch):
    job = jobs.make()
    job.roles.generators.load(job.stages.of(Sft).policy_path)
    item = work("tea")
    with pytest.raises(
        Fault, match=r"work item 0 \(prompts 'tea'\): .* lost 3 times, the last time by OwnerDiedError"
    ):
        list(job.roles.generators.sample(item, lambda _: lost_object()))


def test_no_rank_trains_when_one_misses_an_item(jobs, expected, monkeypatch):  # noqa: F811
    """The collectives of the others would never end."""
    job = jobs.make("resources.learner.count=2")
    learner, batches = job.roles.learner, []

    def learn(batch, coefficients):
        batches.append(batch)
        missing = [batch[0], (lost_object(), batch[1][1])] if len(batches) == 2 else batch
        theirs = zip(learner.ranks, (batch, missing), strict=True)
        return [rank.align.remote(own, coefficients) for rank, own in theirs]

    monkeypatch.setattr(learner, "align", learn)
    metrics = without_times(align(job))
    assert len(batches) == 4
    for found, known in zip(metrics, expected, strict=True):
        assert found.keys() == known.keys()
        np.testing.assert_allclose(list(found.values()), list(known.values()), rtol=1e-3, atol=1e-4)
