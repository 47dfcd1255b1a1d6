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
    faults: dict[int | str, dict[str, Any]] = {
        c: {"model": Fault, "description": d} for c, d in _FAULTS.items()
    }
    app = FastAPI(
        title="rlhf rewards",
        version=__version__,
        description="Rewards of several sources in one unit: raw, reference, utility, P(good), combined.",
        docs_url=None,
        redoc_url=None,
    )
    metrics, bearer = Metrics(), HTTPBearer(auto_error=False)  # the guard checks it; this tells of it

    guarded: dict[str, Any] = {"dependencies": [Depends(bearer)], "responses": faults}

    @app.exception_handler(RequestValidationError)
    async def _unreadable(_: Request, error: RequestValidationError) -> JSONResponse:
        told = [{"at": list(map(str, e["loc"])), "why": e["msg"]} for e in error.errors()]
        return JSONResponse({"detail": told}, 422)

    async def scored(conversations: list[Conversation], raw_only: bool = False) -> list[ConversationRewards]:
        count = sum(len(c.responses) for c in conversations)
        if count > limits.max_responses:
            raise HTTPException(
                413, f"{count} responses in one request: at most {limits.max_responses} are taken"
            )
        try:
            found = await scorer.score(conversations, raw_only)
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        except Unavailable as error:
            raise HTTPException(503, str(error)) from error
        metrics.responses.inc(count)
        return found

    @app.get("/health", responses={503: {"model": Health}})
    async def health(response: Response) -> Health:
        """Whether it can score now. Needs no token."""
        ready = await scorer.ready()
        response.status_code = 200 if ready else 503
        return Health(status="ok" if ready else "not ready", models=list(scorer.models) if ready else [])

    @app.get("/metrics", response_class=Response, **guarded)
    async def counted() -> Response:
        """For Prometheus."""
        return Response(
            prometheus_client.generate_latest(metrics.registry),
            media_type=prometheus_client.CONTENT_TYPE_LATEST,
        )

    @app.post("/v1/rewards", **guarded)
    async def rewards(request: RewardsRequest) -> RewardsResponse:
        """Rewards of responses: of each source its number, the prompt's reference, the utility, P(good); combined."""
        return RewardsResponse(
            models=scorer.models, results=await scored(request.conversations, request.raw_only)
        )

    @app.post("/get_reward", **guarded)
    async def get_reward(request: GetRewardRequest) -> GetRewardResponse:
        """As OpenRLHF's remote reward model: the combined utility; extra_logs has each source's number."""
        labels = request.labels or [None] * len(request.query)
        if not len(request.query) == len(request.prompts) == len(labels):
            raise HTTPException(
                422,
                f"{len(request.query)} queries, {len(request.prompts)} prompts and {len(labels)} labels: they must be "
                "equally many",
            )
        try:
            responses = [
                response_of(q, p, strip) for q, p in zip(request.query, request.prompts, strict=True)
            ]
        except ValueError as error:
            raise HTTPException(422, str(error)) from error
        rows = zip(request.prompts, responses, labels, strict=True)
        found = await scored([_one(*row) for row in rows])
        combined = [_combined(f) for f in found]
        return GetRewardResponse(
            rewards=combined,
            scores=combined,
            extra_logs={name: [f.raw[name][0] for f in found] for name in scorer.models if found},
        )

    @app.post("/slime", **guarded)
    async def slime(request: SampleRequest) -> float:
        """As slime's remote reward model: one response, one number."""
        (found,) = await scored([_one(request.prompt, request.response, request.label)])
        return _combined(found)

    @app.post("/classify", **guarded)
    async def classify(request: ClassifyRequest) -> ClassifyResponse:
        """As vLLM's: P(good) by each reward is the probability of a class of its name. A text alone answers nothing."""
        if (request.input is None) == (request.messages is None):
            raise HTTPException(422, "give input or messages, and not both")
        if request.messages is not None:
            if len(request.messages) < 2 or request.messages[-1].role != "assistant":
                raise HTTPException(422, "the last message must be the assistant's, after another")
            *prompt, last = request.messages
            asked = [Conversation(prompt=prompt, responses=[last.content])]
        else:
            texts = [request.input] if isinstance(request.input, str) else request.input or []
            asked = [Conversation(prompt="", responses=[text]) for text in texts]
        found = await scored(asked)
        names = list(scorer.models)
        data = []
        for index, one in enumerate(found):
            assert one.p_good is not None
            probs = [one.p_good[name][0] for name in names]
            best = max(range(len(names)), key=lambda n: -1.0 if probs[n] is None else float(probs[n] or 0.0))
            data.append(Class(index=index, label=names[best], probs=probs, num_classes=len(names)))
        return ClassifyResponse(
            id=f"classify-{uuid.uuid4().hex}",
            created=int(time.time()),
            model=request.model or ",".join(names),
            data=data,
        )

    paths = {route.path for route in app.routes if hasattr(route, "path")}
    return Guard(app, token, limits.max_body, limits.timeout, metrics, paths)


def _one(prompt: str | list[Message], response: str, label: JsonValue) -> Conversation:
    columns: dict[str, JsonValue] = {} if label is None else {LABEL: label}
    return Conversation(prompt=prompt, responses=[response], columns=columns)


def _combined(found: ConversationRewards) -> float:
    assert found.combined is not None
    return found.combined[0]
