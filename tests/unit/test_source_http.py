"""A reward server: what is sent, what may come back, and one line for everything else that comes back."""

from __future__ import annotations

import asyncio
import gc
import pickle
import random
import re
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

import rlhf.sources.client
from rlhf.config_checks import typed_source
from rlhf.sources.client import Client
from rlhf.sources.http import PROTOCOLS, HttpRewards, HttpSource
from rlhf.sources.kinds import source_class
from rlhf.sources.source import Batch, Place
from rlhf.types import Prompt
from tests.servers import Clock, free_port, serving, speaking
from tests.tiny import TEMPLATE, tokenizer

CONF = Path(__file__).resolve().parents[2] / "conf" / "source"
KEY = "reward_models.brief"
TOKEN = "s3cr3t-t0ken-of-mine"
BATCH = Batch(["What is tea?", "What is tea?", "Is bread good?"], [" A drink.", " A lock.", " Yes."])
ABOUT = "prompt 'What is tea?', response ' A drink.'"
ASKED = f"asked for 3 responses, the first of {ABOUT}"
HELLO = [{"role": "user", "content": "Hello"}]


def source(**changes: Any) -> HttpSource:
    values = yaml.safe_load((CONF / "http.yaml").read_text())
    made = typed_source(KEY, {**values, "protocol": "openrlhf", "scale": "bradley_terry", **changes})
    assert isinstance(made, HttpSource)
    return made


@contextmanager
def opened(clock: Clock | None = None, **changes: Any) -> Iterator[HttpRewards]:
    clock, settings = clock or Clock(), source(**changes)
    settings.check(KEY)
    client = Client(settings.server("brief"), clock.sleep, clock)
    try:
        yield HttpRewards(settings, client)
    finally:
        client.close()


def scored(url: str, batch: Batch = BATCH, clock: Clock | None = None, **changes: Any) -> list[float | None]:
    with opened(clock, url=url, **changes) as rewards:
        (row,) = rewards.score(batch)
    return list(row)


def refusal(url: str, batch: Batch = BATCH, clock: Clock | None = None, **changes: Any) -> str:
    """The one line, without its beginning "reward source 'brief' (url) "."""
    with (
        opened(clock, url=url, **changes) as rewards,
        pytest.raises(ValueError, match="reward source") as error,
    ):
        rewards.score(batch)
    told = str(error.value)
    assert type(error.value) is ValueError
    assert "\n" not in told
    assert error.value.__cause__ is None
    begin = f"reward source 'brief' ({url}) "
    assert told.startswith(begin), told
    return told.removeprefix(begin)


# The settings


def test_the_yaml_holds_every_key_and_nothing_is_wrong_with_its_defaults():
    values = yaml.safe_load((CONF / "http.yaml").read_text())
    assert set(values) == {f.name for f in fields(HttpSource)}
    assert source_class(KEY, values["kind"]) is HttpSource
    source(url="http://127.0.0.1:1/x").check(KEY)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"scale": None}, f"{KEY}.scale is missing"),
        ({"url": None}, f"{KEY}.url is missing: give the server's address, as in http://127.0.0.1:8000/..."),
        (
            {"url": "localhost:8000"},
            f"{KEY}.url=localhost:8000 is no address of the form http://host:port/path",
        ),
        ({"url": "ftp://host/x"}, f"{KEY}.url=ftp://host/x is no address"),
        ({"url": "http:///x"}, f"{KEY}.url=http:///x is no address"),
        ({"url": "http://host:99999/x"}, f"{KEY}.url=http://host:99999/x is no address"),
        ({"url": "http://ho st/x"}, f"{KEY}.url=http://ho st/x is no address"),
        ({"url": "me:word@host"}, f"{KEY}.url="),
        (
            {"url": "http://me:word@host/x", "token_env": "T"},
            f"{KEY}.url has a user's name and {KEY}.token_env a token; give one of them",
        ),
        ({"protocol": None}, f"{KEY}.protocol is missing: give one of openrlhf, classify, score, rlhf"),
        ({"protocol": "grpc"}, f"{KEY}.protocol=grpc is not one of openrlhf, classify, score, rlhf"),
        ({"field": "extra_logs"}, f"{KEY}.field=extra_logs is not one of rewards, scores"),
        ({"model": "m"}, f"{KEY}.model is for protocol=classify or score, not openrlhf; set it to null"),
        ({"reward": "brief"}, f"{KEY}.reward is for protocol=rlhf, not openrlhf; set it to null"),
        (
            {"protocol": "rlhf", "chat_template": "hh"},
            f"{KEY}.chat_template is for protocol=openrlhf or classify or score, not rlhf; set it to null",
        ),
        (
            {"chat_template": "no/such.jinja"},
            f"{KEY}.chat_template=no/such.jinja: No such file or directory; give a file or a Jinja text",
        ),
    ],
)
def test_settings_that_are_refused(changes, told):
    with pytest.raises(ValueError, match="^" + re.escape(told)) as error:
        source(**{"url": "http://host/x", **changes}).check(KEY)
    assert "\n" not in str(error.value)


