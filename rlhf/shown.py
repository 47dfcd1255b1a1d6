"""Text of users, files and models as it is shown: without secrets, and with nothing that a terminal would obey.

`shown` is for a line on a terminal or in a log; `redacted` alone for a text that is saved (the configuration).
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from typing import Any

from rlhf.types import Content

HIDDEN = "***"
SHORTEST = 8  # characters of a secret in the environment; shorter ones are words like "1" and "local"
# What a secret looks like by itself: tokens of known services, and the user's part of an address.
_TOKEN = re.compile(
    r"\b(?:hf_|sk-|ghp_|gho_|github_pat_|glpat-|xox[abp]-|AKIA|wandb_v\d_)[\w-]{12,}|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+"
)
_ADDRESS = re.compile(r"(?<=://)[^\s/@'\"]+@")
# What is called one: HF_TOKEN=..., api_key: ..., "password": "..."
_NAMED = re.compile(
    r"""(?i)((?<![a-z0-9])(?:[a-z0-9]+[_-])*(?:token|api_?key|access_?key|secret_?key|auth_?key|secret|password|passwd)"""
    r"""['"]?(?:=|:[ ]))(?!null\b)("[^"]*"|'[^']*'|[^\s,}&;]+)"""
)
_KEY = re.compile(r"(\b[A-Z0-9_]*_KEY=)([^\s,}&;]+)")


def redacted(text: str) -> str:
    """The text without secrets.

    >>> redacted("path: https://me:word@host/x HF_TOKEN=abc max_new_tokens: 40 hf_abcdefghijklmnop")
    'path: https://***@host/x HF_TOKEN=*** max_new_tokens: 40 ***'
    """
    for secret in _of_environment():
        text = text.replace(secret, HIDDEN)
    text = _TOKEN.sub(HIDDEN, text)
    text = _ADDRESS.sub(f"{HIDDEN}@", text)
    return _KEY.sub(rf"\1{HIDDEN}", _NAMED.sub(rf"\1{HIDDEN}", text))


def _of_environment() -> list[str]:
    """Values of variables that are named as secrets, which a library's error may repeat."""
    found = (value for name, value in os.environ.items() if len(value) >= SHORTEST and _is_secret(name))
    return sorted(found, key=len, reverse=True)


def _is_secret(name: str) -> bool:
    """
    >>> [name for name in ("api_key", "HF_TOKEN", "HF_TOKEN_PATH", "token_env", "max_new_tokens") if _is_secret(name)]
    ['api_key', 'HF_TOKEN']
    """
    return _NAMED.fullmatch(f"{name}=x") is not None or _KEY.fullmatch(f"{name}=x") is not None


def redacted_values(value: Any) -> Any:
    """Of nested dictionaries and lists the same, every text in them without secrets, and none under a secret's name.

    >>> redacted_values({"extra": {"api_key": "abc", "models": ["https://me:word@host"]}})
    {'extra': {'api_key': '***', 'models': ['https://***@host']}}
    """
    if isinstance(value, Mapping):
        return {
            key: HIDDEN if isinstance(part, str) and _is_secret(str(key)) else redacted_values(part)
            for key, part in value.items()
        }
    if isinstance(value, list | tuple):
        return [redacted_values(part) for part in value]
    return redacted(value) if isinstance(value, str) else value


def visible(text: str) -> str:
    r"""The text with control characters, marks of direction and halves of surrogate pairs spelled out.

    >>> visible("a\x1b[31mb\u202ec\nd é 🙂")
    'a\\x1b[31mb\\u202ec\\nd é 🙂'
    """
    return "".join(c if c.isprintable() or c == "\xa0" else spelled(c) for c in text)


def spelled(character: str) -> str:
    """As a Python literal spells it."""
    return character.encode("unicode_escape").decode()


def short(content: Content) -> str:
    """A prompt, or a response, as an error names it: the beginning of what its last message says.

    >>> short([{"role": "user", "content": "tell me " + 40 * "more "}])
    "'tell me more more more more more more more more more more more more more more...'"
    """
    text = content if isinstance(content, str) else content[-1]["content"]
    return repr(text if len(text) <= 80 else text[:77] + "...")


def shown(text: str) -> str:
    """One line of text for people."""
    return visible(redacted(text))


class Formatter(logging.Formatter):
    """Of log messages, as `shown`; a traceback keeps its lines."""

    def format(self, record: logging.LogRecord) -> str:
        return "\n".join(map(shown, super().format(record).split("\n")))
