"""Transforms against 50-digit arithmetic, values and slopes, and their algebra by property."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from rlhf.utility import transforms
from rlhf.utility.kinds import TRANSFORM_KINDS, TransformKind
from rlhf.utility.reference import Reference
from rlhf.utility.transforms import TRANSFORMS, UnusableReference, log_probabilities, p_good

mpmath.mp.dps = 50

R_REF, MEAN, STD, LOW, HIGH = 1.25, 0.5, 1.75, -2.5, 3.75
SAMPLES = [-2.5, -1.0, 0.5, 0.5, 3.75]
POPULATION_MEAN, POPULATION_STD = 0.25, 2.5
GRID = [0.0, 1 / 64, 0.25, 1.0, 3.0, 6.5, 20.0, 80.0, 100.0, 1000.5, 1e4]
# On multiples of 1/64 up to 1e4, differences are exact in float32.
EXTREMES = [*(-x for x in GRID), *GRID[1:], R_REF - 2.0, R_REF + 2.0]
PAIRED = ["lsc", "log_sigmoid", "sigmoid", "par"]
rewards_of_a_prompt = st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=8)


def load(name: str) -> dict[str, float]:
    """The YAML's parameters: there is no other place for defaults."""
    path = Path(__file__).resolve().parents[2] / f"conf/utility/{name}.yaml"
    return dict(OmegaConf.load(path).parameters)


PARAMETERS = {name: load(name) for name in TRANSFORM_KINDS}


def reference(r_ref: float | torch.Tensor = R_REF, padding: int = 0) -> Reference:
    """The prompt of these tests, with this r_ref and NaN padding."""
    numbers = (
        r_ref,
        MEAN,
        STD,
        LOW,
        HIGH,
        SAMPLES + [float("nan")] * padding,
        POPULATION_MEAN,
        POPULATION_STD,
    )
    return Reference(*(torch.as_tensor(value, dtype=torch.float32) for value in numbers))


def apply(name: str, rewards: torch.Tensor, to: Reference) -> torch.Tensor:
    return TRANSFORMS[name](rewards, to, **PARAMETERS[name])


def sigmoid(x: mpmath.mpf) -> mpmath.mpf:
    return 1 / (1 + mpmath.exp(-x))


def log_sigmoid(x: mpmath.mpf) -> mpmath.mpf:
    return -mpmath.log1p(mpmath.exp(-x))


def inada(x: mpmath.mpf, scale: float, aversion: float) -> mpmath.mpf:
    """The integral of the slope that the docstring promises, (1 + x)^-1 above and (1 - x)^a below."""
    x, power = x / scale, mpmath.mpf(aversion) + 1
    return scale * (mpmath.log(1 + x) if x > 0 else (1 - (1 - x) ** power) / power)


EXACT: dict[str, Callable[[mpmath.mpf], mpmath.mpf]] = {
    "linear": lambda r: r,
    "centered_linear": lambda r: r - R_REF,
    "lsc": lambda r: log_sigmoid(r - R_REF),
    "log_sigmoid": lambda r: log_sigmoid(r),
    "sigmoid": lambda r: sigmoid(r - R_REF),
    "par": lambda r: mpmath.fsum(sigmoid(r - s) for s in SAMPLES) / len(SAMPLES),
    "quantile_rank": lambda r: mpmath.fsum((s < r) + (s <= r) for s in SAMPLES) / (2 * len(SAMPLES)),
    "zscore": lambda r: (r - MEAN) / mpmath.mpf(STD),
    "zscore_global": lambda r: (r - POPULATION_MEAN) / mpmath.mpf(POPULATION_STD),
    "min_max": lambda r: (r - LOW) / mpmath.mpf(HIGH - LOW),
    "clip": lambda r: min(max(r - R_REF, PARAMETERS["clip"]["low"]), PARAMETERS["clip"]["high"]),
    "tanh": lambda r: (s := PARAMETERS["tanh"]["scale"]) * mpmath.tanh((r - R_REF) / s),
    "inada": lambda r: inada(r - R_REF, **PARAMETERS["inada"]),
}
# Where the slope is p (1 - p) with a rounded p, its error is a unit in the last place of 1.
SLOPE_ERROR = {"sigmoid": 2e-7, "par": 2e-7, "tanh": 4e-7}


