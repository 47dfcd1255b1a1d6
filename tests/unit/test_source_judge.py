"""A judge: what it is asked, the arithmetic of its answers, and one line for every other answer."""

from __future__ import annotations

import math
import pickle
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config_checks import typed_source
from rlhf.sources.client import Client
from rlhf.sources.judge import Judge, JudgeSource, Rubric
from rlhf.sources.kinds import source_class
from rlhf.sources.source import Batch
from rlhf.types import Prompt
from tests.servers import Clock, serving, transformers_serve
from tests.tiny import save_policy

CONF = Path(__file__).resolve().parents[2] / "conf" / "source"
KEY = "reward_models.taste"
BATCH = Batch(["What is tea?"], ["A drink."])
ABOUT = "prompt 'What is tea?', response 'A drink.'"
VERDICT = {"answer": "verdict", "scale": "verdict"}
GRADE = {"answer": "grade", "scale": "number"}


def source(**changes: Any) -> JudgeSource:
    values = yaml.safe_load((CONF / "judge.yaml").read_text())
    made = typed_source(KEY, {**values, "url": "http://127.0.0.1:1/v1", "model": "judge", **changes})
    assert isinstance(made, JudgeSource)
    return made


@contextmanager
def opened(**changes: Any) -> Iterator[Judge]:
    clock, settings = Clock(), source(**changes)
    settings.check(KEY)
    client = Client(settings.server("taste", "/chat/completions"), clock.sleep, clock)
    try:
        yield Judge(settings, client)
    finally:
        client.close()


def chat(content: str | None = "Yes", **more: Any) -> dict[str, Any]:
    message = {"role": "assistant", "content": content}
    return {
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": "stop"} | more],
    }


def likely(*tokens: tuple[Any, Any], first: tuple[str, float] | None = None) -> dict[str, Any]:
    """An answer with these first tokens and their log-probabilities; `first` is the one that was said."""
    top = [{"token": token, "logprob": logprob, "bytes": None} for token, logprob in tokens]
    said = {"token": first[0], "logprob": first[1]} if first else top[0]
    return chat(logprobs={"content": [said | {"top_logprobs": top}], "refusal": None})


def scored(came: Any, batch: Batch = BATCH, **changes: Any) -> float:
    with serving(lambda body: came) as server, opened(url=f"{server.url}/v1", **changes) as judge:
        ((reward, *_),) = judge.score(batch)
    return reward


def refusal(came: Any, **changes: Any) -> str:
    with (
        serving(lambda body: came) as server,
        opened(url=f"{server.url}/v1", **changes) as judge,
        pytest.raises(ValueError, match="reward source") as error,
    ):
        judge.score(BATCH)
    assert len(server.asked) == 1
    assert type(error.value) is ValueError
    assert "\n" not in str(error.value)
    begin = f"reward source 'taste' ({server.url}/v1/chat/completions)"
    assert str(error.value).startswith(begin)
    return str(error.value).removeprefix(begin)


# The settings


def test_the_yaml_holds_every_key_and_nothing_is_wrong_with_its_defaults():
    values = yaml.safe_load((CONF / "judge.yaml").read_text())
    assert set(values) == {f.name for f in fields(JudgeSource)}
    assert source_class(KEY, values["kind"]) is JudgeSource
    source().check(KEY)
    source(**VERDICT).check(KEY)
    source(**GRADE).check(KEY)
    source(answer="grade", scale="probability").check(KEY)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"url": None}, f"{KEY}.url is missing"),
        ({"model": None}, f"{KEY}.model is missing: give the name by which the server knows the judge"),
        ({"answer": "score"}, f"{KEY}.answer=score is not one of log_odds, verdict, grade"),
        (
            {"scale": "probability"},
            f"{KEY}.scale=probability does not fit {KEY}.answer=log_odds; set scale to log_odds",
        ),
        ({"answer": "verdict"}, f"{KEY}.scale=log_odds does not fit {KEY}.answer=verdict; set scale to verdict"),
        (
            {"answer": "grade"},
            f"{KEY}.scale=log_odds does not fit {KEY}.answer=grade; set scale to number or probability",
        ),
        (
            {"answer": "grade", "scale": "probability", "error_rate": 0.0},
            f"{KEY}.error_rate=0: the least and the best grade would be a probability of 0 and of 1",
        ),
        ({"accept": " "}, f"{KEY}.accept is empty"),
        ({"accept": "Good", "reject": "great"}, f"{KEY}.accept=Good and {KEY}.reject=great begin alike"),
        ({"accept": "Yes", "reject": " yES"}, f"{KEY}.accept=Yes and {KEY}.reject= yES begin alike"),
        (
            {"rubric": "{{ prompt }}"},
            f"{KEY}.rubric does not show the response: write {{{{ response }}}} where it is to stand",
        ),
        ({"rubric": "{{ response"}, f"{KEY}.rubric is no Jinja text: unexpected end of template"),
        ({"rubric": "rubric.txt"}, f"{KEY}.rubric=rubric.txt: No such file or directory; give a file or a Jinja"),
    ],
)  # fmt: skip
def test_settings_that_are_refused(changes, told):
    with pytest.raises(ValueError, match="^" + re.escape(told)) as error:
        source(**changes).check(KEY)
    assert "\n" not in str(error.value)


