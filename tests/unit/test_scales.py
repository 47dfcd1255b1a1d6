"""Rewards of every scale as probabilities, against arithmetic by hand; and terms that do not apply."""

import itertools
import math

import numpy as np
import pytest

from rlhf.sources.answers import misfit
from rlhf.types import Ragged, Rollouts
from rlhf.utility.kinds import TRANSFORM_KINDS, check_utility
from rlhf.utility.pipeline import Utility
from rlhf.utility.prompt_references import PromptReferences
from rlhf.utility.scales import Scale

PARAMETERS = {
    "clip": {"low": -2.0, "high": 2.0},
    "tanh": {"scale": 2.0},
    "inada": {"scale": 1.0, "aversion": 2.0},
}
EPS = 0.1


def references(r_ref, samples) -> PromptReferences:
    """Of prompts with these samples each, [G][K]."""
    samples = np.array(samples, np.float32)
    stats = (samples.mean(1), samples.std(1, ddof=1), samples.min(1), samples.max(1))
    r_ref = np.array(r_ref, np.float32)
    return PromptReferences(
        r_ref, np.zeros_like(r_ref), *stats, np.sort(samples, 1), float(samples.mean()), float(samples.std())
    )


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


SCALES = {
    "bt": Scale("bradley_terry", temperature=2.0),
    "odds": Scale("log_odds"),
    "share": Scale("probability", EPS),
    "verdict": Scale("verdict", EPS),
}
RAW = {"bt": [3.0, -1.0], "odds": [0.5, -4.0], "share": [0.25, 1.0], "verdict": [1.0, 0.0]}
BASE = {"bt": [0.0, 1.0, 5.0], "odds": [-1.0, 0.0, 2.0], "share": [0.2, 0.5, 0.9], "verdict": [0, 1, 1]}
R_REF = {"bt": 1.0, "odds": 0.0, "share": 0.5, "verdict": 0.5}
REFERENCES = {n: references([R_REF[n]], [BASE[n]]) for n in SCALES}
GROUP = np.zeros(2, np.int64)


def good(name: str, reward: float) -> float:
    """P(good), by hand."""
    if name == "bt":
        return sigmoid((reward - R_REF["bt"]) / 2)
    return sigmoid(reward) if name == "odds" else EPS + (1 - 2 * EPS) * reward


def utility(transform: str, combine: str, names=tuple(SCALES), scales=SCALES) -> Utility:
    return Utility(
        transform,
        combine,
        PARAMETERS.get(transform, {}),
        dict.fromkeys(names, 1.0),
        {n: scales[n] for n in names},
    )


def matrix(names=tuple(SCALES)) -> np.ndarray:
    return np.array([RAW[n] for n in names], np.float32).T


