"""The ledger's staleness bound, what the fleet guarantees of generators, and the queue's leases."""

import random

import pytest

from rlhf.flow.fleet import TRIES, Fleet
from rlhf.flow.leases import LeaseQueue
from rlhf.flow.ledger import Ledger, State


@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_random_schedules_train_each_item_once_within_the_bound(staleness, seed):
    """A simulated system where everything takes random time: generators end and load again, weights reach them late,
    work is lost wherever it is, and so are batches that the learner has already."""
    rng = random.Random(seed)
    ledger, fleet = Ledger(batches=12, size=3, staleness=staleness), Fleet(1e9)
    held = {}  # what a generator's process really has; without it, it has no policy
    pulls, asked, first, trained = {}, {}, {}, []
    most = oldest = 0
    while ledger.version < ledger.batches:
        fleet.tick()
        assert oldest <= fleet.version <= ledger.version
        oldest = fleet.version
        ledger.pulled(oldest)
        ledger.admit(ledger.batches)
        most = max(most, len(ledger._items))
        for item in ledger.waiting():
            worker = fleet.free(item, depth=2)
            if worker is not None and rng.random() < 0.5:
                fleet.start(item, worker)
                ledger.sampling(item)
                asked[item], first[item] = worker, held[worker]
        worker, event = rng.randrange(3), rng.random()
        mine = [i for i, w in asked.items() if w == worker]
        if not fleet.joined(worker):
            fleet.join(worker)
            held[worker] = 0
        elif event < 0.05 and all(fleet.deaths(i) < TRIES - 1 for i in mine):
            fleet.leave(worker, mine)
            held.pop(worker)
            pulls.pop(worker, None)
            for item in mine:
                del asked[item]
                ledger.again(item)
        elif event < 0.4 and worker in pulls:
            version = pulls.pop(worker)
            held[worker] = max(version or 0, held[worker])
            fleet.pull_ended(worker, version)
        elif event < 0.5 and worker not in pulls and fleet.behind(worker):
            fleet.pull(worker)
            pulls[worker] = fleet.published if rng.random() < 0.8 else None
        elif event < 0.8 and mine:
            item = rng.choice(mine)
            fleet.finish(item, asked.pop(item))
            ledger.scoring(item)
            if rng.random() < 0.1:
                ledger.again(item)
            else:
                ledger.ready(item)
        elif batch := ledger.next_batch():
            ledger.training(batch)
            if rng.random() < 0.2:
                ledger.untrained(batch)
                ledger.again(rng.choice(batch))
                continue
            assert all(0 <= ledger.version - first[i] <= staleness for i in batch)
            trained += batch
            ledger.trained(batch)
            fleet.publish(ledger.version)
    assert trained == list(range(36))
    assert most <= (staleness + 1) * 3


@pytest.mark.parametrize("state", list(State)[1:])
def test_an_item_is_sampled_again_wherever_it_was_lost(state):
    ledger = Ledger(batches=1, size=1, staleness=0)
    ledger.admit(ledger.batches)
    moves = [ledger.sampling, ledger.scoring, ledger.ready, lambda item: ledger.training([item])]
    for move in moves[: list(State).index(state)]:
        move(0)
    ledger.again(0)
    assert ledger.waiting() == [0]
    assert ledger.next_batch() is None


def fleet_of(workers: int, timeout: float = 10.0) -> tuple[Fleet, list[float]]:
    now = [0.0]
    fleet = Fleet(timeout, clock=lambda: now[0])
    for worker in range(workers):
        fleet.join(worker)
    return fleet, now


def wait(fleet: Fleet, now: list[float], seconds: int) -> None:
    for _ in range(seconds):
        now[0] += 1.0
        fleet.tick()


def test_items_may_queue_for_as_long_as_their_generator_gets_on():
    """Ten items of 6 s each at one generator: none is late, though the last ends 50 s after it may take 10 s."""
    fleet, now = fleet_of(1)
    for item in range(10):
        fleet.start(item, 0)
    for item in range(10):
        wait(fleet, now, 6)
        assert fleet.silent() == []
        fleet.finish(item, 0)
    assert not fleet.busy(0)
    wait(fleet, now, 100)
    assert fleet.silent() == []  # it has nothing to do


def test_only_progress_is_a_sign_of_life():
    fleet, now = fleet_of(2)
    fleet.start(0, 0)
    fleet.start(1, 1)
    for step in range(10):
        wait(fleet, now, 2)
        fleet.hear(0, step)
        fleet.hear(1, 7)  # it answers, and stands still
        if step == 2:
            fleet.start(2, 1)  # more to do is no sign either
    assert fleet.silent() == [1]
    fleet.leave(1, {1, 2})
    assert fleet.silent() == []


