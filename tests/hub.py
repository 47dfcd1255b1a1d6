"""A Hugging Face hub of a few endpoints, on a port of this machine, that keeps what is pushed to it."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    token: str
    url: str = ""
    asked: list[str] = field(default_factory=list)
    repos: dict[str, bool] = field(default_factory=dict)  # whether it is private, by name
    stored: dict[str, bytes] = field(default_factory=dict)  # large files, by their hash
    role: str = "write"  # of the token
    files: dict[str, bytes] = field(default_factory=dict)  # of the last commit and those before it


@contextmanager
def hub(token: str) -> Iterator[Hub]:
    """It knows one user, `me`, by this token. Files of 1 kB and more go through LFS."""
    made = Hub(token)

    class Handler(BaseHTTPRequestHandler):
        def answer(self, body: Any = None, status: int = 200) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def handle_one(self) -> None:
            sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path != "/api/agent-harnesses":  # which the client asks for by the way
                made.asked.append(f"{self.command} {self.path}")
            path = self.path.partition("?")[0]
            if path.startswith("/lfs/"):
                made.stored[path.removeprefix("/lfs/")] = sent
                return self.answer({})
            if self.headers.get("Authorization") != f"Bearer {made.token}":
                return self.answer({"error": "Invalid credentials"}, 401)
            if path == "/api/whoami-v2":
                auth = {"type": "access_token", "accessToken": {"displayName": "it", "role": made.role}}
                return self.answer({"type": "user", "name": "me", "orgs": [{"name": "us"}], "auth": auth})
            if path == "/api/repos/create":
                asked = json.loads(sent)
                name = f"{asked.get('organization') or 'me'}/{asked['name']}"
                made.repos[name] = asked.get("private", asked.get("visibility") == "private")
                return self.answer({"url": f"{made.url}/{name}", "name": name, "id": name})
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if path.endswith("/preupload/main"):
                files = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["size"] >= 1000 else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for one in json.loads(sent)["files"]
                ]
                return self.answer({"files": files})
            if path.endswith("/info/lfs/objects/batch"):
                objects = [
                    one | {"actions": {"upload": {"href": f"{made.url}/lfs/{one['oid']}"}}}
                    for one in json.loads(sent)["objects"]
                ]
                return self.answer({"transfer": "basic", "objects": objects})
            if path.endswith("/commit/main"):
                for line in map(json.loads, sent.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        made.files[value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        made.files[value["path"]] = made.stored[value["oid"]]
                name = path.removeprefix("/api/models/").removesuffix("/commit/main")
                found = f"{made.url}/{name}/commit/{'0' * 40}"
                return self.answer({"commitUrl": found, "commitOid": "0" * 40, "success": True})
            return self.answer({"error": "not here"}, 404)

        do_GET = do_POST = do_PUT = handle_one

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        server.shutdown()
        server.server_close()
