"""A function as a reward: what it is called with, and one line for each way in which it fails."""

import asyncio
import functools
import json
import time

import numpy as np
import pytest
from trl import rewards as trl_rewards

from rlhf.sources.function import FunctionRewards, FunctionSource, load_function
from rlhf.sources.source import Batch, Place, as_columns
from rlhf.types import Prompt

TALK = [{"role": "user", "content": "what is tea ?"}]
BATCH = Batch(
    ["2 + 3", "2 + 3", TALK],
    ["5", "6", "a drink"],
    [np.array([7, 1], np.int32), np.array([8], np.int32), np.array([9, 4, 1], np.int32)],
    np.array([True, False, True]),
    {"answer": ["5", "5", None], "topic": ["sum", "sum", "tea"]},
)
SEEN: dict = {}


def source(path: str, **changes) -> FunctionSource:
    values = {"kind": "function", "path": path, "arguments": {}, "timeout": 60.0, "scale": "verdict"}
    values |= {"error_rate": 0.05, "weight": 1.0, "reference": None, "canned": [], "constant": 0.0}
    values |= {"column": None, "calibration": None, "temperature": None}
    return FunctionSource(**values | changes)


def opened(function, timeout: float = 60.0, **arguments) -> FunctionRewards:
    return FunctionRewards("reward source 'rule' (here)", function, arguments, timeout)


def everything(**given):
    SEEN.clear()
    SEEN.update(given)
    return [1, 0, None]


def exact(completions, answer):
    return [None if a is None else c == a for c, a in zip(completions, answer, strict=True)]


async def later(completions, **_):
    await asyncio.sleep(0.01)
    return [float(len(c)) for c in completions]


def test_it_is_given_what_trl_gives_and_the_columns():
    rows = opened(everything, tolerance=3).score(BATCH)
    assert rows == [[1.0, 0.0, None]]
    assert SEEN == {
        "prompts": ["2 + 3", "2 + 3", TALK],
        "completions": ["5", "6", [{"role": "assistant", "content": "a drink"}]],
        "completion_ids": [[7, 1], [8], [9, 4, 1]],
        "finished": [True, False, True],
        "answer": ["5", "5", None],
        "topic": ["sum", "sum", "tea"],
        "tolerance": 3,
    }


def test_it_may_take_only_what_it_needs_and_say_that_it_does_not_apply():
    found = as_columns(opened(exact).score(BATCH))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, [[1], [0], [np.nan]])


def test_a_coroutine_function_is_awaited():
    assert opened(later).score(BATCH) == [[1.0, 1.0, 1.0]]
    assert not opened(later).alone


def test_a_reward_function_of_trl_serves_as_it_is():
    texts = ["<think>\nwhy\n</think>\n4", "4"]
    talk = [{"role": "user", "content": "2 + 2"}]
    own = opened(load_function("x", "trl.rewards:think_format_reward"))
    expected = trl_rewards.think_format_reward([[{"role": "assistant", "content": t}] for t in texts])
    assert own.score(Batch([talk, talk], texts)) == [expected] == [[1.0, 0.0]]