def test_identity_is_of_what_rewards_depend_on(tmp_path):
    assert source().identity() == source(timeout=1.0, concurrency=1, retries=0).identity()
    for changes in (
        {"model": "other"},
        {"rubric": "{{ response }}"},
        {"top_logprobs": 5},
        {"extra": {"seed": 1}},
    ):
        assert source().identity() != source(**changes).identity()
    path = tmp_path / "rubric.txt"
    path.write_text("{{ response }}")
    assert source(rubric=str(path)).identity() == source(rubric="{{ response }}").identity()
    assert pickle.loads(pickle.dumps(source())) == source()


# What it is asked


def test_the_request():
    rubric = "{{ prompt }} / {{ response }} / {{ truth }}"
    batch = Batch(["What is tea?"], ["A {{ drink }}."], columns={"truth": ["a drink"]})
    with serving(lambda body: likely(("Yes", -0.1), ("No", -2.4))) as server:
        with opened(url=f"{server.url}/v1/", rubric=rubric, system="Be fair.", top_logprobs=5) as judge:
            judge.score(batch)
        given = {"rubric": rubric, "extra": {"seed": 3, "max_tokens": None, "max_completion_tokens": 9}}
        with opened(url=f"{server.url}/v1", **VERDICT, **given) as judge:
            judge.score(batch)
    asked = {"role": "user", "content": "What is tea? / A {{ drink }}. / a drink"}
    assert server.bodies == [
        {
            "model": "judge",
            "messages": [{"role": "system", "content": "Be fair."}, asked],
            "temperature": 0,
            "max_tokens": 1,
            "logprobs": True,
            "top_logprobs": 5,
        },
        {"model": "judge", "messages": [asked], "temperature": 0, "max_completion_tokens": 9, "seed": 3},
    ]
    assert {one.path for one in server.asked} == {"/v1/chat/completions"}


def test_the_default_rubric_shows_prompt_and_response():
    rubric = Rubric("rubric", source().rubric)
    text = rubric.text("What is tea?", "A drink.", {}, "here")
    assert "<request>\nWhat is tea?\n</request>" in text
    assert "<answer>\nA drink.\n</answer>" in text
    assert text.endswith("Say Yes or No, one word.")


def test_what_a_rubric_may_use(tmp_path):
    path = tmp_path / "rubric.txt"
    path.write_text(
        "{{ prompt }}|{{ response }}|{% for m in messages %}{{ m.role }}={{ m.content }};{% endfor %}"
    )
    rubric = Rubric("rubric", str(path))
    system, hello = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}
    begun, said = {"role": "assistant", "content": "I "}, {"role": "assistant", "content": "Hi"}
    for content, response, text in [
        ("Hello", "Hi", "Hello|Hi|user=Hello;"),
        ([hello], "Hi", "Hello|Hi|user=Hello;"),
        ([system, hello], "Hi", "system: Be brief.\n\nuser: Hello|Hi|system=Be brief.;user=Hello;"),
        ([hello, begun], "do.", "Hello|I do.|user=Hello;"),
        ([hello], [said, hello, said], "Hello|assistant: Hi\n\nuser: Hello\n\nassistant: Hi|user=Hello;"),
        ([hello, begun], [said], "Hello|I Hi|user=Hello;"),
    ]:
        assert rubric.text(content, response, {"prompt": "a column of that name"}, "here") == text


