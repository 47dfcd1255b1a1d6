"""Classes that a configuration names: of this package, of installed ones by their entry points, or of a user's own
module. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TypeVar

Kind = TypeVar("Kind")


def plugin(key: str, name: str, known: Mapping[str, str], group: str, base: type[Kind]) -> type[Kind]:
    """The class of a name.

    Args:
        key: of the configuration, for errors.
        name: one of `known`, of the entry points, or "package.module:Class".
        known: this package's own, "module:Class" by name; they cannot be replaced by entry points.
        group: of entry points in which other packages offer theirs.
        base: the class that all derive from.

    Raises:
        ValueError: there is no such class, or its module cannot be imported; it names the key.
    """
    installed = {found.name: found.value for found in entry_points(group=group)}
    place = name if ":" in name else (installed | dict(known)).get(name)
    if place is None:
        every = ", ".join([*known, *installed])
        raise ValueError(f"{key}={name} is not one of {every}, nor package.module:Class of one of your own")
    module, _, attribute = place.partition(":")
    try:
        found = getattr(import_module(module), attribute)
    except Exception as error:  # whatever another package's module does when it is imported
        raise ValueError(f"{key}={name} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{key}={name} is no subclass of {base.__module__}.{base.__qualname__}")
    return found
