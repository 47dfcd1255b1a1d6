"""The pipeline against a plain transcription in float64 numpy, slopes against its central differences."""

import pickle
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from rlhf.types import Ragged, Rollouts
from rlhf.utility.pipeline import Utility
from rlhf.utility.prompt_references import PromptReferences

GROUP = np.array([0, 0, 1, 1, 1, 2], np.int32)
NAMES = ("helpful", "harmless", "verbose")
ONES = dict.fromkeys(NAMES, 1.0)
YAMLS = sorted((Path(__file__).resolve().parents[2] / "conf/utility").glob("*.yaml"))

Statistics = SimpleNamespace
"""One prompt's references of one model, in float64."""


def sigmoid(x: np.ndarray | float) -> np.ndarray | float:
    return 1 / (1 + np.exp(-x))


def inada(x: float, scale: float, aversion: float) -> float:
    x /= scale
    return scale * (np.log(1 + x) if x > 0 else (1 - (1 - x) ** (1 + aversion)) / (1 + aversion))


PLAIN: dict[str, Callable[..., float]] = {
    "linear": lambda r, s: r,
    "centered_linear": lambda r, s: r - s.r_ref,
    "lsc": lambda r, s: np.log(sigmoid(r - s.r_ref)),
    "log_sigmoid": lambda r, s: np.log(sigmoid(r)),
    "sigmoid": lambda r, s: sigmoid(r - s.r_ref),
    "par": lambda r, s: np.mean([sigmoid(r - sample) for sample in s.samples]),
    "quantile_rank": lambda r, s: np.mean([(sample < r) + (sample == r) / 2 for sample in s.samples]),
    "zscore": lambda r, s: (r - s.mean) / s.std,
    "zscore_global": lambda r, s: (r - s.population_mean) / s.population_std,
    "min_max": lambda r, s: (r - s.low) / (s.high - s.low),
    "clip": lambda r, s, low, high: min(max(r - s.r_ref, low), high),
    "tanh": lambda r, s, scale: scale * np.tanh((r - s.r_ref) / scale),
    "inada": lambda r, s, scale, aversion: inada(r - s.r_ref, scale, aversion),
}
LOG = ("lsc", "log_sigmoid")


def in_kind(transform: str, p: float) -> float:
    return np.log(p) if transform in LOG else p


def in_probability(transform: str, u: np.ndarray) -> np.ndarray:
    return np.exp(u) if transform in LOG else u


def plain_combined(utility: Utility, u: np.ndarray) -> float:
    weights = np.array(list(utility.weights.values()))
    if utility.combine == "weighted_sum":
        return float(weights @ u)
    if utility.combine == "min":
        return float(u.min())
    if utility.combine == "softmin":
        t = utility.parameters["temperature"]
        return float(-t * np.log(np.exp(-u / t).sum()))
    p = in_probability(utility.transform, u)
    if utility.combine in ("and", "product"):
        return in_kind(utility.transform, float(np.prod(p)))
    if utility.combine == "or":
        return in_kind(utility.transform, float(1 - np.prod(1 - p)))
    assert utility.combine == "helpful & ~(harmless | verbose)"
    return in_kind(utility.transform, float(p[0] * (1 - p[1]) * (1 - p[2])))


def plain_row(utility: Utility, row: np.ndarray, statistics: list[Statistics]) -> tuple[np.ndarray, float]:
    """Utilities and the combined utility of one response, in float64."""
    names = set(utility.parameters) - {"temperature"}
    parameters = {name: utility.parameters[name] for name in names}
    u = np.array([PLAIN[utility.transform](r, s, **parameters) for r, s in zip(row, statistics, strict=True)])
    return u, plain_combined(utility, u)


def references(seed: int = 0) -> dict[str, PromptReferences]:
    """Of three prompts, with other numbers of samples for each model, some of them padding."""
    rng = np.random.default_rng(seed)
    result = {}
    for name, count in zip(NAMES, (5, 8, 3), strict=True):
        samples = np.sort(rng.normal(0.5, 1.5, (3, count)).astype(np.float32))
        padded = samples.copy()
        padded[1, -1] = np.nan
        full = [row[~np.isnan(row)].astype(np.float64) for row in padded]
        result[name] = PromptReferences(
            r_ref=np.array([np.quantile(row, 0.85) for row in full], np.float32),
            standard_error=np.full(3, np.nan, np.float32),
            mean=np.array([row.mean() for row in full], np.float32),
            std=np.array([row.std(ddof=1) for row in full], np.float32),
            low=np.array([row.min() for row in full], np.float32),
            high=np.array([row.max() for row in full], np.float32),
            samples=padded,
            population_mean=float(np.concatenate(full).mean()),
            population_std=float(np.concatenate(full).std(ddof=1)),
        )
    return result