def test_numbers_have_a_range():
    assert HttpSource.ranges["batch_size"].refusal(0) == "must be above 0"
    numbers = {f.name for f in fields(HttpSource) if f.type in ("int", "float", "float | None")}
    assert numbers == set(HttpSource.ranges)


def test_identity_is_of_what_rewards_depend_on(tmp_path):
    def identity(**changes):
        return source(url="http://host/x", **changes).identity()

    assert identity() == identity(
        timeout=1.0, retries=0, backoff=9.0, concurrency=1, batch_size=1, token_env="T"
    )
    assert identity() != identity(extra={"use_activation": False})
    assert identity() == source(url="http://me:word@host/x").identity()
    assert identity() != source(url="http://host/x?model=other").identity()
    assert "word" not in str(source(url="http://me:word@host/x?key=1").identity())
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages }}")
    before = identity(chat_template=str(path))
    path.write_text("{{ messages[0] }}")
    assert before == identity(chat_template="{{ messages }}") != identity(chat_template=str(path))


def test_settings_travel():
    settings = source(url="http://host/x", extra={"a": [1]})
    assert pickle.loads(pickle.dumps(settings)) == settings


# What is sent, and what is read


def test_openrlhf():
    with serving(lambda body: {"rewards": [1, -0.5, None], "scores": [0, 1, 1], "extra_logs": {}}) as server:
        assert scored(server.url) == [1.0, -0.5, None]
        labelled = Batch(BATCH.prompts, BATCH.responses, columns={"truth": ["a", np.float32(2), None]})
        assert scored(server.url, labelled, field="scores", labels_column="truth") == [0.0, 1.0, 1.0]
    query = ["What is tea? A drink.", "What is tea? A lock.", "Is bread good? Yes."]
    assert server.bodies == [
        {"query": query, "prompts": list(BATCH.prompts), "labels": ["", "", ""]},
        {"query": query, "prompts": list(BATCH.prompts), "labels": ["a", 2.0, None]},
    ]
    assert server.asked[0].headers["Content-Type"] == "application/json"
    assert "Authorization" not in server.asked[0].headers


def test_a_column_that_is_not_there_is_told():
    missing = pytest.raises(ValueError, match=r"labels_column=truth: there is no such column beside prompt")
    with opened(url="http://127.0.0.1:1", labels_column="truth") as rewards, missing:
        rewards.score(BATCH)
    prompts = [Prompt("a", {"truth": 1}, "p.jsonl:1"), Prompt("b", {}, "p.jsonl:2")]
    with pytest.raises(ValueError, match=rf"^{KEY}.labels_column=truth: p.jsonl:2 has no such column$"):
        source(labels_column="truth").preflight(KEY, prompts)


def test_classify_takes_answers_in_any_order():
    rows = [{"index": i, "label": "x", "probs": [0.1 * i, 1 - 0.1 * i], "num_classes": 2} for i in (2, 0, 1)]
    with serving(lambda body: {"object": "list", "data": rows}) as server:
        assert scored(server.url + "/classify", protocol="classify") == pytest.approx([0.0, 0.1, 0.2])
        assert scored(
            server.url, protocol="classify", label=1, model="rm", extra={"use_activation": False}
        ) == pytest.approx([1.0, 0.9, 0.8])
    texts = ["What is tea? A drink.", "What is tea? A lock.", "Is bread good? Yes."]
    assert server.bodies == [{"input": texts}, {"input": texts, "model": "rm", "use_activation": False}]
    assert server.asked[0].path == "/classify"


