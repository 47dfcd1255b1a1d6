"""Shards, earlier runs, columns of the data set, compact rewards, and adaptive sampling."""

from pathlib import Path

import numpy as np
import pytest

from rlhf.utility.adaptive import AdaptiveSampling
from rlhf.utility.columns import WAITING, Column
from rlhf.utility.statistics import BaselineStatistics, Item, ReferenceRule
from rlhf.utility.tables import RewardTable

QUANTILE = ReferenceRule("quantile", 0.85, "empirical", 0.0)
GAUSSIAN = ReferenceRule("quantile", 0.85, "gaussian", 0.0)
COLUMN = ReferenceRule("column", 0.5, "empirical", 0.0)
CONSTANT = ReferenceRule("constant", 0.5, "empirical", 0.5)


def ids(*prompts: int) -> np.ndarray:
    return np.array(prompts, np.uint64)


def part(
    items: list[Item], keys: dict[str, str] | None = None, model: str = "m", canned: bool = True
) -> BaselineStatistics:
    """Each item has 30 rewards of ten prompts, its own, and canned ones if there are any."""
    statistics = BaselineStatistics(keys=keys)
    for item in items:
        number = item if isinstance(item, int) else 1000 * len(item[0]) + item[1]
        rng = np.random.default_rng(number)
        statistics.add_samples(model, rng.integers(0, 10, 30).astype(np.uint64), rng.normal(size=30), item)
        if canned:
            statistics.add_canned(model, np.arange(10, dtype=np.uint64), rng.normal(size=10), item)
    return statistics


def test_merged_shards_equal_one() -> None:
    items: list[Item] = [("a", 0), ("a", 1), ("bb", 0), ("bb", 1), 7]
    merged = part(items[3:])
    merged.merge(part(items[:2]))
    merged.merge(part(items[2:3]))
    assert merged.digest() == part(items).digest()
    assert not merged.add_samples("m", ids(1), np.ones(1), ("a", 1))
    assert merged.add_samples("m", ids(1), np.ones(1), ("a", 7))


def test_merging_counts_no_item_twice() -> None:
    statistics = part([1, 2, 3])
    digest = statistics.digest()
    statistics.merge(part([2, 3]))
    statistics.merge(statistics)
    assert statistics.digest() == digest, "all there already"
    statistics.merge(part([1, 2, 3, 4]))
    assert statistics.digest() == part([1, 2, 3, 4]).digest(), "a later state of the same"
    with pytest.raises(ValueError, match="'m': item 4 is in both"):
        statistics.merge(part([4, 5]))
    assert statistics.digest() == part([1, 2, 3, 4]).digest()


def test_another_run_adopts_by_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "earlier.npz"
    earlier = part([0, 1], {"m": "base+a", "n": "base+b"})
    earlier.merge(part([5], model="n"))
    earlier.add_column("m", ids(1), np.ones(1))
    earlier.save(path)
    later = BaselineStatistics()
    assert later.adopt(path, {"helpful": "base+b", "new": "base+c"}) == ["helpful"]
    assert later.keys == {"helpful": "base+b", "new": "base+c"}
    assert later.digest() == part([5], model="helpful", canned=False).digest(), "samples, and nothing else"
    assert not later.add_samples("helpful", ids(1), np.ones(1), 5)
    with pytest.raises(ValueError, match=r"earlier.npz: .*'base\+a', 'base\+b'.*'helpful': 'other'"):
        BaselineStatistics().adopt(path, {"helpful": "other"})


def test_a_compact_column_can_be_adopted_whole(tmp_path: Path) -> None:
    path, earlier = tmp_path / "earlier.npz", part([0, 1], {"m": "f"})
    earlier.freeze()
    earlier.compact()
    earlier.save(path)
    later = BaselineStatistics()
    later.adopt(path, {"m": "f"})
    assert later.digest() == part([0, 1], canned=False).digest()
    with pytest.raises(RuntimeError, match="'m' are compact: item 9"):
        later.add_samples("m", ids(1), np.ones(1), 9)
    with pytest.raises(ValueError, match="compact rewards cannot be merged"):
        later.merge(part([9]))