def statistics(of: Mapping[str, PromptReferences], prompt: int) -> list[Statistics]:
    per_prompt = ("r_ref", "mean", "std", "low", "high")
    return [
        Statistics(
            **{key: float(getattr(r, key)[prompt]) for key in per_prompt},
            samples=[float(v) for v in r.samples[prompt] if not np.isnan(v)],
            population_mean=r.population_mean,
            population_std=r.population_std,
        )
        for r in of.values()
    ]


def raw_rewards() -> np.ndarray:
    return np.random.default_rng(1).normal(0.8, 2.0, (len(GROUP), len(NAMES))).astype(np.float32)


def rollouts() -> Rollouts:
    tokens = Ragged.of([[1]] * len(GROUP), np.int32)
    return Rollouts(
        item=7,
        version=3,
        seed=0,
        temperature=1.0,
        prompts=("one", "two", "three"),
        prompt_ids=np.arange(3, dtype=np.uint64),
        prompt_tokens=Ragged.of([[1]] * 3, np.int32),
        group=GROUP,
        tokens=tokens,
        logprobs=np.zeros(len(GROUP), np.float32),
        versions=np.full(len(GROUP), 3, np.int32),
        finished=np.ones(len(GROUP), bool),
        texts=("text",) * len(GROUP),
    )


def from_yaml(path: Path) -> Utility:
    group = OmegaConf.load(path)
    weights = ONES if group.combine != "weighted_sum" else dict(zip(NAMES, (1.0, 0.5, -2.0), strict=True))
    return Utility(group.transform, group.combine, dict(group.parameters), weights)


EXPRESSION = "helpful & ~(harmless | verbose)"
UTILITIES = {path.stem: from_yaml(path) for path in YAMLS} | {
    f"{transform} {combine}": Utility(transform, combine, {}, ONES)
    for transform in ("lsc", "log_sigmoid", "sigmoid", "par", "quantile_rank")
    for combine in ("and", "or", EXPRESSION)
}


@pytest.mark.parametrize("name", UTILITIES)
def test_the_pipeline_is_its_plain_transcription(name: str) -> None:
    utility, raw, of = UTILITIES[name], raw_rewards(), references()
    rewards = utility.rewards(rollouts(), raw, of)
    with np.errstate(divide="ignore"):  # quantile_rank reaches probabilities of 0
        rows = [plain_row(utility, raw[b].astype(float), statistics(of, g)) for b, g in enumerate(GROUP)]
    np.testing.assert_allclose(rewards.utility, [u for u, _ in rows], rtol=3e-5, atol=1e-6)
    np.testing.assert_allclose(rewards.combined, [c for _, c in rows], rtol=3e-5, atol=1e-6)
    r_ref = np.array([[s.r_ref for s in statistics(of, g)] for g in GROUP])
    np.testing.assert_array_equal(rewards.reference, r_ref.astype(np.float32))
    np.testing.assert_allclose(rewards.p_good, sigmoid(raw.astype(float) - r_ref), rtol=1e-5)
    np.testing.assert_array_equal(rewards.raw, raw)
    assert (rewards.item, rewards.version, rewards.models) == (7, 3, NAMES)
    for column in (rewards.utility, rewards.combined, rewards.reference, rewards.p_good, rewards.slope):
        assert column.dtype == np.float32


@pytest.mark.parametrize("name", UTILITIES)
def test_the_slope_is_the_central_difference(name: str) -> None:
    utility, raw, of = UTILITIES[name], raw_rewards(), references()
    slope = utility.slope(raw, of, GROUP)
    step, expected = 1e-6, np.zeros(raw.shape)
    with np.errstate(divide="ignore", invalid="ignore"):
        for b, g in enumerate(GROUP):
            for m in range(len(NAMES)):
                move = np.zeros(len(NAMES))
                move[m] = step
                up, down = (
                    plain_row(utility, raw[b].astype(float) + sign * move, statistics(of, g))[1]
                    for sign in (1, -1)
                )
                expected[b, m] = (up - down) / (2 * step)
    assert slope.dtype == np.float32
    np.testing.assert_allclose(slope, expected, rtol=1e-4, atol=2e-7)
    if utility.transform != "quantile_rank":
        assert np.abs(slope).max() > 0.01


@pytest.mark.parametrize("name", UTILITIES)
def test_combined_and_slope_are_those_of_the_rewards(name: str) -> None:
    utility, raw, of = UTILITIES[name], raw_rewards(), references()
    rewards = utility.rewards(rollouts(), raw, of)
    np.testing.assert_array_equal(utility.combined(raw, of, GROUP), rewards.combined)
    np.testing.assert_array_equal(utility.slope(raw, of, GROUP), rewards.slope)


