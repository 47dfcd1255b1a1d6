"""Asking a server: requests and retries on one event loop, and errors that name the source, the address and what came
back, without secrets."""

from __future__ import annotations

import asyncio
import email.utils
import itertools
import json
import logging
import os
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import aiohttp

from rlhf.shown import HIDDEN, redacted, visible

log = logging.getLogger(__name__)
T = TypeVar("T")

PASSING = (429, 500, 502, 503, 504)  # states of a server that may pass: it is asked again
LONGEST = 60.0  # seconds between two tries
LONGEST_ASKED = 300.0  # the same, where the server says how long (Retry-After)
LARGEST = 64 * 2**20  # bytes of an answer
IDLE = 4.0  # seconds that a connection is kept for the next request: uvicorn closes it after 5
HINTS = {
    401: "its token is read from the environment variable that token_env names",
    403: "its token is read from the environment variable that token_env names",
    404: "check url and model",
    405: "check url",
    429: "a lower concurrency may pass",
    500: "see its log",
}


@dataclass(frozen=True)
class Server:
    """Where a server is, and how it is asked."""

    source: str  # whose it is, as errors call it
    url: str
    token: str | None = field(default=None, repr=False)  # bearer
    concurrency: int = 1  # requests at once
    timeout: float = 60.0  # seconds, of a whole request
    retries: int = 0
    backoff: float = 1.0  # seconds before the first retry; doubled each time, up to LONGEST

    @property
    def name(self) -> str:
        return f"{self.source} ({address(self.url)})"


@dataclass(frozen=True)
class Request(Generic[T]):
    """One request: its body, what it is about as errors call it, and how its answer is read (a ValueError: it is
    refused)."""

    body: Mapping[str, Any]
    about: str
    read: Callable[[Any], T]


class Client:
    """Asks one server, from any thread.

    Requests run on one event loop in a daemon thread, at most `concurrency` of them, over connections that are kept
    for the next. A request ends as an answer that its `read` took, or as a ValueError of one line without the token.
    The loop ends with the client.
    """

    def __init__(
        self,
        server: Server,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.server, self._sleep, self._clock = server, sleep, clock
        self._slots = asyncio.Semaphore(server.concurrency)
        self._troubled = False  # whether the last that was heard of the server is a failure
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=_turn, args=(self._loop,), name=server.source, daemon=True).start()
        self._session = self._run(_session(server))
        self.close = weakref.finalize(self, _end, self._loop, self._session)

    def ask(self, requests: Sequence[Request[T]]) -> list[T]:
        """The answers, in the order of the requests.

        Raises:
            ValueError: one has none; the others are called off.
        """
        return self._run(self._all([(request, self._packed(request)) for request in requests]))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def _all(self, requests: Sequence[tuple[Request[T], bytes]]) -> list[T]:
        tasks = [asyncio.create_task(self._one(request, data)) for request, data in requests]
        try:
            return await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _one(self, request: Request[T], data: bytes) -> T:
        try:
            async with self._slots:
                answer = await self._answer(data, request.about)
            return request.read(answer)
        except _RefusedError as error:
            message = f"{self.server.name} {error}, asked for {request.about}"
        except ValueError as error:
            message = str(error)
        raise ValueError(self._clean(message)) from None

    async def _answer(self, data: bytes, about: str) -> Any:
        """What the server says, after as many tries as are granted."""
        started = self._clock()
        for tries in itertools.count(1):
            try:
                answer = await self._try(data)
                self._troubled = False
                return answer
            except _PassingError as error:
                trouble = error
            if tries > self.server.retries:
                times, seconds = ("tries" if tries > 1 else "try"), self._clock() - started
                asked = f", asked for {about}" if trouble.ours else ""
                raise ValueError(
                    f"{self.server.name} gave no answer: {trouble}, after {tries} {times} in {seconds:.0f} s{asked}; "
                    f"{trouble.hint}"
                )
            if not self._troubled:  # one line for each time that it goes away
                log.warning("%s", self._clean(f"{self.server.name} gave no answer: {trouble}; asking again"))
            self._troubled = True
            wait = min(self.server.backoff * 2.0 ** min(tries - 1, 30), LONGEST)
            await self._sleep(max(wait, min(trouble.asked, LONGEST_ASKED)))
        raise AssertionError

    async def _try(self, data: bytes) -> Any:
        server = self.server
        try:
            async with asyncio.timeout(server.timeout):
                async with self._session.post(server.url, data=data, allow_redirects=False) as response:
                    text = self._scrubbed(await _text(response))
        except TimeoutError:
            hint = "is it running? If it is slow, raise timeout"
            raise _PassingError(f"none within {server.timeout:g} s", hint) from None
        except aiohttp.ClientConnectorCertificateError as error:
            raise _RefusedError(
                f"has a certificate that is not trusted ({error.certificate_error})"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise _PassingError(_reason(error)) from None
        status = response.status
        if status in PASSING:
            asked = _seconds(response.headers.get("Retry-After", ""))
            hint = HINTS.get(status, "is it running?")
            raise _PassingError(f"status {status}{_said(text)}", hint, asked, ours=status == 500)
        if 300 <= status < 400:
            place = address(response.headers.get("Location", "nowhere"))
            raise _RefusedError(f"sends elsewhere (status {status}, to {place}; set url to where it is)")
        if status >= 400:
            hint = f"; {HINTS[status]}" if status in HINTS else ""
            raise _RefusedError(f"refused (status {status}{_said(text)}{hint})")
        try:
            return json.loads(text, parse_int=_whole)
        except (ValueError, RecursionError):
            raise _RefusedError(f"answered what is no JSON{_said(text)}") from None

    def _packed(self, request: Request[Any]) -> bytes:
        try:
            return json.dumps(request.body, allow_nan=False, default=_plain).encode()
        except (TypeError, ValueError) as error:
            message = (
                f"{self.server.name} cannot be asked for {request.about}: JSON has no such value ({error})"
            )
            raise ValueError(self._clean(message)) from None

    def _scrubbed(self, text: str) -> str:
        """An answer that repeats the token, without it. A short one may stand in any answer."""
        token = self.server.token
        return text.replace(token, HIDDEN) if token and len(token) >= 8 else text

    def _clean(self, message: str) -> str:
        token = self.server.token
        return visible(redacted(message.replace(token, HIDDEN) if token else message))


class _RefusedError(ValueError):
    """An answer that asking again would not change."""


class _PassingError(Exception):
    """No answer, which may pass."""

    def __init__(
        self, reason: str, hint: str = "is it running?", asked: float = 0.0, ours: bool = False
    ) -> None:
        super().__init__(reason)
        self.hint = hint
        self.asked = asked  # seconds that the server wants to be left alone
        self.ours = ours  # whether what was asked may be to blame


def told(value: Any) -> str:
    """What came back, as an error shows it.

    >>> told({"rewards": [1, None]})
    '{"rewards": [1, null]}'
    """
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:197] + "..."