def test_score():
    rows = [{"index": 1, "object": "score", "score": 0.25}, {"index": 0, "object": "score", "score": 1}]
    with serving(lambda body: {"data": rows}) as server:
        assert scored(server.url, BATCH.part([0, 1]), protocol="score", model="rm") == [1.0, 0.25]
    assert server.bodies == [
        {"model": "rm", "text_1": ["What is tea?"] * 2, "text_2": [" A drink.", " A lock."]}
    ]


def test_score_of_messages_and_several_turns():
    turns = [{"role": "assistant", "content": "Hi"}, {"role": "user", "content": "Yes?"}]
    with serving(lambda body: {"data": [{"index": 0, "score": 1}, {"index": 1, "score": 0}]}) as server:
        batch = Batch([HELLO, HELLO], ["Hi", [*turns, turns[0]]])
        assert scored(server.url, batch, protocol="score", chat_template="hh") == [1.0, 0.0]
    assert server.bodies[0]["text_1"] == ["\n\nHuman: Hello"] * 2
    assert server.bodies[0]["text_2"] == ["Hi", "assistant: Hi\n\nuser: Yes?\n\nassistant: Hi"]


def native(body: Any) -> dict[str, Any]:
    """A server of rewards: a response's length, of prompts without a column `skip`."""
    return {
        "results": [
            {"raw": {"length": [None if c["columns"].get("skip") else len(r) for r in c["responses"]]}}
            for c in body["conversations"]
        ],
        "version": 1,
    }


def test_rlhf_sends_the_responses_of_a_prompt_together():
    batch = Batch(
        [HELLO, HELLO, "Plain", "Plain", "Plain"],
        ["a", "bb", "ccc", "dddd", "e"],
        columns={"skip": [False, False, False, False, True], "n": [*np.arange(5) // 2]},
    )
    with serving(native) as server:
        assert scored(server.url, batch, protocol="rlhf") == [1.0, 2.0, 3.0, 4.0, None]
        assert scored(server.url, batch, protocol="rlhf", reward="length", batch_size=3)[:4] == [
            1.0,
            2.0,
            3.0,
            4.0,
        ]
    assert server.bodies[0] == {
        "raw_only": True,
        "conversations": [
            {"prompt": HELLO, "responses": ["a", "bb"], "columns": {"skip": False, "n": 0}},
            {"prompt": "Plain", "responses": ["ccc", "dddd"], "columns": {"skip": False, "n": 1}},
            {"prompt": "Plain", "responses": ["e"], "columns": {"skip": True, "n": 2}},
        ],
    }
    assert sorted(len(body["conversations"]) for body in server.bodies[1:]) == [2, 2]


@pytest.mark.parametrize(
    ("raw", "reward", "told"),
    [
        ({"a": [1], "b": [2]}, None, "returned several rewards (a, b); set reward to one of them"),
        ({"a": [1]}, "b", "returned {\"a\": [1]}: there is no 'b'; is protocol=rlhf what it speaks?"),
        (
            {"a": [1, 2]},
            "a",
            f"returned 2 of 'a' for 1 responses, the first of {ABOUT}; it must return one for each",
        ),
        ({"a": 1}, "a", f"returned 'a' 1 for 1 responses, the first of {ABOUT}; it must return one for each"),
        ([1], None, "returned several rewards ([1]); set reward to one of them"),
        (
            {"a": ["x"]},
            None,
            f"returned 'x' (str) for {ABOUT}; it must return a finite number, or None where it",
        ),
    ],
)
def test_rlhf_answers_that_are_refused(raw, reward, told):
    with serving(lambda body: {"results": [{"raw": raw}]}) as server:
        assert refusal(server.url, BATCH.part([0]), protocol="rlhf", reward=reward).startswith(told)


# Messages as text


def test_templates_are_rendered_as_transformers_does():
    begun = [{"role": "user", "content": "I would "}, {"role": "assistant", "content": "I would "}]
    several = [{"role": "system", "content": "Be brief."}, *HELLO]
    batch = Batch([HELLO, several, begun], ["Hi", "Yes", "say so"])
    with serving(lambda body: {"rewards": [0, 0, 0]}) as server:
        assert scored(server.url, batch, chat_template=TEMPLATE) == [0.0] * 3
    tiny = tokenizer()

    def rendered(messages: list[dict[str, str]], **options: bool) -> str:
        return tiny.apply_chat_template(messages, tokenize=False, **options)

    assert server.bodies[0]["prompts"] == [
        rendered(HELLO, add_generation_prompt=True),
        rendered(several, add_generation_prompt=True),
        rendered(begun, continue_final_message=True),
    ]
    assert server.bodies[0]["query"] == [
        rendered([*HELLO, {"role": "assistant", "content": "Hi"}]),
        rendered([*several, {"role": "assistant", "content": "Yes"}]),
        rendered([begun[0], {"role": "assistant", "content": "I would say so"}]),
    ]


def test_a_template_of_a_file_and_a_transcript(tmp_path):
    path = tmp_path / "chat.jinja"
    path.write_text("{% for m in messages %}[{{ m.role }}]{{ m['content'] | tojson }}{% endfor %}")
    with serving(lambda body: {"rewards": [0]}) as server:
        scored(server.url, Batch([HELLO], ['"Hé"']), chat_template=str(path))
        scored(server.url, Batch([HELLO], ["Hi"]), chat_template="hh")
    assert [body["query"] for body in server.bodies] == [
        ['[user]"Hello"[assistant]"\\"Hé\\""'],
        ["\n\nHuman: Hello\n\nAssistant: Hi"],
    ]


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            None,
            "the prompts are messages; set CHAT to a Jinja template, a file that holds one, or",
        ),
        ("{{ messages", "the chat template failed (unexpected end of template"),
        ("{{ raise_exception('no such role') }}", "the chat template failed (no such role)"),
        ("{{ 1 / 0 }}{{ messages }}", "the chat template failed (ZeroDivisionError: division by zero)"),
        (
            "{{ messages[0].content }}{{ ().__class__.__mro__ }}",
            "the chat template failed (access to attribute",
        ),
        ("{{ messages.append(1) }}", "the chat template failed (access to attribute 'append'"),
        (
            "{% if 0 %}{{ messages }}{% endif %}x",
            "the chat template leaves out the message of the role 'user'",
        ),
    ],
)
def test_templates_that_fail_name_the_key_and_the_row(template, told):
    settings = source(url="http://host/x", chat_template=template)
    with pytest.raises(
        ValueError, match="^" + re.escape(f"p.jsonl:7: {KEY}: {told}".replace("CHAT", f"{KEY}.chat_template"))
    ) as error:
        settings.preflight(KEY, [Prompt("plain", source="p.jsonl:1"), Prompt(HELLO, source="p.jsonl:7")])
    assert f"{KEY}.chat_template" in str(error.value)
    assert "\n" not in str(error.value)
    told = told.replace("CHAT", "chat_template")
    failed = pytest.raises(ValueError, match="^" + re.escape(f"reward source 'brief': {told}"))
    with opened(url="http://127.0.0.1:1", chat_template=template) as rewards, failed:
        rewards.score(Batch([HELLO], ["Hi"]))


