"""Which models can be no policy, by their configuration alone: before any weight is read.

The page docs/families.md tells how each family of transformers is served (`python -m benchmarks.families`).
"""

from __future__ import annotations

from typing import Any

ENCODERS = {
    "bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie", "megatron-bert", "rembert",
    "roberta", "roberta-prelayernorm", "roc_bert", "roformer", "xlm-roberta", "xlm-roberta-xl", "xmod",
}  # fmt: skip
"""Types whose tokens look both ways, unless the configuration says is_decoder."""

NO_POLICIES = {
    "cpmant": "its tokens look ahead within a prompt",
    "gemma4_assistant": "it drafts tokens from another model's states",
    "gemma4_unified_assistant": "it drafts tokens from another model's states",
    "musicgen": "it makes audio codes, several at a time",
    "musicgen_melody": "it makes audio codes, several at a time",
    "prophetnet": "it predicts several tokens at a time, and its passes over a whole text are others than step by step",
    "whisper": "it transcribes sound",
    "xlnet": "its tokens look ahead, unless a mask of their order says otherwise",
}
"""Types of transformers' list of causal language models that are none, and why."""


def fault_of_policy(config: Any) -> str | None:
    """Why a model of this configuration is no causal language model of text; None: it may be one."""
    kind = config.model_type
    if kind in NO_POLICIES:
        return NO_POLICIES[kind]
    if getattr(config, "is_encoder_decoder", False):
        return "it reads with an encoder and answers with a decoder"
    if kind in ENCODERS and not getattr(config, "is_decoder", False):
        return "its tokens look both ways; a decoder of this type says is_decoder=true in its config.json"
    return None