def slope_of(utility: torch.Tensor, rewards: torch.Tensor) -> float:
    if not utility.requires_grad:
        return 0.0
    return torch.autograd.grad(utility.sum(), rewards, retain_graph=True)[0].item()


@pytest.mark.parametrize("name", TRANSFORM_KINDS)
@pytest.mark.parametrize("x", EXTREMES)
def test_values_and_slopes_are_exact(name: str, x: float) -> None:
    reward = torch.tensor([x], requires_grad=True)
    utility = apply(name, reward, reference())
    assert utility.item() == pytest.approx(float(EXACT[name](mpmath.mpf(x))), rel=4e-6, abs=1e-37)
    exact = float(mpmath.diff(EXACT[name], mpmath.mpf(x))) if name != "quantile_rank" else 0.0
    error = SLOPE_ERROR.get(name, 1e-37)
    assert slope_of(utility, reward) == pytest.approx(exact, rel=4e-6, abs=error)


def exact_pair(name: str) -> tuple[Callable[[mpmath.mpf], mpmath.mpf], Callable[[mpmath.mpf], mpmath.mpf]]:
    """log p and log(1 - p) as functions of r, each from whichever of p and 1 - p is the smaller."""
    zeros = {"par": SAMPLES, "log_sigmoid": [0.0]}.get(name, [R_REF])

    def log_mean(r: mpmath.mpf, sign: int) -> mpmath.mpf:
        p, q = (mpmath.fsum(sigmoid(s * (r - z)) for z in zeros) / len(zeros) for s in (sign, -sign))
        return mpmath.log(p) if p < q else mpmath.log1p(-q)

    return lambda r: log_mean(r, 1), lambda r: log_mean(r, -1)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("x", EXTREMES)
def test_log_probabilities_and_their_slopes_are_exact(name: str, x: float) -> None:
    reward = torch.tensor([x], requires_grad=True)
    pair = log_probabilities(name, reward, reference(padding=2))
    for value, exact in zip(pair, exact_pair(name), strict=True):
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(float(exact(mpmath.mpf(x))), rel=1e-5, abs=1e-37)
        slope = float(mpmath.diff(exact, mpmath.mpf(x)))
        assert slope_of(value, reward) == pytest.approx(slope, rel=1e-5, abs=1e-37)


def test_log_probabilities_of_ranks() -> None:
    rank, (log_p, log_not_p) = (
        f(torch.tensor([-9.0, 0.5, 9.0]), reference())
        for f in (TRANSFORMS["quantile_rank"], lambda r, to: log_probabilities("quantile_rank", r, to))
    )
    assert rank.tolist() == pytest.approx([0.0, 0.6, 1.0])
    assert log_p.exp().tolist() == pytest.approx([0.0, 0.6, 1.0])
    assert log_not_p.exp().tolist() == pytest.approx([1.0, 0.4, 0.0])


@pytest.mark.parametrize("name", [*PAIRED, "quantile_rank"])
def test_log_probabilities_agree_with_the_utility(name: str) -> None:
    rewards = torch.linspace(-6, 6, 25)
    utility, (log_p, _) = apply(name, rewards, reference()), log_probabilities(name, rewards, reference())
    expected = utility if TRANSFORM_KINDS[name].kind == "log_probability" else utility.log()
    assert torch.allclose(log_p, expected, rtol=1e-5)


@pytest.mark.parametrize("name", ["par", "quantile_rank"])
def test_padding_changes_nothing(name: str) -> None:
    for x in (-1e4, -1.0, 0.5, 1e4):
        reward = torch.tensor([x], requires_grad=True)
        results = []
        for padding in (0, 3):
            utility = apply(name, reward, reference(padding=padding))
            pair = log_probabilities(name, reward, reference(padding=padding))
            results.append(
                [*(v.item() for v in (utility, *pair)), *(slope_of(v, reward) for v in (utility, *pair))]
            )
        assert results[0] == pytest.approx(results[1], rel=1e-6, abs=1e-37)