@pytest.mark.parametrize(
    ("rubric", "told"),
    [
        (
            "{{ response }}{{ truth }}",
            "'truth' is undefined, for p.jsonl:2; it may use prompt, response, messages, n",
        ),
        ("{{ response }}{{ n.real.x.y }}", "'float object' has no attribute 'x', for p.jsonl:2;"),
        ("{{ response }}{{ 1 / (2 - n) }}", "division by zero, for p.jsonl:2;"),
        ("{{ response }}{{ ().__class__ }}", "access to attribute '__class__' of 'tuple' object is unsafe"),
    ],
)
def test_a_rubric_that_fails_names_the_key_and_the_row(rubric, told):
    prompts = [Prompt("a", {"n": 1.0, "truth": ""}, "p.jsonl:1"), Prompt("b", {"n": 2.0}, "p.jsonl:2")]
    settings = source(rubric=rubric)
    settings.check(KEY)
    with pytest.raises(ValueError, match="^" + re.escape(f"{KEY}.rubric: ")) as error:
        settings.preflight(KEY, prompts[1:])
    assert told in str(error.value)
    assert "\n" not in str(error.value)


# Log-odds


@pytest.mark.parametrize(
    ("tokens", "accept", "reject"),
    [
        ([("Yes", 0.7), ("No", 0.2)], 0.7, 0.2),
        ([("No", 0.6), ("Yes", 0.2), (" yes", 0.1), ("Y", 0.05), ("\nYES", 0.01)], 0.36, 0.6),
        ([("▁Yes", 0.5), ("ĠNo", 0.25), ("n", 0.05)], 0.5, 0.3),
        (
            [("Yes,", 0.5), ("Yes", 0.1), ("Yesterday", 0.2), ("None", 0.05), ("No.", 0.1), ("Not", 0.01)],
            0.6,
            0.1,
        ),
        ([("Yes", 0.5), ("", 0.2), (" ", 0.1), ("no", 0.1)], 0.5, 0.1),
        ([("Yes", 0.5), ("Yes", 0.2), ("No", 0.1)], 0.7, 0.1),  # two tokens that are spelled the same
        ([("Yes", 1 - 1e-12), ("No", 1e-200)], 1 - 1e-12, 1e-200),
    ],
)
def test_log_odds_by_hand(tokens, accept, reject):
    logs = [(token, math.log(p)) for token, p in tokens]
    assert scored(likely(*logs)) == pytest.approx(math.log(accept) - math.log(reject), rel=1e-12)
    assert scored(likely(*logs), accept="No", reject="Yes") == pytest.approx(
        math.log(reject / accept), rel=1e-9
    )


def test_the_token_that_was_said_counts_once():
    tokens = [("Yes", math.log(0.5)), ("No", math.log(0.25))]
    assert scored(likely(*tokens, first=tokens[0])) == pytest.approx(math.log(2))
    assert scored(likely(tokens[1], first=tokens[0])) == pytest.approx(
        math.log(2)
    )  # it may be left out of the list


def test_a_side_that_is_not_among_the_likeliest_has_the_bound(caplog):
    answers = iter(
        [likely(("Yes", -0.1), ("Well", -3.0), ("Maybe", -5.0)), likely(("Yes", -1.0), ("No", -2.0))]
    )
    with serving(lambda body: next(answers)) as server, opened(url=f"{server.url}/v1") as judge:
        assert judge.notes == []
        assert judge.score(BATCH) == [[pytest.approx(-0.1 + 5.0)]]
        assert judge.notes == [
            f"1 of 1 answers of {judge.who} had only one of 'Yes' and 'No' among their likeliest beginnings: their "
            "log-odds are bounds"
        ]
        assert judge.score(BATCH) == [[pytest.approx(1.0)]]
        assert judge.notes[0].startswith("1 of 2 answers")
    assert [record.getMessage().startswith("1 of 1 answers") for record in caplog.records] == [True]
    assert scored(likely(("Well", -0.1), ("no", -3.0), ("Maybe", -5.0))) == pytest.approx(-5.0 + 3.0)


def test_unknown_log_probabilities_are_no_small_ones():
    assert scored(likely(("Yes", -0.5), ("Well", -2.0), ("No", -9999.0))) == pytest.approx(1.5)
    assert scored(likely(("Yes", -0.5), ("No", None), ("Well", -2.0))) == pytest.approx(1.5)
    assert scored(likely(("Yes", -0.5), ("No", -math.inf), ("Well", -2.0))) == pytest.approx(1.5)