def test_plain_prompts_need_no_template():
    source(url="http://host/x").preflight(KEY, [Prompt("plain")])
    source(url="http://host/x", protocol="rlhf").preflight(KEY, [Prompt(HELLO)])


# What cannot be a reward


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ({"rewards": [1, 2]}, f"returned 2 rewards for 3 responses, the first of {ABOUT}; it must return one for each"),
        ({"rewards": [1] * 4}, "returned 4 rewards for 3 responses"),
        ({"rewards": []}, "returned 0 rewards for 3 responses"),
        ({"rewards": 0.5}, "returned 0.5 for 3 responses; it must return a list of numbers, one for each"),
        ({"rewards": None}, "returned None (NoneType) for 3 responses"),
        ({"rewards": [1, float("nan"), 1]}, "returned nan for prompt 'What is tea?', response ' A lock.'; it must"),
        ({"rewards": [1, 1, float("-inf")]}, "returned -inf for prompt 'Is bread good?', response ' Yes.'; it must"),
        ('{"rewards": [1, 1, 1' + "0" * 400 + "]}", "returned inf for prompt 'Is bread good?'"),
        ({"rewards": ["1", 1, 1]}, f"returned '1' (str) for {ABOUT}; it must return a finite number, or None"),
        ({"rewards": [[1], [1], [1]]}, f"returned [1] (list) for {ABOUT}"),
        ({"scores": [1, 1, 1]}, "returned {\"scores\": [1, 1, 1]}: there is no 'rewards'; is protocol=openrlhf what"),
        ([1, 1, 1], "returned [1, 1, 1]: there is no 'rewards'"),
        ("Welcome to\nnginx", f"answered what is no JSON: 'Welcome to nginx', {ASKED}"),
        ("", f"answered what is no JSON, an empty answer, {ASKED}"),
        ("[" * 100_000, "answered what is no JSON: '[[["),
        ("\x1b[31m" + "x" * 999, r"answered what is no JSON: '\x1b[31mxxx"),
        ((204, ""), "answered what is no JSON, an empty answer"),
        ((400, {"error": "too\nlong"}), f"refused (status 400: '{{\"error\": \"too\\\\nlong\"}}'), {ASKED}"),
        ((401, "who are you"), "refused (status 401: 'who are you'; its token is read from the environment variable"),
        ((404, "no"), f"refused (status 404: 'no'; check url and model), {ASKED}"),
        ((422, "x" * 9999), "refused (status 422: 'xxx"),
        ((307, "", {"Location": "http://me:word@else/x?key=1"}), "sends elsewhere (status 307, to http://***@else/x?***;"),
        ((301, ""), "sends elsewhere (status 301, to nowhere; set url to where it is), asked for"),
    ],
)  # fmt: skip
def test_what_is_refused_at_once(answer, told):
    with serving(lambda body: answer) as server:
        came = refusal(server.url)
    assert came.startswith(told)
    assert len(came) < 500
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([0, 1], "returned 2 of 'data' for 3 responses, the first of"),
        ([0, 1, 1], "returned the indices [0, 1, 1]; they must be 0 to 2"),
        ([1, 2, 3], "returned the indices [1, 2, 3]; they must be 0 to 2"),
        ([0, 1, "2"], 'returned the indices [0, 1, "2"]; they must be 0 to 2'),
        ([0, 1, None], "returned the indices [0, 1, null]; they must be 0 to 2"),
    ],
)
def test_indices_that_are_refused(rows, told):
    with serving(lambda body: {"data": [{"index": i, "score": 1} for i in rows]}) as server:
        assert refusal(server.url, protocol="score").startswith(told)