def test_a_column_of_the_data_set() -> None:
    statistics = BaselineStatistics()
    statistics.add_column("m", ids(5, 1, 5), np.array([2.0, -1.0, 2.0]))
    digest = statistics.digest()
    statistics.add_column("m", ids(1, 5), np.array([-1.0, 2.0]))
    assert statistics.digest() == digest
    for prompts, values in ((ids(1), [0.5]), (ids(8, 8), [1.0, 2.0])):
        with pytest.raises(ValueError, match=rf"'m' has two reference values of prompt {prompts[0]} "):
            statistics.add_column("m", prompts, np.array(values))
    with pytest.raises(ValueError, match="'m' gave nan to prompt 2"):
        statistics.add_column("m", ids(2), np.array([np.nan]))
    assert statistics.digest() == digest
    other = BaselineStatistics()
    other.add_column("m", ids(9, 1), np.array([4.0, -1.0]))
    statistics.merge(other)
    found = statistics.reference("m", ids(9, 5, 1), COLUMN)
    assert (found.r_ref.tolist(), found.standard_error.tolist()) == ([4.0, 2.0, -1.0], [0.0] * 3)


@pytest.mark.parametrize("pinned", [False, True])
def test_compact_rewards_are_within_their_bound(tmp_path: Path, pinned: bool) -> None:
    rng, prompts = np.random.default_rng(0), np.arange(500, dtype=np.uint64)
    counts = rng.integers(1, 70, 500)
    held = np.repeat(prompts, counts)
    rewards = rng.gumbel(held.astype(np.float64), 1 + held % 3).astype(np.float32)
    exact, compact = BaselineStatistics(), BaselineStatistics()
    for statistics in (exact, compact):
        for model in ("m", "n"):
            statistics.add_samples(model, held, rewards, 0)
    compact.freeze()
    with pytest.raises(RuntimeError, match="frozen before"):
        exact.compact()
    compact.compact({"m": QUANTILE} if pinned else None)
    assert compact.digest() == exact.digest()
    compact.save(tmp_path / "compact.npz")
    for found in (compact, BaselineStatistics.load(tmp_path / "compact.npz")):
        assert found.digest() == exact.digest()
        assert found.counts("m", prompts).tolist() == counts.tolist()
        for level in (0.5, 0.85):
            rule = ReferenceRule("quantile", level, "empirical", 0.0)
            one, other = (s.reference("m", prompts, rule, points=8) for s in (exact, found))
            bound = (one.high - one.low) / 510 + 1e-6 * np.abs(one.high) + 1e-6
            assert (np.abs(one.r_ref - other.r_ref) <= bound).all()
            assert (np.abs(one.samples - other.samples) <= bound[:, None])[~np.isnan(one.samples)].all()
            for name in ("mean", "std", "low", "high"):
                np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            several = counts > 2  # of two, the error is a multiple of their exact distance
            ratio = other.standard_error[several] / one.standard_error[several]
            assert np.sqrt(((ratio - 1) ** 2).mean()) < 0.03
            if pinned and level == 0.85:
                np.testing.assert_array_equal(one.r_ref, other.r_ref)
            else:
                assert (one.r_ref != other.r_ref).any()
        several = prompts[counts > 1]
        one, other = (s.reference("n", several, GAUSSIAN) for s in (exact, found))
        np.testing.assert_allclose(one.r_ref, other.r_ref, rtol=1e-6, atol=1e-6)
    columns = compact._columns["sampled"]
    assert columns["m"].compact is not None
    assert columns["n"].compact is not None
    assert columns["m"].compact.ids is columns["n"].compact.ids, "ids are there once"


@pytest.mark.parametrize("points", [1, 4, 20])
def test_samples_of_a_reference(points: int) -> None:
    rng, statistics = np.random.default_rng(0), BaselineStatistics()
    own = {1: rng.normal(size=3).astype(np.float32), 2: rng.normal(size=11).astype(np.float32)}
    for prompt, values in own.items():
        statistics.add_samples("m", np.full(len(values), prompt, np.uint64), values, prompt)
    found = statistics.reference("m", ids(2, 1), CONSTANT, points).samples
    assert found.shape == (2, points)
    for row, prompt in zip(found, (2, 1), strict=True):
        values = np.sort(own[prompt])
        if len(values) > points:
            values = np.quantile(values.astype(np.float64), [(i + 0.5) / points for i in range(points)])
        np.testing.assert_allclose(row[: len(values)], values, rtol=1e-6)
        assert np.isnan(row[len(values) :]).all()