def address(url: str) -> str:
    """An address without secrets: no password, nothing of its query.

    >>> address("https://me:word@host/score?key=1")
    'https://***@host/score?***'
    """
    place, query, _ = redacted(url).partition("?")
    return f"{place}?{HIDDEN}" if query else place


def _turn(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    loop.close()


async def _session(server: Server) -> aiohttp.ClientSession:
    headers = {"Content-Type": "application/json"}
    if server.token is not None:
        headers["Authorization"] = f"Bearer {server.token}"
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=server.concurrency, keepalive_timeout=IDLE),
        timeout=aiohttp.ClientTimeout(total=None),  # `_try` has its own
        headers=headers,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


def _end(loop: asyncio.AbstractEventLoop, session: aiohttp.ClientSession) -> None:
    async def ended() -> None:
        await session.close()
        loop.stop()

    asyncio.run_coroutine_threadsafe(ended(), loop)


async def _text(response: aiohttp.ClientResponse) -> str:
    parts, size = [], 0
    async for part in response.content.iter_chunked(2**16):
        parts.append(part)
        size += len(part)
        if size > LARGEST:
            raise _RefusedError(f"answered with more than {LARGEST / 2**20:g} MiB")
    return b"".join(parts).decode("utf-8", "replace")


def _reason(error: Exception) -> str:
    if isinstance(error, aiohttp.ClientConnectorError) and (error.errno or 0) > 0:
        return os.strerror(error.errno or 0)
    return told(str(error)) or type(error).__name__


def _said(text: str) -> str:
    return f": {told(text)!r}" if text.strip() else ", an empty answer"


def _seconds(header: str) -> float:
    """What Retry-After asks for: seconds, or the time until a date; anything else: none."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def _whole(digits: str) -> int | float:
    return int(digits) if len(digits) < 20 else float(digits)


def _plain(value: Any) -> Any:
    """A value of NumPy as JSON can hold it."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__}: {value!r:.60}")