@pytest.mark.parametrize(
    ("function", "line"),
    [
        (lambda **_: [1, 2], "returned 2 rewards for 3 responses, the first of prompt '2 \\+ 3', response '5'"),
        (lambda **_: [1, 2, 3, 4], "returned 4 rewards for 3 responses"),
        (lambda **_: 1.0, r"returned 1.0 for 3 responses; it must return a list of numbers"),
        (lambda **_: "abc", r"returned 'abc' \(str\) for 3 responses"),
        (lambda **_: None, r"returned None \(NoneType\) for 3 responses"),
        (lambda **_: [1, float("nan"), 1], "returned nan for prompt '2 \\+ 3', response '6'; it must return a finite"),
        (lambda **_: [1, 2, "3"], r"returned '3' \(str\) for prompt 'what is tea \?', response 'a drink'"),
        (lambda **_: np.array([1, np.inf, 1]), "returned inf for prompt '2 \\+ 3', response '6'"),
        (lambda **_: [[1], [2], [3]], r"returned \[1\] \(list\) for prompt '2 \+ 3', response '5'"),
        (
            lambda completions, **_: [1 / (c != "6") for c in completions],
            "raised ZeroDivisionError: division by zero for prompt '2 \\+ 3', response '6'",
        ),
        (
            lambda completions, **_: [1.0] if len(completions) == 1 else 1 / 0,
            "raised ZeroDivisionError: division by zero for 3 responses together, .* though for none of them alone",
        ),
    ],
)  # fmt: skip
def test_each_fault_is_one_line(function, line):
    with pytest.raises(ValueError, match=rf"^reward source 'rule' \(here\) {line}") as caught:
        opened(function).score(BATCH)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_function_that_hangs_ends_in_one_line(asynchronous):
    async def stuck(**_):
        await asyncio.sleep(60)

    function = stuck if asynchronous else lambda **_: time.sleep(60)
    with pytest.raises(
        ValueError, match=r"has not returned after 0.1 s \(timeout\), for 3 responses, the first"
    ):
        opened(function, timeout=0.1).score(BATCH)


def test_a_call_after_one_that_hung_is_answered():
    calls = []

    def once(completions, **_):
        calls.append(1)
        time.sleep(60 if len(calls) == 1 else 0)
        return [1.0] * len(completions)

    source = opened(once, timeout=0.2)
    with pytest.raises(ValueError, match="has not returned"):
        source.score(BATCH)
    assert source.score(BATCH) == [[1.0, 1.0, 1.0]]


def test_a_coroutine_that_blocks_ends_too():
    async def blocks(completions, **_):
        time.sleep(60 if completions[0] != "fine" else 0)
        return [1.0] * len(completions)

    source = opened(blocks, timeout=0.2)
    with pytest.raises(ValueError, match=r"has not returned after 0.2 s"):
        source.score(BATCH)
    assert source.score(Batch(["a"], ["fine"])) == [[1.0]]


def test_a_function_that_gives_up_by_itself_is_told_as_it_says():
    def gives_up(**_):
        raise TimeoutError("the sandbox is busy")

    with pytest.raises(ValueError, match="raised TimeoutError: the sandbox is busy for prompt"):
        opened(gives_up).score(BATCH)


def test_columns_do_not_replace_what_every_function_is_given():
    batch = Batch(["a"], ["b"], columns={"completions": ["x"], "tolerance": [9]})
    opened(lambda **given: [SEEN.update(given) or 1.0], tolerance=3).score(batch)
    assert (SEEN["completions"], SEEN["tolerance"]) == (["b"], 3)


def test_numbers_beyond_float32_are_refused():
    with pytest.raises(ValueError, match=r"returned 1e\+39 for prompt"):
        opened(lambda **_: [1e39, 0, 0]).score(BATCH)


class Callable:
    def __call__(self, completions, **_):
        return [0.0] * len(completions)


an_object, a_part = Callable(), functools.partial(exact, answer=["5"])


@pytest.mark.parametrize("name", ["an_object", "a_part"])
def test_whatever_can_be_called_serves(name):
    found = source(f"tests.unit.test_source_function:{name}")
    json.dumps(found.identity())
    assert found.open("rule", Place()).score(Batch(["a"], ["b"])) == [[0.0]]


def test_texts_that_were_not_sampled_have_no_tokens():
    found = source("rlhf.penalties:overlong", arguments={"limit": 9, "buffer": 3}, scale="number")
    with pytest.raises(ValueError, match="takes 'completion_ids', which texts that are not sampled here"):
        found.check_texts(KEY, pairs=False)
    own = source("tests.unit.test_source_function:exact")
    own.check_texts(KEY, pairs=False)
    with pytest.raises(ValueError, match="takes 'answer', which pairs to calibrate on do not have"):
        own.check_texts(KEY, pairs=True)


def test_nothing_to_score_calls_nothing():
    assert opened(lambda **_: 1 / 0).score(Batch([], [])) == [[]]