def test_tables_stay_few_however_often_they_are_read() -> None:
    """And hold what one table of everything holds."""
    rng, column = np.random.default_rng(0), Column(512)
    prompts = rng.integers(0, 300, (400, 20)).astype(np.uint64)
    rewards = rng.normal(size=prompts.shape).astype(np.float32)
    for item in range(400):
        column.add(prompts[item], rewards[item], item)
        column.settle()
        assert len(column.tables) <= 1 + np.log2(item + 1)
    whole = RewardTable.of(prompts.ravel(), rewards.ravel())
    whole.sort_rewards()
    for name in ("ids", "offsets", "values"):
        np.testing.assert_array_equal(getattr(column.table(), name), getattr(whole, name))


def test_what_waits_becomes_a_table_by_itself() -> None:
    column = Column(512)
    for item in range(3):
        column.add(np.arange(WAITING // 2, dtype=np.uint64), np.zeros(WAITING // 2, np.float32), item)
    assert [len(table.values) for table in column.tables] == [WAITING]


def test_adaptive_sampling_saves_what_brute_force_says() -> None:
    """Each prompt apart: rounds of 8 until the formula of the gaussian quantile is satisfied."""
    rng, prompts = np.random.default_rng(0), np.arange(60, dtype=np.uint64)
    spread = np.where(prompts % 2 == 0, 0.1, 2.0)
    scores = (rng.normal(size=(60, 64)) * spread[:, None]).astype(np.float32)
    sampling, rules = AdaptiveSampling(0.3, 8, 64), {"m": GAUSSIAN, "n": CONSTANT}
    statistics, taken = BaselineStatistics(), np.zeros(60, np.int64)
    progress = sampling.progress(statistics, rules, prompts)
    assert progress.needs.all()
    for item in range(20):
        rows = np.flatnonzero(progress.needs)
        drawn = scores[rows[:, None], taken[rows][:, None] + np.arange(8)]
        statistics.add_samples("m", np.repeat(prompts[rows], 8), drawn.ravel(), item)
        taken[rows] += 8
        progress = sampling.progress(statistics, rules, prompts)
        if not progress.needs.any():
            break
    expected = []
    for row in scores.astype(np.float64):
        for count in range(8, 65, 8):
            c4 = 1 - 1 / (4 * count) - 7 / (32 * count**2) - 19 / (128 * count**3)
            error = row[:count].std(ddof=1) / c4 * (1 / count + 1.0364334**2 * (1 - c4**2)) ** 0.5
            if error <= 0.3:
                break
        expected.append(count)
    assert taken.tolist() == expected
    assert (progress.taken, progress.saved) == (sum(expected), 60 * 64 - sum(expected))
    assert taken[::2].tolist() == [8] * 30, "calm prompts stop at once"
    assert taken[1::2].mean() > 40


def test_adaptive_sampling_at_the_limits() -> None:
    statistics = BaselineStatistics()
    statistics.add_samples("m", ids(1, 2, 2, 2, 2), np.array([0.0, 0, 9, -9, 5]), 0)
    prompts = ids(1, 2, 3)
    wants = {
        (1, 8): [True, True, True],  # a single sample has no error: it counts as too large
        (1, 4): [True, False, True],  # no more than the greatest number
    }
    for (least, most), needs in wants.items():
        progress = AdaptiveSampling(0.1, least, most).progress(statistics, {"m": QUANTILE}, prompts)
        assert progress.needs.tolist() == needs
    only_constant = AdaptiveSampling(0.1, 2, 8).progress(statistics, {"m": CONSTANT}, prompts)
    assert only_constant.needs.tolist() == [True, False, True]
    for tolerance, least, most in ((0, 1, 2), (1, 3, 2), (1, 0, 2)):
        with pytest.raises(ValueError, match=r"tolerance|min <= max"):
            AdaptiveSampling(tolerance, least, most)