def test_quantile_rank_is_the_share_below_counted_one_by_one() -> None:
    rng = np.random.default_rng(0)
    samples = np.sort(rng.integers(-4, 5, 16)).astype(np.float32)
    to = replace(reference(), samples=torch.from_numpy(samples))
    for r in range(-6, 7):
        below, equal = sum(s < r for s in samples), sum(s == r for s in samples)
        assert TRANSFORMS["quantile_rank"](torch.tensor([r]), to).item() == (below + equal / 2) / 16


@pytest.mark.parametrize("aversion", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("scale", [0.5, 2.0])
def test_inada_is_smooth_at_the_reference_concave_and_finite(scale: float, aversion: float) -> None:
    rewards = torch.tensor([-1e4, -30.0, -1.0, 0.0, 1.0, 30.0, 1e4], dtype=torch.float32) * scale + R_REF
    rewards.requires_grad_()
    utility = TRANSFORMS["inada"](rewards, reference(), scale=scale, aversion=aversion)
    (slope,) = torch.autograd.grad(utility.sum(), rewards)
    x = ((rewards.detach() - R_REF) / scale).double().numpy()
    expected = np.where(x > 0, 1 / (1 + np.abs(x)), (1 + np.abs(x)) ** aversion)
    np.testing.assert_allclose(slope.numpy(), expected, rtol=2e-5)
    exact = [float(inada(mpmath.mpf(r) - R_REF, scale, aversion)) for r in rewards.tolist()]
    np.testing.assert_allclose(utility.detach().numpy(), exact, rtol=2e-5)
    assert (slope.diff() < 0).all()
    assert utility[3].item() == 0.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", TRANSFORM_KINDS)
def test_every_input_type_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    rewards = torch.tensor([[-30.0, -1.5], [7.25, 12.0]], dtype=dtype)
    utility = apply(name, rewards, reference())
    assert utility.dtype == torch.float32
    assert torch.equal(utility, apply(name, rewards.float(), reference()))


def test_lsc_of_bfloat16_keeps_its_slope_above_the_reference() -> None:
    rewards = torch.tensor([7.0, 8.0, 12.0], dtype=torch.bfloat16)
    assert torch.sigmoid(rewards).log().eq(0).all(), "what lsc must not do"
    utility = TRANSFORMS["lsc"](rewards, reference(0.0))
    assert (utility < 0).all()
    assert (utility.diff() > 0).all()


@pytest.mark.parametrize("name", ["lsc", "centered_linear", "sigmoid", "clip", "tanh", "inada"])
@given(row=rewards_of_a_prompt, offset=st.integers(-64, 64), r_ref=st.floats(-8, 8, width=16))
def test_centred_transforms_ignore_the_prompts_offset(
    name: str, row: list[float], offset: int, r_ref: float
) -> None:
    grid = np.round(np.array(row) * 64) / 64  # on this grid, float32 differences are exact
    rewards, at = torch.tensor(grid, dtype=torch.float32), round(r_ref * 64) / 64
    before = apply(name, rewards, reference(at))
    assert torch.equal(before, apply(name, rewards + offset, reference(at + offset)))


@pytest.mark.parametrize("name", TRANSFORM_KINDS)
@given(row=rewards_of_a_prompt, r_ref=st.floats(-10, 10, width=32))
def test_more_reward_is_never_less_utility_and_each_kind_keeps_its_range(
    name: str, row: list[float], r_ref: float
) -> None:
    rewards = torch.tensor(sorted(row), dtype=torch.float32)
    utility = apply(name, rewards, reference(r_ref))
    assert utility.isfinite().all()
    assert (utility.diff() >= -2e-7 * utility.abs().max()).all()
    least, most = {
        "reward": (-np.inf, np.inf),
        "probability": (0, 1),
        "log_probability": (-np.inf, 0),
    }[TRANSFORM_KINDS[name].kind]
    assert (utility >= least).all()
    assert (utility <= most).all()


def test_each_prompt_has_its_own_reference() -> None:
    rewards, r_ref = torch.tensor([[1.0, 2.0], [1.0, 2.0]]), torch.tensor([[0.0], [2.0]])
    utility = TRANSFORMS["lsc"](rewards, reference(r_ref))
    expected = [[float(log_sigmoid(mpmath.mpf(r - z))) for r in (1, 2)] for z in (0, 2)]
    assert utility.flatten().tolist() == pytest.approx(np.ravel(expected).tolist(), rel=1e-6)


def test_each_prompt_has_its_own_samples() -> None:
    rewards = torch.tensor([1.0, 1.0])
    to = replace(reference(), samples=torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.5, float("nan")]]))
    assert TRANSFORMS["quantile_rank"](rewards, to).tolist() == [0.5, 1.0]
    exact = [[1.0, 0.0, -1.0], [1.0, 0.5]]
    expected = [float(mpmath.fsum(map(sigmoid, map(mpmath.mpf, row))) / len(row)) for row in exact]
    assert TRANSFORMS["par"](rewards, to).tolist() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("std", [0.0, float("nan"), 1e-42, -1.0])
