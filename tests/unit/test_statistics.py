"""Baseline statistics against numpy prompt by prompt, and what a snapshot and a repetition must keep."""

import hashlib
import json
import struct
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.utility.statistics import BaselineStatistics, PromptReferences, ReferenceRule

Batch = tuple[np.ndarray, np.ndarray]
BIG = 2**63  # ids use all 64 bits


def rule(kind: str = "quantile", level: float = 0.85, estimator: str = "empirical") -> ReferenceRule:
    return ReferenceRule(kind, level, estimator, 1.25)


def ids(*prompts: int) -> np.ndarray:
    return np.array(prompts, np.uint64)


def rewards(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def batches(seed: int, count: int = 6, prompts: int = 5) -> list[Batch]:
    """Every prompt once in each batch, and some of them again: unequal counts, scattered order."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        chosen = np.concatenate([np.arange(prompts), rng.integers(0, prompts, rng.integers(0, 9))])
        rng.shuffle(chosen)
        made.append((chosen.astype(np.uint64) * 3 + BIG, rng.normal(chosen, 2).astype(np.float32)))
    return made


def filled(parts: list[Batch], order: list[int] | None = None) -> BaselineStatistics:
    statistics = BaselineStatistics()
    for item in order or range(len(parts)):
        statistics.add_samples("helpful", *parts[item], item)
    return statistics


def same(one: PromptReferences, other: PromptReferences) -> bool:
    """Bit for bit."""
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(np.array_equal(a, b, equal_nan=True) for a, b in pairs)


def of_prompt(parts: list[Batch], prompt: int) -> np.ndarray:
    return np.concatenate([values[prompts == prompt] for prompts, values in parts])


@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_empirical_quantiles_are_numpys(seed: int, level: float) -> None:
    parts = batches(seed)
    asked = ids(*(3 * i + BIG for i in (4, 0, 2, 2, 3, 1)))
    found = filled(parts).reference("helpful", asked, rule(level=level))
    r_ref, mean, std = found.r_ref, found.mean, found.std
    assert {array.dtype for array in list(vars(found).values())[:7]} == {np.dtype(np.float32)}
    for i, prompt in enumerate(asked):
        own = of_prompt(parts, prompt).astype(np.float64)
        assert r_ref[i] == pytest.approx(np.quantile(own, level), rel=1e-6, abs=1e-6)
        assert mean[i] == pytest.approx(own.mean(), rel=1e-6, abs=1e-6)
        assert std[i] == pytest.approx(own.std(ddof=1), rel=1e-6)
        assert (found.low[i], found.high[i]) == (own.min(), own.max())
    everything = np.concatenate([values for _, values in parts]).astype(np.float64)
    assert found.population_mean == pytest.approx(everything.mean(), rel=1e-12)
    assert found.population_std == pytest.approx(everything.std(ddof=1), rel=1e-12)


@given(st.integers(0, 10_000), st.floats(0.01, 0.99))
def test_gaussian_quantiles_are_the_formula(seed: int, level: float) -> None:
    parts = batches(seed)
    asked = ids(*(3 * i + BIG for i in range(5)))
    r_ref = filled(parts).reference("helpful", asked, rule(level=level, estimator="gaussian")).r_ref
    z = NormalDist().inv_cdf(level)
    for i, prompt in enumerate(asked):
        own = [float(value) for value in of_prompt(parts, prompt)]
        mean = sum(own) / len(own)
        std = (sum((value - mean) ** 2 for value in own) / (len(own) - 1)) ** 0.5
        assert r_ref[i] == pytest.approx(mean + z * std, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize(("estimator", "error"), [("empirical", 0.25), ("gaussian", 0.20)])
def test_quantiles_of_normal_rewards_find_the_true_one(estimator: str, error: float) -> None:
    """64 samples of 500 prompts: no bias, and about the standard error that theory gives (0.19 and 0.155)."""
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(500, dtype=np.uint64), 64)
    statistics = BaselineStatistics()
    statistics.add_samples("m", prompts, rng.normal(size=len(prompts)), item=0)
    r_ref = statistics.reference("m", np.arange(500, dtype=np.uint64), rule(estimator=estimator)).r_ref
    deviation = r_ref - NormalDist().inv_cdf(0.85)
    assert abs(deviation.mean()) < 0.05
    assert 0.1 < deviation.std() < error


def test_canned_mean_and_constant() -> None:
    statistics = BaselineStatistics()
    statistics.add_samples("m", ids(1, 1, 2, 2), rewards(1, 3, 5, 5), item=0)
    statistics.add_canned("m", ids(1, 2, 1, 2, 3), rewards(-1, 4, -3, 6, 9), item=0)
    found = statistics.reference("m", ids(2, 1), rule("canned"))
    assert found.r_ref.tolist() == [5.0, -2.0]
    assert found.mean.tolist() == [5.0, 2.0]
    assert found.std.tolist() == pytest.approx([0.0, 2**0.5])
    assert found.standard_error.tolist() == [0.0, 0.0]
    assert statistics.reference("m", ids(2, 1), rule("mean")).r_ref.tolist() == [5.0, 2.0]
    constant = statistics.reference("m", ids(2, 1), rule("constant"))
    assert (constant.r_ref.tolist(), constant.standard_error.tolist()) == ([1.25, 1.25], [0.0, 0.0])


def test_without_samples_mean_and_std_are_unknown() -> None:
    statistics = BaselineStatistics()
    statistics.add_canned("m", ids(3), rewards(9), item=0)
    for kind, expected in (("canned", 9.0), ("constant", 1.25)):
        found = statistics.reference("m", ids(3), rule(kind), points=2)
        assert (found.r_ref.tolist(), found.standard_error.tolist()) == ([expected], [0.0])
        assert np.isnan([found.mean, found.std, found.low, found.high, *found.samples.T]).all()
        assert np.isnan([found.population_mean, found.population_std]).all()


def test_equal_rewards_have_no_spread_at_all() -> None:
    statistics = BaselineStatistics()
    statistics.add_samples("m", np.repeat(ids(1, 2), 31), np.repeat(rewards(0.1, -1e4 / 3), 31), item=0)
    assert statistics.reference("m", ids(1, 2), rule()).std.tolist() == [0.0, 0.0]
    assert statistics.reference("m", ids(1, 2), rule()).standard_error.tolist() == pytest.approx(
        [0.0, 0.0], abs=1e-9
    )


def test_one_sample_has_a_quantile_but_no_gaussian_one() -> None:
    statistics = BaselineStatistics()
    statistics.add_samples("m", ids(1, 2, 2), rewards(0.5, 1, 2), item=0)
    found = statistics.reference("m", ids(1), rule())
    assert (found.r_ref.tolist(), found.std.tolist()) == ([0.5], [0.0])
    assert np.isnan(found.standard_error).all()
    with pytest.raises(ValueError, match=r"second sample, .* prompt 1 .* 'm'"):
        statistics.reference("m", ids(2, 1), rule(estimator="gaussian"))


@pytest.mark.parametrize("kind", ["quantile", "mean", "canned", "column"])
@pytest.mark.parametrize(("model", "prompt"), [("helpful", 77), ("helpful", 0), ("other", BIG)])
def test_unknown_prompts_are_named(kind: str, model: str, prompt: int) -> None:
    statistics = filled(batches(0))
    statistics.add_canned("helpful", ids(BIG), rewards(1), item=0)
    statistics.add_column("helpful", ids(BIG), rewards(1))
    with pytest.raises(ValueError, match=f"prompt {prompt} for reward model '{model}'"):
        statistics.reference(model, ids(BIG, prompt) if model == "helpful" else ids(prompt), rule(kind))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
def test_rewards_that_are_not_finite_are_named_and_not_taken_in(value: float) -> None:
    statistics = BaselineStatistics()
    for add in (statistics.add_samples, statistics.add_canned):
        with pytest.raises(ValueError, match=r"'harmless' .* prompt 9 \(1 of the 3 rewards of item 4"):
            add("harmless", ids(8, 9, 9), np.array([1.0, value, 2.0]), 4)
    assert statistics.digest() == BaselineStatistics().digest()
    assert statistics.add_samples("harmless", ids(8), rewards(1), 4), "the item may be sent again"


def test_a_repeated_item_is_ignored() -> None:
    parts = batches(1)
    statistics, once = filled(parts), filled(parts)
    assert not statistics.add_samples("helpful", *parts[2], item=2)
    assert not statistics.add_samples("helpful", ids(1), rewards(1), item=2)
    assert statistics.digest() == once.digest()
    assert statistics.add_samples("harmless", *parts[2], item=2), "another model's item"
    assert statistics.add_canned("helpful", *parts[2], item=2), "canned items are apart"
    assert statistics.digest() != once.digest()


@given(st.permutations(range(6)), st.integers(0, 100))
def test_nothing_depends_on_the_order_of_arrival(order: list[int], seed: int) -> None:
    parts = batches(seed)
    one, other = filled(parts), filled(parts, order)
    asked = ids(*(3 * i + BIG for i in range(5)))
    assert one.digest() == other.digest()
    for estimator in ("empirical", "gaussian"):
        left, right = (s.reference("helpful", asked, rule(estimator=estimator)) for s in (one, other))
        assert same(left, right)


def test_digest_ignores_batching_and_the_sign_of_zero() -> None:
    one, other = BaselineStatistics(), BaselineStatistics()
    one.add_samples("m", ids(1, 2, 1, 1), rewards(0.0, 5, -0.0, 0.0), item=0)
    for item, (prompt, value) in enumerate([(1, -0.0), (1, 0.0), (2, 5.0), (1, 0.0)]):
        other.add_samples("m", ids(prompt), rewards(value), item)
        other.digest()
    assert one.digest() == other.digest()


@pytest.mark.parametrize(
    "change",
    [
        ("m", ids(1, 1, 2), rewards(1, 2, 4)),
        ("m", ids(1, 2, 2), rewards(1, 2, 3)),
        ("n", ids(1, 1, 2), rewards(1, 2, 3)),
    ],
)
def test_digest_tells_contents_apart(change: tuple[str, np.ndarray, np.ndarray]) -> None:
    one, other, canned = BaselineStatistics(), BaselineStatistics(), BaselineStatistics()
    one.add_samples("m", ids(1, 1, 2), rewards(1, 2, 3), item=0)
    other.add_samples(*change, item=0)
    canned.add_canned("m", ids(1, 1, 2), rewards(1, 2, 3), item=0)
    assert len({one.digest(), other.digest(), canned.digest()}) == 3


def test_digest_is_a_hash_of_the_bytes_laid_out_by_hand() -> None:
    statistics = BaselineStatistics()
    statistics.add_samples("m", ids(3, BIG, 3), rewards(2.0, 7.0, 0.5), item=8)
    laid_out = struct.pack("<2Q3q3f", 3, BIG, 0, 2, 3, 0.5, 2.0, 7.0)
    of_column = hashlib.blake2b(laid_out, digest_size=16).hexdigest()
    described = f"('sampled', 'm', '{of_column}')".encode()
    assert statistics.digest() == hashlib.blake2b(described, digest_size=16).hexdigest()


def test_adding_after_reading_counts() -> None:
    statistics = BaselineStatistics()
    statistics.add_samples("m", ids(1, 1), rewards(0, 1), item=0)
    assert statistics.reference("m", ids(1), rule(level=0.5)).r_ref.tolist() == [0.5]
    statistics.add_samples("m", ids(1), rewards(9), item=1)
    assert statistics.reference("m", ids(1), rule(level=0.5)).r_ref.tolist() == [1.0]


def test_counts_and_samples() -> None:
    parts = batches(3)
    statistics = filled(parts)
    asked = ids(BIG + 6, 5, BIG)
    assert statistics.counts("helpful", asked).tolist() == [len(of_prompt(parts, p)) for p in asked]
    assert statistics.counts("unheard of", asked).tolist() == [0, 0, 0]
    assert statistics.known("helpful", asked).tolist() == [True, False, True]
    assert statistics.known("unheard of", asked).tolist() == [False] * 3
    assert statistics.samples("helpful", BIG + 6).tolist() == sorted(of_prompt(parts, BIG + 6).tolist())
    with pytest.raises(ValueError, match="prompt 5 for reward model 'helpful'"):
        statistics.samples("helpful", 5)


def test_frozen_statistics_take_nothing_in() -> None:
    statistics = filled(batches(0))
    digest = statistics.digest()
    statistics.freeze()
    for add in (statistics.add_samples, statistics.add_canned):
        with pytest.raises(RuntimeError, match="item 99 of model 'helpful'"):
            add("helpful", ids(1), rewards(1), 99)
    with pytest.raises(RuntimeError, match="column of references of model 'helpful'"):
        statistics.add_column("helpful", ids(1), rewards(1))
    with pytest.raises(RuntimeError, match="other statistics of model 'helpful'"):
        statistics.merge(filled(batches(1)))
    assert statistics.digest() == digest


@pytest.mark.parametrize("frozen", [False, True])
def test_a_snapshot_holds_everything(tmp_path: Path, frozen: bool) -> None:
    parts = batches(5)
    statistics = filled(parts)
    statistics.add_canned("a name / with anything", ids(1, BIG), rewards(0.1, -3), item=7)
    if frozen:
        statistics.freeze()
    path = tmp_path / "baseline.npz"
    statistics.save(path)
    statistics.save(path)
    assert [p.name for p in tmp_path.iterdir()] == ["baseline.npz"], "nothing is left beside it"
    loaded = BaselineStatistics.load(path)
    assert loaded.digest() == statistics.digest()
    assert loaded.frozen is frozen
    asked = ids(BIG, BIG + 3)
    before, after = (s.reference("helpful", asked, rule()) for s in (statistics, loaded))
    assert same(before, after)
    if not frozen:
        assert not loaded.add_samples("helpful", *parts[0], item=0), "an update in flight may come again"
        assert not loaded.add_canned("a name / with anything", ids(1), rewards(2), item=7)
        assert loaded.add_samples("helpful", *parts[0], item=50)


def test_an_empty_snapshot(tmp_path: Path) -> None:
    BaselineStatistics().save(tmp_path / "baseline.npz")
    assert BaselineStatistics.load(tmp_path / "baseline.npz").digest() == BaselineStatistics().digest()


def test_a_failed_write_keeps_the_old_snapshot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, statistics = tmp_path / "baseline.npz", filled(batches(5))
    statistics.save(path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr("rlhf.utility.snapshots.os.fsync", full)
    statistics.add_samples("helpful", ids(1), rewards(1), item=50)
    with pytest.raises(OSError, match="no space"):
        statistics.save(path)
    assert path.read_bytes() == before


def test_a_damaged_snapshot_is_named(tmp_path: Path) -> None:
    path = tmp_path / "baseline.npz"
    filled(batches(5)).save(path)
    with np.load(path) as arrays:
        content = dict(arrays)
    for change in (
        {"sampled.0.values": content["sampled.0.values"] + np.float32(1)},
        {"header": np.array(json.dumps(json.loads(str(content["header"])) | {"frozen": True}))},
    ):
        np.savez(path, **(content | change))
        with pytest.raises(ValueError, match=r"baseline.npz: .* damaged"):
            BaselineStatistics.load(path)
    del content["format"]
    np.savez(path, **content)
    with pytest.raises(ValueError, match=r"baseline.npz: .* older format"):
        BaselineStatistics.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "median"}, "reference 'median'"),
        ({"estimator": "harrell"}, "estimator 'harrell'"),
        ({"level": 1.0}, "level"),
        ({"constant": float("nan")}, "constant"),
    ],
)
def test_rules_are_checked(change: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"kind": "quantile", "level": 0.85, "estimator": "empirical", "constant": 0.0}
    with pytest.raises(ValueError, match=message):
        ReferenceRule(**(good | change))  # type: ignore[arg-type]


def test_many_prompts_at_once() -> None:
    rng = np.random.default_rng(0)
    prompts = np.unique(rng.integers(0, 2**64, 30_000, dtype=np.uint64))
    scores = rng.normal(size=(8, len(prompts))).astype(np.float32)
    statistics = BaselineStatistics()
    for item in range(8):
        statistics.add_samples("m", prompts, scores[item], item)
    shuffled = rng.permutation(len(prompts))
    r_ref = statistics.reference("m", prompts[shuffled], rule()).r_ref
    np.testing.assert_allclose(r_ref, np.quantile(scores, 0.85, axis=0)[shuffled], rtol=1e-5, atol=1e-6)
