"""The environment in which the pages' templates are filled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, Template


def template(name: str, helpers: Iterable[Callable[..., Any]]) -> Template:
    """A template of this folder. `helpers` are its filters and functions, by their own names.

    Every text that is put in is escaped; a name that the template does not know is an error.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    known = {f.__name__: f for f in helpers}
    environment.filters |= known
    environment.globals |= known
    return environment.get_template(name)
