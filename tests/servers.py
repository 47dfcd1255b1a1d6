"""Real HTTP servers of a few lines, on a port of this machine, and a clock that does not wait."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aiohttp import web

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass
class Asked:
    """One request as it came."""

    path: str
    headers: dict[str, str]
    body: Any
    connection: tuple[str, int]


@dataclass
class Server:
    """Where it is, and what it was asked."""

    port: int = 0
    asked: list[Asked] = field(default_factory=list)
    busy: int = 0  # requests that it has not answered yet
    most: int = 0  # the most of them

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def bodies(self) -> list[Any]:
        return [one.body for one in self.asked]


@contextmanager
def serving(answer: Callable[[Any], Any] | None = None, handler: Handler | None = None) -> Iterator[Server]:
    """A server that answers every POST by `answer(body)`: an object (sent as JSON, NaN and all), a text, a pair
    (status, object or text), or a triple with headers; or a coroutine that gives one of them. `handler` instead: all
    by hand."""
    server = Server()

    async def handle(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        assert request.transport is not None
        peer = request.transport.get_extra_info("peername")
        server.asked.append(Asked(request.path_qs, dict(request.headers), body, peer))
        server.busy += 1
        server.most = max(server.most, server.busy)
        try:
            if handler is not None:
                return await handler(request)
            assert answer is not None
            given = answer(body)
            if asyncio.iscoroutine(given):
                given = await given
            return _response(given)
        finally:
            server.busy -= 1

    ready, loop = threading.Event(), asyncio.new_event_loop()

    async def start() -> web.AppRunner:
        app = web.Application(client_max_size=2**24)
        app.router.add_route("*", "/{path:.*}", handle)
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        server.port = runner.addresses[0][1]
        ready.set()
        return runner

    def turn() -> None:
        runner = loop.run_until_complete(start())
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=turn, daemon=True)
    thread.start()
    assert ready.wait(10)
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)


def _response(given: Any) -> web.Response:
    status, value, headers = 200, given, {}
    if isinstance(given, tuple):
        status, value, *rest = given
        headers = rest[0] if rest else {}
    text = value if isinstance(value, str) else json.dumps(value)
    return web.Response(status=status, text=text, headers=headers)


@contextmanager
def speaking(data: bytes) -> Iterator[str]:
    """The address of what sends these bytes to whoever comes, and hangs up."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def turn() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    connection.recv(2**16)
                    connection.sendall(data)

        threading.Thread(target=turn, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


class Clock:
    """Time that passes by sleeping alone."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, list[float]()

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)


@contextmanager
def transformers_serve(folder: str) -> Iterator[str]:
    """`transformers serve` with the chat model in a folder, which is its name there; its address."""
    port, log = free_port(), Path(folder) / "serve.log"
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", folder, "--device", "cpu"]
    command += ["--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(600):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)