def test_a_generator_that_pulls_no_weights_is_silent():
    fleet, now = fleet_of(2)
    fleet.publish(1)
    fleet.pull(0)
    wait(fleet, now, 11)
    assert fleet.silent() == [0]
    fleet.pull_ended(0, 1)
    assert (fleet.silent(), fleet.version, fleet.settled) == ([], 0, False)


def test_what_the_driver_sleeps_through_is_no_silence():
    fleet, now = fleet_of(1)
    fleet.start(0, 0)
    now[0] += 3600.0
    fleet.tick()
    assert fleet.silent() == []
    wait(fleet, now, 11)
    assert fleet.silent() == [0]


def test_an_item_that_ends_its_generators_is_found_among_innocent_ones():
    """Four items at two generators; whichever has item 2 ends. The others are blamed once at most, and done."""
    fleet, _ = fleet_of(2)
    waiting, done, ends = [0, 1, 2, 3], [], 0
    at = {0: [], 1: []}
    while fleet.deaths(2) < TRIES:
        for item in list(waiting):
            worker = fleet.free(item, depth=4)
            if worker is not None:
                waiting.remove(item)
                fleet.start(item, worker)
                at[worker].append(item)
        for worker, items in at.items():
            if 2 in items:
                assert ends == 0 or items == [2]
                ends += 1
                fleet.leave(worker, items)
                fleet.join(worker)
                waiting += items
                at[worker] = []
            elif items:
                done.append(items.pop(0))
                fleet.finish(done[-1], worker)
    assert ends == TRIES
    assert sorted(done) == [0, 1, 3]
    assert max(fleet.deaths(i) for i in done) == 1


def test_a_generator_that_comes_back_gets_no_work_before_it_has_the_newest_weights():
    fleet, _ = fleet_of(2)
    fleet.leave(0, [])
    fleet.publish(1)
    fleet.pull(1)
    fleet.pull_ended(1, 1)
    fleet.join(0)  # it holds version 0, and counts with the one that it must have
    assert (fleet.version, fleet.ready(0), fleet.behind(0)) == (1, False, True)
    fleet.pull(0)
    fleet.publish(2)
    fleet.pull(1)
    fleet.pull_ended(1, 2)
    assert fleet.version == 1  # until it has followed
    fleet.pull_ended(0, 1)
    assert (fleet.ready(0), fleet.behind(0)) == (True, True)
    fleet.pull(0)
    fleet.pull_ended(0, 2)
    assert (fleet.version, fleet.settled) == (2, True)


def test_a_lease_holds_back_its_items_until_it_ends():
    queue = LeaseQueue()
    assert [queue.put(i, str(i)) for i in (2, 0, 1, 2)] == [True, True, True, False]
    assert queue.missing([0, 1, 3]) == [3]
    lease = queue.lease([0, 1])
    assert lease.payloads == ("0", "1")
    assert queue.missing([0, 1, 2]) == []
    queue.give_back(lease.id)
    again = queue.lease([1, 0])
    assert again.payloads == ("1", "0")
    queue.acknowledge(again.id)
    assert queue.missing([0, 1]) == [0, 1]
    assert not queue.put(0, "0")
    with pytest.raises(KeyError):
        queue.acknowledge(again.id)


def test_a_lost_item_may_come_again():
    queue = LeaseQueue()
    for item in range(3):
        queue.put(item, "first")
    lease = queue.lease([0, 1, 2])
    queue.give_back(lease.id, lost=[1])
    assert queue.missing([0, 1, 2]) == [1]
    assert [queue.put(i, "second") for i in range(3)] == [False, True, False]
    assert queue.lease([0, 1, 2]).payloads == ("first", "second", "first")


def test_a_lease_whose_answer_was_lost_is_taken_over():
    """As of a call that the queue's process answered when nobody waited for it any more."""
    queue = LeaseQueue()
    for item in range(3):
        queue.put(item, str(item))
    lost = queue.lease([0, 1])
    again = queue.lease([1, 2])
    assert again.payloads == ("1", "2")
    assert queue.lease([0]).payloads == ("0",)
    with pytest.raises(KeyError):
        queue.acknowledge(lost.id)
    queue.acknowledge(again.id)
    assert queue.missing([0, 1, 2]) == [1, 2]
