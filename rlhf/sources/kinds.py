"""The kinds of reward sources. Imports no torch."""

from __future__ import annotations

from rlhf.plugins import named_class
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
    return named_class(f"{key}.kind", kind, KINDS, GROUP, Source)