def test_lsc_of_every_scale_is_the_log_of_its_probability_and_they_add_up():
    found = utility("lsc", "and").combined(matrix(), REFERENCES, GROUP)
    expected = [sum(math.log(good(n, RAW[n][i])) for n in SCALES) for i in range(2)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_an_expression_mixes_them():
    found = utility("sigmoid", "(bt | ~odds) & share & ~verdict").combined(matrix(), REFERENCES, GROUP)
    for i in range(2):
        bt, odds, share, verdict = (good(n, RAW[n][i]) for n in SCALES)
        expected = (1 - (1 - bt) * odds) * share * (1 - verdict)
        assert found[i] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("transform", sorted(TRANSFORM_KINDS))
@pytest.mark.parametrize("name", SCALES)
def test_a_transform_takes_log_odds_or_the_number_as_it_is(transform, name):
    """Against the same transform of Bradley-Terry rewards whose difference from r_ref are these log-odds."""

    def odds(reward):
        p = good(name, reward)
        return math.log(p / (1 - p))

    raw, base = RAW[name], BASE[name]
    if name == "bt":
        mapped, given, r_ref = ([x / 2 for x in values] for values in (raw, base, [R_REF[name]]))
    elif TRANSFORM_KINDS[transform].of_log_odds:
        mapped, given, r_ref = [odds(x) for x in raw], [odds(x) for x in base], [0.0]
    else:
        mapped, given, r_ref = raw, base, [R_REF[name]]
    plain = utility(transform, "weighted_sum", (name,), {name: Scale("bradley_terry")})
    expected = plain.combined(np.array([mapped], np.float32).T, {name: references(r_ref, [given])}, GROUP)
    found = utility(transform, "weighted_sum", (name,)).combined(matrix((name,)), REFERENCES, GROUP)
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_p_good_reference_and_slope_are_told():
    rollouts = Rollouts(
        0, 0, 0, 1.0, ("p",), np.array([5], np.uint64), Ragged.of([[1]], np.int32), GROUP,
        Ragged.of([[1], [2]], np.int32), np.zeros(2, np.float32), np.zeros(2, np.int32), np.ones(2, bool),
        ("a", "b"),
    )  # fmt: skip
    scales = SCALES | {"size": Scale("number")}
    raw = np.concatenate([matrix(), [[7.0], [9.0]]], 1).astype(np.float32)
    given = REFERENCES | {"size": references([8.0], [[6.0, 8.0, 10.0]])}
    names = tuple(scales)
    found = utility("linear", "weighted_sum", names, scales).rewards(rollouts, raw, given)
    for i, (column, name) in itertools.product(range(2), enumerate(SCALES)):
        assert found.p_good[i, column] == pytest.approx(good(name, RAW[name][i]), rel=1e-5)
    assert np.isnan(found.p_good[:, 4]).all()
    np.testing.assert_allclose(found.reference[0], [1.0, 0.0, 0.5, 0.5, 8.0])
    np.testing.assert_allclose(found.slope[0], [0.5, 1, 1, 1, 1])  # 1 / temperature


@pytest.mark.parametrize(
    "combine", ["and", "or", "min", "softmin", "weighted_sum", "bt & odds & ~share & verdict"]
)
def test_slopes_are_those_of_finite_differences_whatever_applies(combine):
    own = Utility(
        "lsc",
        combine,
        {"temperature": 0.7} if combine == "softmin" else {},
        dict.fromkeys(SCALES, 1.0),
        SCALES,
    )
    raw = matrix()[:1] * 0.9 + 0.03
    for absent in ([], [0], [3], [1, 2]):
        at = raw.copy()
        at[:, absent] = np.nan
        slope = own.slope(at, REFERENCES, GROUP[:1])
        for column in range(4):
            if column in absent:
                assert slope[0, column] == 0
                continue
            step = np.zeros_like(at)
            step[0, column] = 1e-2
            up, down = (own.combined(at + s, REFERENCES, GROUP[:1]).astype(np.float64) for s in (step, -step))
            assert slope[0, column] == pytest.approx(float(up[0] - down[0]) / 2e-2, rel=2e-2, abs=2e-3)


@pytest.mark.parametrize("transform", ["lsc", "sigmoid"])
@pytest.mark.parametrize("combine", ["and", "or", "min", "weighted_sum", "softmin", "product"])
def test_what_does_not_apply_is_as_if_it_were_not_there(transform, combine):
    if combine == "product" and transform == "lsc":
        return
    parameters = {"temperature": 0.7} if combine == "softmin" else {}
    for absent in ("bt", "verdict"):
        left = [n for n in SCALES if n != absent]
        whole = Utility(transform, combine, parameters, dict.fromkeys(SCALES, 1.0), SCALES)
        part = Utility(transform, combine, parameters, dict.fromkeys(left, 1.0), {n: SCALES[n] for n in left})
        raw = matrix()
        raw[:, list(SCALES).index(absent)] = np.nan
        found = whole.combined(raw, REFERENCES, GROUP)
        np.testing.assert_allclose(found, part.combined(matrix(left), REFERENCES, GROUP), rtol=1e-6)


@pytest.mark.parametrize(
    ("absent", "rest"),
    [
        ("bt", "~odds & (share | verdict)"),
        ("odds", "bt & (share | verdict)"),
        ("share", "bt & ~odds & verdict"),
        ("share verdict", "bt & ~odds"),
        ("bt odds", "share | verdict"),
        ("bt odds share", "verdict"),
    ],
)
def test_an_expression_loses_the_leaves_that_do_not_apply(absent, rest):
    whole = utility("lsc", "bt & ~odds & (share | verdict)")
    left = [n for n in SCALES if n not in absent.split()]
    raw = matrix()
    raw[:, [list(SCALES).index(n) for n in absent.split()]] = np.nan
    found = whole.combined(raw, REFERENCES, GROUP)
    expected = utility("lsc", rest, left).combined(matrix(left), REFERENCES, GROUP)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_prompts_differ_in_what_applies():
    """Two prompts: a reward that applies to one of them has no samples of the other, which no z-score then asks for."""
    raw = np.array([[1.0, np.nan], [3.0, np.nan], [1.0, 0.0], [2.0, 1.0]], np.float32)
    nan = np.nan
    one = references([0.0, 0.0], [[0.0, 2.0], [0.0, 4.0]])
    other = PromptReferences(*(np.array([nan, v], np.float32) for v in (0.5, 0.0, 0.5, 0.7, 0.0, 1.0)),
                             np.array([[nan, nan], [0.0, 1.0]], np.float32), 0.5, 0.7)  # fmt: skip
    group = np.array([0, 0, 1, 1])
    own = Utility("zscore", "weighted_sum", {}, {"a": 1.0, "b": 1.0}, {"b": Scale("verdict", EPS)})
    found = own.combined(raw, {"a": one, "b": other}, group)
    std, other_std = math.sqrt(2), 0.7
    expected = [0, 2 / std, (1 - 2) / (2 * std) - 0.5 / other_std, 0 + 0.5 / other_std]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


def test_a_reward_that_says_none_of_some_responses_only_is_refused():
    raw = matrix()
    raw[0, 3] = np.nan
    with pytest.raises(
        ValueError, match=r"reward model verdict, prompt 'who\?': it says of some responses that it"
    ):
        utility("lsc", "and").combined(raw, REFERENCES, GROUP, ["who?"])


def test_a_reward_that_applies_where_it_did_not_before_is_refused():
    given = REFERENCES | {"bt": references([np.nan], [[0.0, 1.0]])}
    with pytest.raises(
        ValueError, match=r"reward model bt, prompt 'who\?': it applies to this response, and said of"
    ):
        utility("lsc", "and").combined(matrix(), given, GROUP, ["who?"])


def test_a_prompt_to_which_nothing_applies_is_refused():
    with pytest.raises(
        ValueError, match=r"prompt 'who\?': no reward applies to it \(all of bt, odds, share, verdict"
    ):
        utility("lsc", "and").combined(np.full((2, 4), np.nan), REFERENCES, GROUP, ["who?"])


@pytest.mark.parametrize("transform", ["lsc", "log_sigmoid", "sigmoid", "par"])
def test_a_number_has_no_probability(transform):
    line = rf"reward_models.size.scale=number has no P\(good\), which utility.transform={transform} takes"
    with pytest.raises(ValueError, match=line):
        check_utility(transform, "weighted_sum", {}, {"size": 1.0}, {"size": "number"})
    check_utility("quantile_rank", "and", {}, {"size": 1.0}, {"size": "number"})
    check_utility("zscore", "weighted_sum", {}, {"size": 1.0}, {"size": "number"})


@pytest.mark.parametrize(
    ("scale", "reward", "fault"),
    [
        (Scale("verdict", EPS), 0.5, "a verdict is 0 or 1"),
        (Scale("probability", EPS), 1.5, "a probability lies within"),
        (Scale("probability"), 1.0, "with error_rate=0 the log of a probability of 0 or 1"),
        (Scale("probability"), 0.5, None),
        (Scale("verdict", EPS), 1.0, None),
        (Scale("number"), 1e9, None),
    ],
)
def test_what_is_not_of_a_scale(scale, reward, fault):
    found = misfit(scale, np.array([0.5 if scale.kind == "probability" else 1.0, np.nan, reward]))
    assert found is fault is None or (found[0] == 2 and found[1].startswith(fault))