def test_probs_without_the_label():
    with serving(lambda body: {"data": [{"index": 0, "probs": [0.5]}]}) as server:
        told = refusal(server.url, BATCH.part([0]), protocol="classify", label=1)
    assert told == "returned probs [0.5]: there is none of label=1"


def test_columns_that_json_cannot_hold():
    for value in (datetime(2026, 1, 1), float("nan")):
        batch = Batch(["a"], ["b"], columns={"when": [value]})
        told = refusal("http://127.0.0.1:1/x", batch, protocol="rlhf")
        assert told.startswith("cannot be asked for prompt 'a', response 'b': JSON has no such value (")


def test_an_answer_that_is_too_large(monkeypatch):
    monkeypatch.setattr(rlhf.sources.client, "LARGEST", 2**20)
    with serving(lambda body: {"rewards": [0] * 2**20}) as server:
        assert refusal(server.url) == f"answered with more than 1 MiB, {ASKED}"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["rewards", "data", "index", "probs", "score", "results", "raw", "x"]), inner
        )
    ),
)


@pytest.fixture(scope="module")
def readers() -> Iterator[list[Any]]:
    with ExitStack() as stack:
        every = [
            stack.enter_context(opened(url="http://127.0.0.1:1", protocol=protocol)) for protocol in PROTOCOLS
        ]
        yield [one._request(BATCH).read for one in every]


@given(answer=JSON)
def test_any_answer_is_rewards_or_a_value_error(readers, answer):
    for read in readers:
        rewards, told = [], ""
        try:
            rewards = read(answer)
        except ValueError as error:
            told = str(error)
        assert len(rewards) == 3 or told.startswith("reward source 'brief' (http://127.0.0.1:1) returned")


# What may pass


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_it_recovers(status, caplog):
    clock, answers = Clock(), iter(2 * [(status, "busy"), (status, "busy"), {"rewards": [1, 2, 3]}])
    with serving(lambda body: next(answers)) as server, opened(clock, url=server.url) as rewards:
        assert rewards.score(BATCH) == rewards.score(BATCH) == [[1.0, 2.0, 3.0]]
    assert clock.slept == [1.0, 2.0, 1.0, 2.0]
    assert [record.getMessage() for record in caplog.records] == 2 * [  # one for each time that it goes away
        f"reward source 'brief' ({server.url}) gave no answer: status {status}: 'busy'; asking again"
    ]