def test_what_a_server_sent():
    """The answer of llama-cpp-python 0.3.36, shortened."""
    top = {
        "No": -1.1727577447891235,
        "The": -1.5877872705459595,
        "Yes": -2.884965419769287,
        "I": -2.93608045578,
    }
    assert scored(likely(*top.items())) == pytest.approx(-2.884965419769287 + 1.1727577447891235)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        (
            likely(("The", -0.7), ("I", -1.4), ("**", -3.0)),
            ": neither 'Yes' nor 'No' is among the 3 likeliest beginnings of the judge's answer for "
            f"{ABOUT}; they are 'The' 0.5, 'I' 0.25, '**' 0.05; ask for it more clearly in the rubric, or set "
            "answer=verdict and scale=verdict",
        ),
        (
            chat(),
            f" returned no log-probabilities of the answer's first token for {ABOUT}; set answer=verdict and "
            "scale=verdict (with an error_rate), or answer=grade",
        ),
        (chat(logprobs=None), " returned no log-probabilities"),
        (chat(logprobs={"content": []}), " returned no log-probabilities"),
        (chat(logprobs={"content": None}), " returned no log-probabilities"),
        (chat(logprobs={"tokens": ["Yes"]}), " returned no log-probabilities"),
        (likely(("Yes", 0.5), ("No", -1.0)), " returned [[\"Yes\", 0.5], [\"No\", -1.0]] as log-probabilities for"),
        (likely(("Yes", "-1"), ("No", -1.0)), " returned [[\"Yes\", \"-1\"], [\"No\", -1.0]] as log-probabilities"),
        (likely(("Yes", math.nan), ("No", -1.0)), " returned [[\"Yes\", NaN], [\"No\", -1.0]] as log-probabilities"),
        (likely((7, -1.0), ("No", -1.0)), " returned [[7, -1.0], [\"No\", -1.0]] as log-probabilities"),
        (likely(("Yes", -9999.0), ("No", None)), " returned [[\"Yes\", -9999.0], [\"No\", null]] for prompt"),
        ({"choices": []}, f" returned {{\"choices\": []}} for {ABOUT}: no answer of a chat endpoint; check url"),
        ({"error": {"message": "no"}}, " returned {\"error\": {\"message\": \"no\"}} for"),
        ([1], " returned [1] for"),
        ((400, "logprobs are not supported"), " refused (status 400: 'logprobs are not supported'), asked for prompt"),
    ],
)  # fmt: skip
def test_answers_without_log_odds(answer, told):
    assert refusal(answer).startswith(told)


# Verdicts and grades


@pytest.mark.parametrize(
    ("said", "verdict"),
    [("Yes", 1), (" yes.", 1), ("YES, it is", 1), ("No", 0), ("\nno\nIt", 0), ("Yes/No", 1)],
)
def test_verdicts(said, verdict):
    assert scored(chat(said), **VERDICT) == verdict
    assert scored(chat(said), **VERDICT, accept="No", reject="Yes") == 1 - verdict


@pytest.mark.parametrize("said", ["Yesterday", "Not really", "Nothing is wrong", "Well, yes", "**Yes**", "Y"])
def test_no_verdicts(said):
    assert refusal(chat(said), **VERDICT) == (
        f" answered '{said}' for {ABOUT}: that begins with neither 'Yes' nor 'No'; ask for it more clearly in the "
        "rubric"
    )


def test_words_of_any_signs():
    given = {**VERDICT, "accept": "[[A]]", "reject": "<B+>"}
    assert scored(chat("[[A]] is it"), **given) == 1
    assert scored(chat("<b+>"), **given) == 0


@pytest.mark.parametrize(
    ("said", "grade"),
    [("7", 7), ("Grade: 8/10", 8), ("I give it 9.5 of 10.", 9.5), ("0", 0), ("10.", 10), ("**3**", 3)],
)
def test_grades(said, grade):
    assert scored(chat(said), **GRADE) == grade
    assert scored(chat(said), answer="grade", scale="probability") == pytest.approx(grade / 10)


