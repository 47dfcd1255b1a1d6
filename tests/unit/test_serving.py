"""The HTTP application around a scorer whose rewards are arithmetic: who is let in, what is answered and refused."""

import asyncio

import pytest
from starlette.testclient import TestClient

from rlhf.serving.app import Limits, make_app
from rlhf.serving.protocol import ConversationRewards, ModelInfo, Unavailable, response_of

TOKEN = "a-token-of-tests"
HEAD = {"Authorization": f"Bearer {TOKEN}"}
SECRET = {"kind": "function", "scale": "verdict", "temperature": 1.0, "error_rate": 0.1, "weight": 1.0}


class Lengths:
    """Two rewards: the response's length, and whether it names the column "label"."""

    def __init__(self) -> None:
        self.models = {n: ModelInfo(**SECRET, fingerprint=n) for n in ("length", "right")}
        self.fault: Exception | None = None
        self.seconds = 0.0
        self.seen: list = []

    async def ready(self) -> bool:
        return self.fault is None

    async def score(self, conversations, raw_only):
        await asyncio.sleep(self.seconds)
        if self.fault is not None:
            raise self.fault
        self.seen = list(conversations)
        found = []
        for c in conversations:
            length = [float(len(r)) for r in c.responses]
            right = [
                None if "label" not in c.columns else float(c.columns["label"] in r) for r in c.responses
            ]
            raw = {"length": length, "right": right}
            more = {} if raw_only else {"p_good": raw, "combined": [-n for n in length]}
            found.append(ConversationRewards(raw=raw, **more))
        return found


@pytest.fixture
def scorer():
    return Lengths()


@pytest.fixture
def client(scorer):
    limits = Limits(max_body=2000, max_responses=5, timeout=0.5)
    return TestClient(make_app(scorer, TOKEN, limits, ["</s>"]), raise_server_exceptions=False)


def asked(*responses: str, **more):
    return {"conversations": [{"prompt": "why?", "responses": list(responses), **more}]}


PATHS = [
    "/v1/rewards",
    "/get_reward",
    "/slime",
    "/classify",
    "/metrics",
    "/openapi.json",
    "/docs",
    "/",
    "/nothing",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("head", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}])
def test_nothing_but_health_without_the_token(client, path, head):
    for call in (client.get, client.post):
        answer = call(path, headers=head)
        assert answer.status_code == 401
        assert answer.json() == {"detail": "a bearer token is needed"}
    assert client.get(f"{path}?token=wrong").status_code == 401


def test_health_needs_no_token_and_tells_the_truth(client, scorer):
    answer = client.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok", "models": ["length", "right"]})
    scorer.fault = Unavailable("gone")
    assert client.get("/health").status_code == 503


def test_a_client_that_sends_no_headers_shows_the_token_in_the_address(client):
    body = {"prompt": "why?", "response": "four", "label": "o"}
    assert client.post(f"/slime?token={TOKEN}", json=body).json() == -4.0


def test_the_batch_call(client):
    answer = client.post("/v1/rewards", json=asked("a", "bc", columns={"label": "c"}), headers=HEAD).json()
    assert answer["models"]["length"]["fingerprint"] == "length"
    (result,) = answer["results"]
    assert result["raw"] == {"length": [1.0, 2.0], "right": [0.0, 1.0]}
    assert result["combined"] == [-1.0, -2.0]
    assert result["reference"] is None


def test_raw_numbers_alone_and_what_does_not_apply(client):
    body = asked("a") | {"raw_only": True}
    (result,) = client.post("/v1/rewards", json=body, headers=HEAD).json()["results"]
    assert result["raw"] == {"length": [1.0], "right": [None]}
    assert result["combined"] is None


def test_openrlhf_is_answered_with_lists_of_its_lengths(client, scorer):
    body = {"query": ["Hi?Yes.</s>", "Hi?No"], "prompts": ["Hi?", "Hi?"], "labels": ["Yes", None]}
    answer = client.post("/get_reward", json=body, headers=HEAD).json()
    assert answer["rewards"] == answer["scores"] == [-4.0, -2.0]
    assert answer["extra_logs"] == {"length": [4.0, 2.0], "right": [1.0, None]}
    assert [c.responses for c in scorer.seen] == [["Yes."], ["No"]]


def test_empty_lists_get_empty_lists(client):
    answer = client.post("/get_reward", json={"query": [], "prompts": [], "labels": []}, headers=HEAD)
    assert answer.json() == {"rewards": [], "scores": [], "extra_logs": {}}
    assert client.post("/v1/rewards", json={"conversations": []}, headers=HEAD).json()["results"] == []