def test_it_stays_away():
    clock = Clock()
    with serving(lambda body: (503, "loading")) as server:
        told = refusal(server.url, clock=clock, retries=8)
    assert told == "gave no answer: status 503: 'loading', after 9 tries in 183 s; is it running?"
    assert clock.slept == [1, 2, 4, 8, 16, 32, 60, 60]
    assert len(server.asked) == 9


def test_a_fault_of_the_server_names_what_it_was_asked():
    with serving(lambda body: (500, "")) as server:
        told = refusal(server.url, retries=0)
    assert told == f"gave no answer: status 500, an empty answer, after 1 try in 0 s, {ASKED}; see its log"


def test_it_says_how_long_to_wait():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=100), usegmt=True)
    for asked, waited in {
        "7": 7,
        "0.5": 1,
        soon: 100,
        "999999": 300,
        "x": 1,
        "-5": 1,
        "nan": 1,
        "inf": 300,
    }.items():
        clock, answers = Clock(), iter([(429, "", {"Retry-After": asked}), {"rewards": [1, 2, 3]}])
        with serving(lambda body, answers=answers: next(answers)) as server:
            scored(server.url, clock=clock)
        assert clock.slept == pytest.approx([waited], abs=3)


def test_nobody_is_there():
    url = f"http://127.0.0.1:{free_port()}/x"
    assert refusal(url) == "gave no answer: Connection refused, after 6 tries in 31 s; is it running?"


def test_a_name_that_nobody_has():
    told = refusal("http://no-such-host.invalid/x", retries=0)
    assert told.startswith("gave no answer: Cannot connect to host no-such-host.invalid:80")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "gave no answer: Server disconnected, after"),
        (b"SSH-2.0-OpenSSH_9\r\n\r\n", "gave no answer: 400, message"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n{", "gave no answer: "),
    ],
)
def test_it_hangs_up_or_speaks_something_else(data, told):
    with speaking(data) as url:
        assert refusal(url, retries=1).startswith(told)
        assert "after 2 tries" in refusal(url, retries=1)


def test_a_server_without_tls_behind_https():
    with serving(lambda body: {}) as server:
        assert "after 1 try" in refusal(server.url.replace("http", "https"), retries=0)


def test_it_hangs():
    async def never(request: web.Request) -> web.Response:
        await asyncio.sleep(60)
        raise AssertionError

    started = time.monotonic()
    with serving(handler=never) as server:
        told = refusal(server.url, timeout=0.2, retries=1)
    assert (
        told
        == "gave no answer: none within 0.2 s, after 2 tries in 1 s; is it running? If it is slow, raise timeout"
    )
    assert time.monotonic() - started < 5