@pytest.mark.parametrize(
    ("name", "field", "message"),
    [
        ("zscore", "std", r"zscore divides by the prompt's standard deviation"),
        ("zscore_global", "population_std", r"zscore_global divides by the population's standard deviation"),
        ("min_max", "high", r"min_max divides by the prompt's range"),
    ],
)
def test_a_spread_that_cannot_be_divided_by_is_refused(
    name: str, field: str, message: str, std: float
) -> None:
    spread = torch.tensor([[1.0, 1.0], [2.0, 1.0], [1.0, std]])
    to = replace(reference(), low=torch.zeros(3, 2), **{field: spread})
    with pytest.raises(UnusableReference, match=message) as refusal:
        TRANSFORMS[name](torch.ones(3, 2), to)
    assert refusal.value.position == (2, 1)


@pytest.mark.parametrize("name", ["par", "quantile_rank"])
def test_missing_samples_are_refused(name: str) -> None:
    nan = float("nan")
    cases = [(torch.tensor([[1.0, nan], [nan, nan], [2.0, 3.0]]), (1,)), (torch.zeros(3, 0), (0,))]
    for samples, position in cases:
        for function in (TRANSFORMS[name], lambda r, to: log_probabilities(name, r, to)):
            with pytest.raises(
                UnusableReference, match=rf"{name} compares with .* and there are none"
            ) as refusal:
                function(torch.ones(3), replace(reference(), samples=samples))
            assert refusal.value.position == position


@pytest.mark.parametrize("x", EXTREMES)
def test_p_good_is_the_exact_sigmoid_and_the_exponential_of_lsc(x: float) -> None:
    reward = torch.tensor([x])
    probability = p_good(reward, reference())
    assert probability.item() == pytest.approx(float(sigmoid(mpmath.mpf(x) - R_REF)), rel=1e-5, abs=1e-37)
    log = TRANSFORMS["lsc"](reward, reference())
    assert log.exp().item() == pytest.approx(probability.item(), rel=1e-5, abs=1e-37)


def test_the_registry_is_the_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    assert TRANSFORMS.keys() == TRANSFORM_KINDS.keys()
    with pytest.raises(AssertionError, match="cube is not in"):
        transforms.register("cube")
    with pytest.raises(AssertionError, match="registered twice"):
        transforms.register("lsc")
    monkeypatch.setitem(TRANSFORM_KINDS, "cube", TransformKind("reward"))
    source = Path(transforms.__file__)
    with pytest.raises(AssertionError, match="cube"):
        exec(compile(source.read_text(), source, "exec"), {"__name__": transforms.__name__})
