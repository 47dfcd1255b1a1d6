"""The environment in which the pages' templates are filled."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template

from rlhf.shown import spelled

# Of what a page may say, what would change how the rest of it reads: control characters but tab and end of line, and
# marks that turn the direction of what follows.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def template(name: str, helpers: Iterable[Callable[..., Any]]) -> Template:
    """A template of this folder. `helpers` are its filters and functions, by their own names.

    Every text that is put in is escaped, and its control characters and marks of direction are spelled out; a name
    that the template does not know is an error.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        finalize=_plain,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    known = {f.__name__: f for f in helpers}
    environment.filters |= known
    environment.globals |= known
    return environment.get_template(name)


def _plain(value: Any) -> Any:
    r"""
    >>> _plain("a\x00b\u202ec\nd")
    'a\\x00b\\u202ec\nd'
    """
    return _COMMANDS.sub(lambda found: spelled(found[0]), value) if type(value) is str else value