def test_it_drips():
    async def drip(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        for _ in range(600):
            await response.write(b" ")
            await asyncio.sleep(0.05)
        return response

    started = time.monotonic()
    with serving(handler=drip) as server:
        assert refusal(server.url, timeout=0.3, retries=0).startswith(
            "gave no answer: none within 0.3 s, after 1 try"
        )
    assert time.monotonic() - started < 5


# Many at once


def test_the_time_of_a_request_begins_when_it_is_sent():
    async def answer(body: Any) -> Any:
        await asyncio.sleep(0.1)
        return {"rewards": [1]}

    with serving(answer) as server:
        batch = Batch(["a"] * 8, ["b"] * 8)
        assert scored(server.url, batch, batch_size=1, concurrency=1, timeout=0.4, retries=0) == [1.0] * 8


def test_the_order_is_the_batchs_and_no_more_are_asked_than_granted():
    async def answer(body: Any) -> Any:
        await asyncio.sleep(random.random() * 0.02)
        return {"rewards": [float(text.rpartition("=")[2]) for text in body["query"]]}

    def batch(first: int) -> Batch:
        return Batch(["n"] * 50, [f"={i}" for i in range(first, first + 50)])

    with serving(answer) as server, opened(url=server.url, batch_size=3, concurrency=4) as rewards:
        assert rewards.alone is False
        with ThreadPoolExecutor(6) as threads:
            found = list(threads.map(lambda i: rewards.score(batch(50 * i)), range(6)))
    assert [list(row) for (row,) in found] == [
        [float(i) for i in range(50 * n, 50 * n + 50)] for n in range(6)
    ]
    assert len(server.asked) == 6 * 17
    assert server.most == 4
    assert len({one.connection for one in server.asked}) == 4  # kept and used again


def test_nothing_to_score():
    with serving(lambda body: {}) as server:
        assert scored(server.url, Batch([], [])) == []
    assert server.asked == []


def test_one_that_fails_ends_the_rest():
    async def answer(body: Any) -> Any:
        if " A lock." in body["query"][0]:
            return 400, "never"
        await asyncio.sleep(60)
        return {"rewards": [1]}

    started = time.monotonic()
    with serving(answer) as server, opened(url=server.url, batch_size=1) as rewards:
        with pytest.raises(
            ValueError, match=r"refused .*asked for prompt 'What is tea\?', response ' A lock\.'$"
        ):
            rewards.score(BATCH)
        for _ in range(100):  # nobody waits for the others any more
            if not server.busy:
                break
            time.sleep(0.02)
        assert server.busy == 0
    assert time.monotonic() - started < 10


def test_a_client_that_nobody_has_ends_its_thread():
    def threads() -> list[str]:
        return [thread.name for thread in threading.enumerate() if "gone" in thread.name]

    with serving(lambda body: {"rewards": [1, 2, 3]}) as server:
        rewards = source(url=server.url).open("gone", Place())
        assert rewards.score(BATCH) == [[1.0, 2.0, 3.0]]
        assert threads() == ["reward source 'gone'"]
        del rewards
        gc.collect()
        for _ in range(100):
            if not threads():
                break
            time.sleep(0.02)
    assert threads() == []


# Secrets


def test_the_token_is_sent_and_never_shown(monkeypatch, caplog):
    monkeypatch.setenv("REWARD_TOKEN", f" {TOKEN}\n")
    echoes = iter(
        [
            (503, f"you are {TOKEN}"),
            (401, f"bad {TOKEN}"),
            {"rewards": [f"Bearer {TOKEN}", 1, 1]},
            {"rewards": [50 * "x" + TOKEN, 1, 1]},  # shown in part
            {f"{TOKEN}": 1},
            f"no JSON {TOKEN}",
            (307, "", {"Location": f"http://else/{TOKEN}"}),
        ]
    )
    with serving(lambda body: next(echoes)) as server:
        for _ in range(6):
            told = refusal(server.url, token_env="REWARD_TOKEN")
            assert not any(part in told for part in (TOKEN[:5], "t0ken"))
            assert "***" in told or "xxx" in told
    assert {one.headers["Authorization"] for one in server.asked} == {f"Bearer {TOKEN}"}
    assert TOKEN not in caplog.text
    with opened(url="http://host/x", token_env="REWARD_TOKEN") as rewards:
        assert TOKEN not in repr(rewards.client.server) + repr(rewards.settings)


def test_a_token_is_not_sent_to_where_the_server_sends(monkeypatch):
    monkeypatch.setenv("REWARD_TOKEN", TOKEN)
    with serving(lambda body: {"rewards": [1, 1, 1]}) as other, serving(lambda body: elsewhere) as server:
        elsewhere = (307, "", {"Location": other.url})
        told = refusal(server.url, token_env="REWARD_TOKEN")
    assert told.startswith(f"sends elsewhere (status 307, to {other.url}; set url to where it is)")
    assert other.asked == []


def test_a_token_that_is_not_there(monkeypatch):
    monkeypatch.delenv("REWARD_TOKEN", raising=False)
    settings = source(url="http://host/x", token_env="REWARD_TOKEN")
    missing = "token_env=REWARD_TOKEN: this environment variable is not set; export it where the job starts"
    with pytest.raises(ValueError, match=f"^{KEY}.{missing}$"):
        settings.preflight(KEY, [])
    with pytest.raises(ValueError, match=f"^reward source 'brief': {missing}$"):
        settings.open("brief", Place())
    monkeypatch.setenv("REWARD_TOKEN", f"two {TOKEN}")
    with pytest.raises(ValueError, match="holds is no token") as error:
        settings.preflight(KEY, [])
    assert TOKEN not in str(error.value)


def test_a_password_in_the_address():
    with serving(lambda body: (403, "no")) as server:
        url = server.url.replace("://", "://me:pa55word@")
        with (
            opened(url=f"{url}/x?key=abcdef") as rewards,
            pytest.raises(ValueError, match="refused") as error,
        ):
            rewards.score(BATCH)
    assert str(error.value).startswith(
        f"reward source 'brief' ({server.url.replace('://', '://***@')}/x?***) refused"
    )
    assert server.asked[0].path == "/x?key=abcdef"
    assert server.asked[0].headers["Authorization"].startswith("Basic ")
