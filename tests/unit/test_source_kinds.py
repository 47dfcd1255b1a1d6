"""A source is a line on the command line; what is none is refused by name."""

import sys
from importlib import metadata

import pytest
from hydra import compose, initialize_config_module

from rlhf import plugins
from rlhf.config_checks import typed
from rlhf.sources import kinds
from rlhf.sources.source import Source

GIVEN = ["data=files", "data.prompts=p.jsonl", "policy.path=p", "reward_models=none"]
KINDS = sorted(kinds.KINDS)
OTHER = """
from dataclasses import dataclass
from rlhf.sources.source import Source

@dataclass(kw_only=True)
class Constant(Source):
    value: float = 1.0

class NoSource: ...
"""


def composed(*overrides: str):
    with initialize_config_module("conf", version_base=None):
        return typed(compose("config", overrides=[*GIVEN, *overrides]))


def test_a_further_source_is_a_line():
    found = composed("+source@reward_models.brief=classifier", "reward_models.brief.path=my/rm")
    assert found.reward_models["brief"].path == "my/rm"
    found = composed("+source@reward_models.rule=function", "reward_models.rule.path=json:dumps",
                     "reward_models.rule.scale=verdict")  # fmt: skip
    assert found.reward_models["rule"].timeout == 60


def test_the_defaults_stay_beside_a_further_source():
    with initialize_config_module("conf", version_base=None):
        given = ["+source@reward_models.brief=classifier", "reward_models.brief.path=my/rm"]
        found = typed(compose("config", overrides=given))
    assert list(found.reward_models) == ["helpful", "harmless", "brief"]
    assert found.reward_models["helpful"].training.steps == 600


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_yaml_with_all_its_keys(kind):
    from dataclasses import fields

    from omegaconf import OmegaConf

    from tests.unit.test_layering import ROOT

    given = OmegaConf.load(ROOT / f"conf/source/{kind}.yaml")
    assert set(given) == {f.name for f in fields(kinds.source_class("key", kind))}
    assert given.kind == kind


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (["+reward_models.a={path: x}"], r"reward_models.a.kind is missing: begin with a source of conf/source"),
        (["+reward_models.a=x"], "configuration key 'reward_models.a' must be a group of keys, and is 'x'"),
        (["+reward_models.a={kind: magic}"], "reward_models.a.kind=magic is not one of classifier, function, http"),
        (["+reward_models.a={kind: classifier}"], "configuration key 'reward_models.a.scale' is missing"),
        (["+reward_models.a={kind: 'no.where:C'}"], "reward_models.a.kind=no.where:C cannot be imported"),
        (["+reward_models.a={kind: 'json:JSONDecoder'}"], "reward_models.a.kind=.* is no subclass of rlhf.sources"),
        (
            ["+source@reward_models.a=classifier", "+reward_models.a.wieght=2"],
            "configuration key 'reward_models.a.wieght': Key 'wieght' not in 'ClassifierSource'",
        ),
        (
            ["+source@reward_models.a=classifier", "reward_models.a.weight=much"],
            "configuration key 'reward_models.a.weight': Value 'much' of type 'str' could not be converted to Float",
        ),
        ([], "reward_models is empty: give at least one"),
    ],
)  # fmt: skip
def test_what_is_no_source_is_refused(overrides, line):
    with pytest.raises(ValueError, match=line):
        composed(*overrides)


@pytest.fixture
def other(tmp_path, monkeypatch):
    (tmp_path / "their_rewards.py").write_text(OTHER)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("their_rewards", None)


GIVEN_KEYS = (
    "scale: number, error_rate: 0, weight: 1, reference: null, canned: [], constant: 0, column: null, "
)
GIVEN_KEYS += "calibration: null, temperature: null"


def test_a_kind_of_another_package_by_its_place(other):
    kind = "{kind: 'their_rewards:Constant', value: 3, " + GIVEN_KEYS + "}"
    found = composed(f"+reward_models.a={kind}", "utility=linear").reward_models["a"]
    assert (type(found).__name__, found.value, found.weight) == ("Constant", 3.0, 1.0)


def test_a_kind_of_another_package_by_its_entry_point(other, monkeypatch):
    points = [metadata.EntryPoint("constant", "their_rewards:Constant", kinds.GROUP)]
    monkeypatch.setattr(plugins, "entry_points", lambda group: points if group == kinds.GROUP else [])
    assert issubclass(kinds.source_class("key", "constant"), Source)
    with pytest.raises(
        ValueError, match=r"key.kind=other is not one of classifier, function, http, judge, constant"
    ):
        kinds.source_class("key", "other")