@pytest.mark.parametrize("name", UTILITIES)
def test_it_pickles_and_says_whether_it_needs_samples(name: str) -> None:
    utility, of = UTILITIES[name], references()
    assert pickle.loads(pickle.dumps(utility)) == utility
    assert utility.needs_samples == (utility.transform in ("par", "quantile_rank"))
    if not utility.needs_samples:
        bare = {key: replace(r, samples=np.zeros((3, 0), np.float32)) for key, r in of.items()}
        raw = raw_rewards()
        np.testing.assert_array_equal(utility.combined(raw, bare, GROUP), utility.combined(raw, of, GROUP))


def test_extreme_rewards_have_finite_slopes() -> None:
    raw = np.array([[1e4, -1e4, 1e4], [-1e4, -1e4, 1e4], [1e4, 1e4, -1e4]], np.float32)
    zeros = {
        name: replace(r, r_ref=np.zeros(3, np.float32), samples=np.zeros((3, 1), np.float32))
        for name, r in references().items()
    }
    for transform in ("lsc", "par"):
        utility = Utility(transform, EXPRESSION, {}, ONES)
        assert np.isfinite(utility.slope(raw, zeros, np.arange(3))).all()
    slope = Utility("lsc", EXPRESSION, {}, ONES).slope(raw, zeros, np.arange(3))
    # log P = log p_helpful + log(1 - p_harmless) + log(1 - p_verbose)
    np.testing.assert_allclose(slope, [[0, 0, -1], [1, 0, -1], [0, -1, 0]], rtol=1e-6)


def test_columns_follow_the_order_of_the_weights() -> None:
    raw, of = raw_rewards(), references()
    order = [2, 0, 1]
    weights = {NAMES[i]: ONES[NAMES[i]] for i in order}
    turned = Utility("lsc", EXPRESSION, {}, weights).rewards(rollouts(), raw[:, order], of)
    straight = UTILITIES[f"lsc {EXPRESSION}"].rewards(rollouts(), raw, of)
    assert turned.models == tuple(weights)
    np.testing.assert_array_equal(turned.combined, straight.combined)
    np.testing.assert_array_equal(turned.slope, straight.slope[:, order])


def test_rewards_are_copied_and_of_any_float_type() -> None:
    raw, of = raw_rewards(), references()
    raw.flags.writeable = False
    utility = UTILITIES["lsc"]
    np.testing.assert_array_equal(
        utility.combined(raw.astype(np.float64), of, GROUP), utility.combined(raw, of, GROUP)
    )


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_slopes_do_not_depend_on_the_callers_grad_mode(mode: type) -> None:
    raw, of, utility = raw_rewards(), references(), UTILITIES["lsc"]
    with mode():
        slope, rewards = utility.slope(raw, of, GROUP), utility.rewards(rollouts(), raw, of)
    assert (slope != 0).all()
    np.testing.assert_array_equal(slope, utility.slope(raw, of, GROUP))
    np.testing.assert_array_equal(rewards.slope, slope)


@pytest.mark.parametrize(
    ("transform", "change", "message"),
    [
        ("zscore", {"std": [1, 1, 0]}, r"reward model harmless, prompt 2 of those at hand: zscore divides"),
        ("min_max", {"low": [9, 0, 0], "high": [9, 1, 1]}, r"reward model harmless, prompt 0 .*: min_max"),
        ("zscore_global", {"population_std": 0.0}, r"reward model harmless, .*: zscore_global divides"),
        ("par", {"samples": [[1.0], [np.nan], [1.0]]}, r"reward model harmless, prompt 1 .*: par compares"),
        ("quantile_rank", {"samples": np.zeros((3, 0))}, r"reward model harmless, prompt 0 .*none"),
    ],
)
def test_an_unusable_reference_is_an_error_with_model_and_prompt(transform, change, message) -> None:
    of = references()
    values = {k: np.array(v, np.float32) if not isinstance(v, float) else v for k, v in change.items()}
    of["harmless"] = replace(of["harmless"], **values)
    utility = Utility(transform, "weighted_sum", {}, ONES)
    with pytest.raises(ValueError, match=message):
        utility.combined(raw_rewards(), of, GROUP)


def test_the_prompt_of_an_unusable_reference_is_quoted() -> None:
    of = references()
    of["harmless"] = replace(of["harmless"], std=np.array([1, 1, 0], np.float32))
    utility = Utility("zscore", "weighted_sum", {}, ONES)
    with pytest.raises(ValueError, match=r"reward model harmless, prompt 'three': zscore divides"):
        utility.rewards(rollouts(), raw_rewards(), of)


def test_what_does_not_go_together_is_refused_when_made() -> None:
    with pytest.raises(ValueError, match=r"utility.combine=and needs"):
        Utility("linear", "and", {}, ONES)
    with pytest.raises(ValueError, match=r"utility.parameters.temperature is missing"):
        Utility("lsc", "softmin", {}, ONES)
