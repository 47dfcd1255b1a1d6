"""The kinds of reward sources. Imports no torch."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points

from rlhf.sources.source import Source

GROUP = "rlhf.sources"  # of entry points: other packages' kinds, by name

KINDS = {
    "classifier": "rlhf.sources.classifier:ClassifierSource",
    "function": "rlhf.sources.function:FunctionSource",
    "http": "rlhf.sources.http:HttpSource",
    "judge": "rlhf.sources.judge:JudgeSource",
}


def source_class(key: str, kind: object) -> type[Source]:
    """The class of a kind: one of `KINDS`, of an installed package's entry points, or "package.module:Class".

    Raises:
        ValueError: there is none; it names the key.
    """
    if not isinstance(kind, str):
        raise ValueError(
            f"{key}.kind is missing: begin with a source of conf/source, as in +source@{key}=classifier"
        )
    installed = {found.name: found.value for found in entry_points(group=GROUP)}
    place = kind if ":" in kind else (installed | KINDS).get(kind)
    if place is None:
        known = ", ".join([*KINDS, *installed])
        raise ValueError(
            f"{key}.kind={kind} is not one of {known}, nor package.module:Class of one of your own"
        )
    module, _, name = place.partition(":")
    try:
        found = getattr(import_module(module), name)
    except Exception as error:  # whatever another package's module does when it is imported
        raise ValueError(f"{key}.kind={kind} cannot be imported: {type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Source)):
        raise ValueError(f"{key}.kind={kind} is no subclass of rlhf.sources.source.Source")
    return found
