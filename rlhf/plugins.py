"""Classes that a configuration names: of this package, of installed ones by their entry points, or of a user's own
module. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any, TypeVar

Kind = TypeVar("Kind")


def named_object(what: str, name: str, known: Mapping[str, str], group: str) -> Any:
    """The object of a name.

    Args:
        what: key and value of the configuration, for errors.
        name: one of `known`, of the entry points, or "package.module:Object".
        known: this package's own, "module:Object" by name; entry points do not replace them.
        group: of entry points in which other packages offer theirs.

    Raises:
        ValueError: there is none, or its module cannot be imported.
    """
    installed = {found.name: found.value for found in entry_points(group=group)}
    place = name if ":" in name else (installed | dict(known)).get(name)
    if place is None:
        every = ", ".join([*known, *installed])
        raise ValueError(f"{what} is not one of {every}, nor package.module:Class of one of your own")
    module, _, attribute = place.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except Exception as error:  # whatever another package's module does when it is imported
        raise ValueError(f"{what} cannot be imported: {type(error).__name__}: {error}") from error


def named_class(key: str, name: str, known: Mapping[str, str], group: str, base: type[Kind]) -> type[Kind]:
    """The class of a name, as `named_object`, under `key` of the configuration.

    Raises:
        ValueError: it does not derive from `base`; and as above.
    """
    found = named_object(f"{key}={name}", name, known, group)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(f"{key}={name} is no subclass of {base.__module__}.{base.__qualname__}")
    return found
