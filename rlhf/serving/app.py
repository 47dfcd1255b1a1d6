"""The HTTP application around a scorer."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import prometheus_client
from fastapi import Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.security import HTTPBearer
from pydantic import JsonValue

from rlhf import __version__
from rlhf.serving.guard import App, Guard, Metrics
from rlhf.serving.protocol import (
    Class,
    ClassifyRequest,
    ClassifyResponse,
    Conversation,
    ConversationRewards,
    Fault,
    GetRewardRequest,
    GetRewardResponse,
    Health,
    Message,
    RewardsRequest,
    RewardsResponse,
    SampleRequest,
    Scorer,
    Unavailable,
    response_of,
)

LABEL = "label"  # the column in which OpenRLHF's and slime's label reaches functions and judges
_FAULTS = {
    401: "no or another token",
    413: "too much",
    422: "cannot be scored",
    503: "not now",
    504: "too late",
}


@dataclass(frozen=True)
class Limits:
    max_body: int  # bytes
    max_responses: int  # of a request
    timeout: float  # seconds of a request


def make_app(scorer: Scorer, token: str, limits: Limits, strip: Sequence[str] = ()) -> App:
    """The application.

    Args:
        strip: texts that end responses where the client's tokenizer leaves them there.
    """
    app = FastAPI(
        title="rlhf rewards",
        version=__version__,
        description="Rewards of several sources in one unit: raw, reference, utility, P(good), combined.",
        docs_url=None,
        redoc_url=None,
    )
    app.add_exception_handler(RequestValidationError, _unreadable)
    metrics = Metrics()
    calls = _Calls(scorer, limits.max_responses, strip, metrics)
    faults: dict[int | str, dict[str, Any]] = {
        c: {"model": Fault, "description": d} for c, d in _FAULTS.items()
    }
    guarded: dict[str, Any] = {
        "dependencies": [Depends(HTTPBearer(auto_error=False))],  # the guard checks it; this tells of it
        "responses": faults,
    }
    app.add_api_route("/health", calls.health, responses={503: {"model": Health}})
    app.add_api_route("/metrics", calls.metrics, response_class=Response, **guarded)
    for path in ("/v1/rewards", "/get_reward", "/slime", "/classify"):
        call = getattr(calls, path.rsplit("/", 1)[1])
        app.add_api_route(path, call, methods=["POST"], **guarded)
    paths = {route.path for route in app.routes if hasattr(route, "path")}
    return Guard(app, token, limits.max_body, limits.timeout, metrics, paths)


async def _unreadable(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    told = [{"at": list(map(str, e["loc"])), "why": e["msg"]} for e in error.errors()]
    return JSONResponse({"detail": told}, 422)


class _Calls:
    """What can be called, each by its path's last word; its docstring is the OpenAPI page's."""

    def __init__(self, scorer: Scorer, most: int, strip: Sequence[str], metrics: Metrics) -> None:
        self._scorer, self._most, self._strip, self._metrics = scorer, most, strip, metrics

    async def _scored(
        self, conversations: list[Conversation], raw_only: bool = False
    ) -> list[ConversationRewards]:
        count = sum(len(c.responses) for c in conversations)
        if count > self._most:
            raise HTTPException(413, f"{count} responses in one request: at most {self._most} are taken")
        try:
            found = await self._scorer.score(conversations, raw_only)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        except Unavailable as error:
            raise HTTPException(503, str(error)) from error
        self._metrics.responses.inc(count)
        return found

    async def health(self, response: Response) -> Health:
        """Whether it can score now. Needs no token."""
        ready = await self._scorer.ready()
        response.status_code = 200 if ready else 503
        return Health(
            status="ok" if ready else "not ready", models=list(self._scorer.models) if ready else []
        )

    async def metrics(self) -> Response:
        """For Prometheus."""
        text = prometheus_client.generate_latest(self._metrics.registry)
        return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def rewards(self, request: RewardsRequest) -> RewardsResponse:
        """Rewards of responses: of each source its number, the prompt's reference, the utility, P(good); combined."""
        found = await self._scored(request.conversations, request.raw_only)
        return RewardsResponse(models=self._scorer.models, results=found)

    async def get_reward(self, request: GetRewardRequest) -> GetRewardResponse:
        """As OpenRLHF's remote reward model: the combined utility; extra_logs has each source's number."""
        labels = request.labels or [None] * len(request.query)
        if not len(request.query) == len(request.prompts) == len(labels):
            raise HTTPException(
                422,
                f"{len(request.query)} queries, {len(request.prompts)} prompts and {len(labels)} labels: they must be "
                "equally many",
            )
        try:
            pairs = zip(request.query, request.prompts, strict=True)
            responses = [response_of(query, prompt, self._strip) for query, prompt in pairs]
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        rows = zip(request.prompts, responses, labels, strict=True)
        found = await self._scored([_one(*row) for row in rows])
        combined = [_combined(f) for f in found]
        logs = {name: [f.raw[name][0] for f in found] for name in self._scorer.models if found}
        return GetRewardResponse(rewards=combined, scores=combined, extra_logs=logs)

    async def slime(self, request: SampleRequest) -> float:
        """As slime's remote reward model: one response, one number."""
        (found,) = await self._scored([_one(request.prompt, request.response, request.label)])
        return _combined(found)

    async def classify(self, request: ClassifyRequest) -> ClassifyResponse:
        """As vLLM's: P(good) by each reward is the probability of a class of its name. A text alone answers nothing."""
        if (request.input is None) == (request.messages is None):
            raise HTTPException(422, "give input or messages, and not both")
        if request.messages is not None:
            if len(request.messages) < 2 or request.messages[-1].role != "assistant":
                raise HTTPException(422, "the last message must be the assistant's, after another")
            *prompt, last = request.messages
            asked = [_one(prompt, last.content, None)]
        else:
            texts = [request.input] if isinstance(request.input, str) else request.input or []
            asked = [_one("", text, None) for text in texts]
        names = list(self._scorer.models)
        return ClassifyResponse(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model or ",".join(names),
            data=[_class(index, f, names) for index, f in enumerate(await self._scored(asked))],
        )


def _class(index: int, found: ConversationRewards, names: Sequence[str]) -> Class:
    assert found.p_good is not None
    probs = [found.p_good[name][0] for name in names]
    known = [-1.0 if p is None else p for p in probs]
    return Class(index=index, label=names[known.index(max(known))], probs=probs, num_classes=len(names))


def _one(prompt: str | list[Message], response: str, label: JsonValue) -> Conversation:
    columns: dict[str, JsonValue] = {} if label is None else {LABEL: label}
    return Conversation(prompt=prompt, responses=[response], columns=columns)


def _combined(found: ConversationRewards) -> float:
    assert found.combined is not None
    return found.combined[0]
