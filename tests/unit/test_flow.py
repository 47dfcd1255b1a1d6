"""The ledger's staleness bound and the queue's leases."""

import random

import pytest

from rlhf.flow.leases import LeaseQueue
from rlhf.flow.ledger import Ledger


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", range(5))
def test_random_schedules_train_each_item_once_within_the_bound(staleness, seed):
    """A simulated system where everything takes random time, workers fail, and pulls lag."""
    rng = random.Random(seed)
    ledger = Ledger(batches=12, size=3, staleness=staleness)
    version_at, trained, held_by = {}, [], {}
    generator_version, pending_pull, most = 0, None, 0
    while not ledger.done:
        ledger.admit()
        most = max(most, len(ledger._items))
        action = rng.random()
        waiting, sampling = ledger.waiting(), sorted(held_by)
        if action < 0.35 and waiting:
            held_by[waiting[0]] = rng.randrange(2)
            version_at[waiting[0]] = generator_version
            ledger.sampling(waiting[0], held_by[waiting[0]])
        elif action < 0.75 and sampling:
            item = rng.choice(sampling)
            assert ledger.is_sampling(item, held_by[item])
            assert not ledger.is_sampling(item, 9)
            del held_by[item]
            if rng.random() < 0.2:
                ledger.again(item)
            else:
                ledger.scoring(item)
                ledger.ready(item)
        elif action < 0.9 and (batch := ledger.next_batch()):
            ledger.training(batch)
            assert all(0 <= ledger.version - version_at[i] <= staleness for i in batch)
            trained += batch
            ledger.trained(batch)
            pending_pull = ledger.version
        elif pending_pull is not None:
            generator_version = pending_pull
            ledger.pulled(pending_pull)
            pending_pull = None
    assert trained == list(range(36))
    assert most <= (staleness + 1) * 3


def test_silent_items_are_overdue():
    now = [0.0]
    ledger = Ledger(batches=1, size=2, staleness=0, clock=lambda: now[0])
    ledger.admit()
    ledger.sampling(0, worker=5)
    now[0] = 11.0
    ledger.sampling(1, worker=6)
    assert ledger.overdue(10.0) == [0]
    assert ledger.worker(0) == 5
    ledger.again(0)
    assert ledger.waiting() == [0]
    assert not ledger.is_sampling(0, 5)


def test_a_lease_holds_back_its_items_until_it_ends():
    queue = LeaseQueue()
    assert [queue.put(i, str(i)) for i in (2, 0, 1, 2)] == [True, True, True, False]
    assert queue.missing([0, 1, 3]) == [3]
    lease = queue.lease([0, 1])
    assert lease.payloads == ("0", "1")
    assert queue.missing([0, 1, 2]) == [0, 1]
    queue.give_back(lease.id)
    again = queue.lease([1, 0])
    assert again.payloads == ("1", "0")
    queue.acknowledge(again.id)
    assert queue.missing([0, 1]) == [0, 1]
    assert not queue.put(0, "0")
    with pytest.raises(KeyError):
        queue.acknowledge(again.id)