def test_vllms_classes_are_the_rewards(client):
    answer = client.post("/classify", json={"model": "m", "input": ["ab"]}, headers=HEAD).json()
    assert answer["object"] == "list"
    assert answer["model"] == "m"
    assert answer["data"] == [{"index": 0, "label": "length", "probs": [2.0, None], "num_classes": 2}]
    talk = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so"}]
    answer = client.post("/classify", json={"messages": talk}, headers=HEAD)
    assert answer.json()["data"][0]["probs"] == [2.0, None]


@pytest.mark.parametrize(
    ("path", "body", "detail"),
    [
        (
            "/get_reward",
            {"query": ["a"], "prompts": []},
            "1 queries, 0 prompts and 1 labels: they must be equally",
        ),
        ("/get_reward", {"query": ["a"], "prompts": ["b"]}, "query 'a' does not begin with its prompt 'b'"),
        ("/classify", {}, "give input or messages, and not both"),
        (
            "/classify",
            {"messages": [{"role": "user", "content": "x"}]},
            "the last message must be the assistant's",
        ),
        ("/v1/rewards", asked(3), "valid string"),
        ("/v1/rewards", asked("a", size=3), "Extra inputs are not permitted"),
        ("/v1/rewards", {"conversations": [{"prompt": [], "responses": []}]}, "at least 1 item"),
        (
            "/v1/rewards",
            {"conversations": [{"prompt": [{"role": "assistant", "content": "x"}], "responses": []}]},
            "nobody asks anything",
        ),
    ],
)
def test_what_cannot_be_read_is_told(client, path, body, detail):
    answer = client.post(path, json=body, headers=HEAD)
    assert answer.status_code == 422
    assert detail in str(answer.json()["detail"])


def test_too_much_is_refused(client, scorer):
    answer = client.post("/v1/rewards", json=asked(*"abcdef"), headers=HEAD)
    assert (answer.status_code, answer.json()["detail"]) == (
        413, "6 responses in one request: at most 5 are taken",
    )  # fmt: skip
    answer = client.post("/v1/rewards", json=asked("x" * 2000), headers=HEAD)
    assert (answer.status_code, answer.json()["detail"]) == (413, "the body is larger than 2000 bytes")

    def chunks():  # without a length
        for _ in range(30):
            yield b"x" * 100

    answer = client.post("/v1/rewards", content=chunks(), headers=HEAD)
    assert answer.status_code == 413
    assert scorer.seen == []


def test_faults_of_what_was_asked_and_of_what_is_not_there(client, scorer):
    scorer.fault = ValueError("reward source 'rule' raised KeyError: 'x' for prompt 'why?', response 'a'")
    answer = client.post("/v1/rewards", json=asked("a"), headers=HEAD)
    assert (answer.status_code, answer.json()["detail"]) == (422, str(scorer.fault))
    scorer.fault = Unavailable("not now")
    assert client.post("/v1/rewards", json=asked("a"), headers=HEAD).status_code == 503


def test_a_request_ends_after_its_time(client, scorer):
    scorer.seconds = 5.0
    answer = client.post("/v1/rewards", json=asked("a"), headers=HEAD)
    assert (answer.status_code, answer.json()["detail"]) == (504, "no answer within 0.5 s")


def test_what_is_counted(client):
    client.post("/v1/rewards", json=asked("a", "b"), headers=HEAD)
    client.get("/secret/path", headers=HEAD)
    client.get("/v1/rewards")
    text = client.get("/metrics", headers=HEAD).text
    assert 'rlhf_requests_total{path="/v1/rewards",status="200"} 1.0' in text
    assert 'rlhf_requests_total{path="/v1/rewards",status="401"} 1.0' in text
    assert 'rlhf_requests_total{path="other",status="404"} 1.0' in text
    assert "rlhf_responses_total 2.0" in text
    assert 'rlhf_request_seconds_count{path="/v1/rewards"} 2.0' in text
    assert "secret" not in text
    assert TOKEN not in text


def test_the_openapi_page_tells_of_the_token(client):
    page = client.get("/openapi.json", headers=HEAD).json()
    assert {p for p in page["paths"] if "security" in next(iter(page["paths"][p].values()))} == {
        "/v1/rewards", "/get_reward", "/slime", "/classify", "/metrics",
    }  # fmt: skip


def test_a_response_is_what_follows_its_prompt():
    assert response_of("<u>Hi<a>Yes<end>", "<u>Hi<a>", ["<eos>", "<end>"]) == "Yes"
    assert response_of("Hi", "Hi", []) == ""
    with pytest.raises(ValueError, match="does not begin with its prompt"):
        response_of("Ho", "Hi", [])
