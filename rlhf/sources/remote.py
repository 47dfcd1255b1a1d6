"""What the sources that ask a server share: their settings. Imports no torch."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import urlsplit

from rlhf.config_numbers import NOT_NEGATIVE, POSITIVE, Range
from rlhf.sources.client import Server, address
from rlhf.sources.source import COMMON_RANGES, Source

if TYPE_CHECKING:
    from rlhf.types import Prompt


@dataclass(kw_only=True)
class RemoteSource(Source):
    """The settings of a source that asks a server. The environment variable of the token is read where the source is
    opened, and looked for before Ray starts."""

    url: str | None
    concurrency: int  # requests at once, of one replica
    timeout: float  # seconds, of a whole request
    retries: int
    backoff: float  # seconds before the first retry; doubled each time, up to 60
    token_env: str | None  # the environment variable that holds a bearer token
    extra: dict[str, Any]  # more fields of every request, or others in place of ours; null leaves one out

    ranges: ClassVar[Mapping[str, Range]] = {
        **COMMON_RANGES,
        "concurrency": POSITIVE,
        "timeout": POSITIVE,
        "retries": NOT_NEGATIVE,
        "backoff": NOT_NEGATIVE,
    }
    reads_columns: ClassVar[bool] = True

    def check(self, key: str) -> None:
        super().check(key)
        if self.url is None:
            raise ValueError(
                f"{key}.url is missing: give the server's address, as in http://127.0.0.1:8000/..."
            )
        try:
            parts = urlsplit(self.url)
            known = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            known = None
        if not known or not self.url.isprintable() or " " in self.url:
            raise ValueError(f"{key}.url={self.place} is no address of the form http://host:port/path")
        if parts.username is not None and self.token_env is not None:
            raise ValueError(f"{key}.url has a user's name and {key}.token_env a token; give one of them")

    @property
    def place(self) -> str:
        return address(self.url or "")

    def identity(self) -> Any:
        carriage = {"concurrency", "timeout", "retries", "backoff", "token_env", "batch_size"}  # of no reward
        kept = {name: value for name, value in super().identity().items() if name not in carriage}
        secret = urlsplit(self.url or "")
        whole = secret._replace(
            netloc=secret.netloc.rpartition("@")[2]
        ).geturl()  # its query may choose a model
        return kept | {"url": hashlib.blake2b(whole.encode(), digest_size=8).hexdigest()}

    def preflight(self, key: str, prompts: Sequence[Prompt]) -> None:
        if self.token_env is not None:
            _token(f"{key}.token_env={self.token_env}", self.token_env)

    def server(self, name: str, path: str = "") -> Server:
        """What a source called `name` asks: the server's address, with `path` at its end.

        Raises:
            ValueError: the token's variable is not set.
        """
        assert self.url is not None
        source = f"reward source {name!r}"
        token = self.token_env and _token(f"{source}: token_env={self.token_env}", self.token_env)
        url = self.url.rstrip("/") + path if path else self.url
        return Server(source, url, token, self.concurrency, self.timeout, self.retries, self.backoff)

    def body(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The body of a request: these fields, as `extra` changes them."""
        return {name: value for name, value in {**fields, **self.extra}.items() if value is not None}


def _token(asked: str, variable: str) -> str:
    token = os.environ.get(variable, "").strip()
    if not token:
        raise ValueError(f"{asked}: this environment variable is not set; export it where the job starts")
    if not token.isprintable() or " " in token:
        raise ValueError(
            f"{asked}: what this environment variable holds is no token: it has spaces or breaks"
        )
    return token