@pytest.mark.parametrize("said", ["good", "11", "-1", "Of 100: 7"])
def test_no_grades(said):
    assert refusal(chat(said), **GRADE) == (
        f" answered '{said}' for {ABOUT}: there must be a grade from 0 to 10; ask for it more clearly in the rubric"
    )
    assert refusal(chat("0.6"), **GRADE, grade_max=0.5).startswith(" answered '0.6'")


@pytest.mark.parametrize("content", [None, "", " \n"])
def test_no_text(content):
    told = refusal(chat(content, finish_reason="length"), **VERDICT)
    assert told == (
        f" answered no text for {ABOUT} (finish_reason 'length'); raise max_tokens, or choose a judge that answers at "
        "once"
    )


# Many at once, and whatever may come


def test_the_order_is_the_batchs():
    def answer(body: Any) -> Any:
        n = int(body["messages"][-1]["content"])
        time.sleep(0.002 * (n % 5))
        return likely(("Yes", -1.0), ("No", -1.0 - n)) if n % 2 else likely(("Yes", -1.0), ("x", -1.0 - n))

    with serving(answer) as server, opened(url=f"{server.url}/v1", rubric="{{ response }}") as judge:
        assert judge.alone is False
        batches = [Batch(["n"] * 30, [str(i) for i in range(n, n + 30)]) for n in range(0, 120, 30)]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(judge.score, batches))
        assert judge.notes[0].startswith("60 of 120 answers")
    assert [list(row) for (row,) in found] == [
        [pytest.approx(i) for i in range(n, n + 30)] for n in range(0, 120, 30)
    ]


ANY = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["Yes", "No", -1.0]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=2),
    max_leaves=5,
)
TOKEN = ANY | st.fixed_dictionaries(
    {"token": ANY, "logprob": ANY}, optional={"top_logprobs": ANY | st.lists(ANY)}
)
LOGPROBS = ANY | st.fixed_dictionaries({"content": ANY | st.lists(TOKEN)})
CHOICE = ANY | st.fixed_dictionaries(
    {"message": ANY | st.fixed_dictionaries({"content": ANY})},
    optional={"logprobs": LOGPROBS, "finish_reason": ANY},
)
ANSWER = ANY | st.fixed_dictionaries({"choices": ANY | st.lists(CHOICE, min_size=1)})


@pytest.fixture(scope="module")
def readers() -> Iterator[list[Any]]:
    with opened() as one, opened(**VERDICT) as two, opened(**GRADE) as three:
        yield [judge._request(BATCH, 0).read for judge in (one, two, three)]


@given(answer=ANSWER)
def test_any_answer_is_a_reward_or_a_value_error(readers, answer):
    for read in readers:
        reward, told = None, ""
        try:
            reward = read(answer)
        except ValueError as error:
            told = str(error)
        assert (reward is not None and math.isfinite(reward)) or told.startswith("reward source 'taste' (")


# A real server


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[str, str]]:
    """`transformers serve` with a random model: its address, and the model's name."""
    pytest.importorskip("openai", reason="transformers serve needs the package openai")
    folder = str(save_policy(tmp_path_factory.mktemp("judge")))
    with transformers_serve(folder) as url:
        yield url, folder


def test_transformers_serve(served):
    """Against transformers' own greedy answer. It returns no log-probabilities."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    url, folder = served
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    responses = ["yes .", "no .", "tea and bread", "open the lock"]
    said = []
    for response in responses:
        messages = [{"role": "user", "content": f"is {response} good ?"}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")[
            "input_ids"
        ]
        out = model.generate(prompt, do_sample=False, max_new_tokens=4)
        said.append(tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).strip())
    row = next(i for i, text in enumerate(said) if text[:1].isalpha())
    word, batch = said[row].split()[0], Batch(["x"], [responses[row]])
    given = {"url": url, "model": folder, "max_tokens": 4, "rubric": "is {{ response }} good ?", **VERDICT}
    with opened(**given, accept=word, reject="/") as judge:
        assert judge.score(batch) == [[1.0]]
    with opened(**given, accept="/", reject=word) as judge:
        assert judge.score(batch) == [[0.0]]
    with (
        opened(**given, accept="/", reject=".") as judge,
        pytest.raises(ValueError, match=re.escape(repr(said[row]))),
    ):
        judge.score(batch)
    nothing = pytest.raises(ValueError, match="returned no log-probabilities of the answer's first token")
    with opened(**{**given, "answer": "log_odds", "scale": "log_odds"}) as judge, nothing:
        judge.score(batch)
