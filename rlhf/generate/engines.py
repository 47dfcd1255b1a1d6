"""The generation engines by name."""

from __future__ import annotations

from rlhf.code import source_code
from rlhf.config import RolloutConfig
from rlhf.generate.engine import Engine
from rlhf.plugins import named_class

GROUP = "rlhf.engines"  # of entry points: other packages' engines, by name

ENGINES = {
    "embedded": "rlhf.generate.transformers_engine:TransformersEngine",
    "vllm": "rlhf.generate.vllm_engine:VllmEngine",
}


def engine_class(rollout: RolloutConfig) -> type[Engine]:
    """The engine that is configured.

    Raises:
        ValueError: there is none of this name; it names the key.
    """
    return named_class("rollout.engine", rollout.engine, ENGINES, GROUP, Engine)  # type: ignore[type-abstract]


def engine_identity(rollout: RolloutConfig) -> object:
    """What samples depend on beside the policy and the settings that all engines have: the engine, its code, and what
    it names itself (`Engine.identity`)."""
    kind = engine_class(rollout)
    return (rollout.engine, source_code(kind), kind.identity(rollout))