def test_a_file_is_loaded_with_its_neighbours(tmp_path):
    (tmp_path / "neighbour_of_rule.py").write_text("LENGTH = 3\n")
    (tmp_path / "rule.py").write_text(
        "from neighbour_of_rule import LENGTH\n\ndef long(completions, **_):\n"
        "    return [len(c) > LENGTH for c in completions]\n"
    )
    path = f"{tmp_path}/rule.py:long"
    assert source(path).open("rule", Place()).score(BATCH.part([0, 1])) == [[0.0, 0.0]]


def test_the_name_of_what_it_makes_changes_with_its_text_and_arguments(tmp_path):
    file = tmp_path / "named.py"
    file.write_text("def f(**_): return []\n")
    first = source(f"{file}:f")
    before = json.dumps(first.identity())
    assert json.dumps(source(f"{file}:f", weight=2.0, error_rate=0.1).identity()) == before
    assert json.dumps(source(f"{file}:f", arguments={"a": 1}).identity()) != before
    file.write_text("def f(**_): return [1]\n")
    assert json.dumps(first.identity()) != before


KEY = "reward_models.rule"
ROWS = [Prompt("a", {"answer": "b"}, "p.jsonl:1"), Prompt("b", {"answer": "c", "extra": 1}, "p.jsonl:2")]


@pytest.mark.parametrize(
    ("path", "line"),
    [
        (
            "no.such.module:f",
            rf"{KEY}.path=no.such.module:f: no.such.module cannot be imported: ModuleNotFound",
        ),
        ("nowhere.py:f", rf"{KEY}.path=nowhere.py:f: .* there is no such file"),
        ("json:nothing", rf"{KEY}.path=json:nothing: json has no function 'nothing'"),
    ],
)
def test_a_function_that_is_not_there_is_refused(path, line):
    with pytest.raises(ValueError, match=line):
        source(path).preflight(KEY, ROWS)


def test_a_file_that_fails_at_import_is_refused(tmp_path):
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(
        ValueError, match=r"broken.py cannot be imported: ZeroDivisionError: division by zero"
    ):
        source(f"{tmp_path}/broken.py:f").preflight(KEY, ROWS)


def test_an_argument_that_no_prompt_brings_is_refused(tmp_path):
    file = tmp_path / "takes.py"
    file.write_text("def f(completions, answer, extra, *, limit=3): return []\ndef g(x, /): return []\n")
    with pytest.raises(
        ValueError, match=rf"{KEY}.path=.*:f takes 'extra', which is no column that every prompt"
    ):
        source(f"{file}:f").preflight(KEY, ROWS)
    source(f"{file}:f", arguments={"extra": 1}).preflight(KEY, ROWS)
    source(f"{file}:f").preflight(KEY, ROWS[1:])
    with pytest.raises(ValueError, match="its argument 'x' is positional only"):
        source(f"{file}:g").preflight(KEY, ROWS)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"path": None}, rf"{KEY}.path=None must be package.module:function or file.py:function"),
        ({"path": "module"}, rf"{KEY}.path=module must be"),
        (
            {"arguments": {"prompts": 1}},
            rf"{KEY}.arguments.prompts: 'prompts' is what every function is given",
        ),
        ({"scale": None}, rf"{KEY}.scale is missing: say what its numbers mean, bradley_terry \("),
        ({"scale": "score"}, rf"{KEY}.scale=score is not one of bradley_terry, log_odds"),
        ({"error_rate": 0.0}, rf"{KEY}.error_rate=0: a verdict that is never wrong"),
        ({"reference": "quantile"}, rf"{KEY}.reference=quantile: a quantile of verdicts is no reference"),
        (
            {"scale": "log_odds", "reference": "mean"},
            rf"{KEY}.reference=mean: .*scale=log_odds says P\(good\)",
        ),
        ({"temperature": 2.0}, rf"{KEY}.temperature=2.0 is for scale=bradley_terry, not verdict"),
        ({"calibration": "p.jsonl"}, rf"{KEY}.calibration is for scale=bradley_terry, not verdict"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, line):
    with pytest.raises(ValueError, match=f"^{line}"):
        source(**{"path": "json:dumps"} | changes).check(KEY)
