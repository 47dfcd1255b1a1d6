"""What stands before the application: token, size, time, and counting. Plain ASGI."""

from __future__ import annotations

import asyncio
import hmac
import json
import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = ("/health",)  # paths that need no token
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)


class Metrics:
    """Of one server, as Prometheus reads them."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        labels = ("path", "status")
        self.requests = Counter("rlhf_requests_total", "Requests answered", labels, registry=self.registry)
        self.seconds = Histogram(
            "rlhf_request_seconds",
            "Seconds from a request's head to its answer",
            ("path",),
            registry=self.registry,
            buckets=BUCKETS,
        )
        self.responses = Counter("rlhf_responses_total", "Responses scored", registry=self.registry)
        self.active = Gauge("rlhf_requests_active", "Requests under way", registry=self.registry)


class TooLarge(Exception):
    """A body is over the limit."""


class Guard:
    """An application behind a bearer token ("Authorization: Bearer ...", or ?token=..., for clients that send no
    header), with a limit on bodies and on time."""

    def __init__(
        self, app: App, token: str, max_body: int, timeout: float, metrics: Metrics, paths: set[str]
    ) -> None:
        """
        Args:
            max_body: bytes.
            timeout: seconds.
            paths: that are counted by their names; others together.
        """
        self._app, self._token, self._most, self._timeout = app, token.encode(), max_body, timeout
        self._metrics, self._paths = metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        started, status = time.perf_counter(), 500
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        began = False

        async def sent(message: MutableMapping[str, Any]) -> None:
            nonlocal status, began
            if message["type"] == "http.response.start":
                status, began = message["status"], True
            await send(message)

        async def refused(code: int, detail: str, headers: tuple = ()) -> None:
            await _answer(sent, code, detail, headers)

        self._metrics.active.inc()
        try:
            if path not in OPEN and not self._allowed(scope):
                await refused(401, "a bearer token is needed", ((b"www-authenticate", b"Bearer"),))
            elif _length(scope) > self._most:
                await refused(413, f"the body is larger than {self._most} bytes")
            else:
                async with asyncio.timeout(self._timeout):
                    await self._app(scope, await self._read(receive), sent)
        except TooLarge:
            await refused(413, f"the body is larger than {self._most} bytes")
        except TimeoutError:
            if not began:
                await refused(504, f"no answer within {self._timeout:g} s")
        finally:
            self._metrics.active.dec()
            known = path if path in self._paths else "other"
            self._metrics.requests.labels(known, str(status)).inc()
            self._metrics.seconds.labels(known).observe(time.perf_counter() - started)
        return None

    def _allowed(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        tokens = [value[7:] for value in given if value[:7].lower() == b"bearer "]
        query = parse_qs(scope.get("query_string", b"").decode("latin-1"))
        tokens += [value.encode() for value in query.get("token", [])]
        return any(hmac.compare_digest(token, self._token) for token in tokens)

    async def _read(self, receive: Receive) -> Receive:
        """The body, read whole; then whatever comes.

        Raises:
            TooLarge: it goes on beyond the limit.
        """
        messages: list[MutableMapping[str, Any]] = []
        while not messages or messages[-1].get("more_body"):
            messages.append(await receive())
            if sum(len(m.get("body", b"")) for m in messages) > self._most:
                raise TooLarge

        async def again() -> MutableMapping[str, Any]:
            return messages.pop(0) if messages else await receive()

        return again


def _length(scope: Scope) -> int:
    given = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(given[0]) if given and given[0].isdigit() else 0


async def _answer(send: Send, status: int, detail: str, headers: tuple) -> None:
    body = json.dumps({"detail": detail}).encode()
    head = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()), *headers]
    await send({"type": "http.response.start", "status": status, "headers": head})
    await send({"type": "http.response.body", "body": body})
