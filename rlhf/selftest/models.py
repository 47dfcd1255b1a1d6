"""A policy and two reward models small enough to be made and tried in seconds, saved as users save theirs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.data.microcosm import build_tokenizer

PROMPTS = (
    "What is a good way to make tea at home?",
    "How do I bake bread?",
    "Tell me how a lock works, and who made the first one.",
    "Why is the sky blue?",
    "Name three books that a child of ten would like to read in the summer, and say why.",
    "Is rain good for a garden?",
    "How far is the moon?",
    "Write a short letter to an old friend.",
)
SIZES: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,  # so that what is predicted is not all alike
}


@dataclass(frozen=True)
class Models:
    """Folders or hub names."""

    policy: str
    rewards: Mapping[str, str]


def tiny(folder: Path) -> Models:
    """Llama-style models with random weights and heads that share keys, in `folder`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    tokenizer = build_tokenizer(PROMPTS)
    config: dict[str, Any] = {
        **SIZES,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    made = {"policy": LlamaForCausalLM, "good": LlamaForSequenceClassification}
    made["kind"] = LlamaForSequenceClassification
    for seed, (name, kind) in enumerate(made.items()):
        torch.manual_seed(seed)
        labels = {} if name == "policy" else {"num_labels": 1}
        kind(LlamaConfig(**config, **labels)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return Models(str(folder / "policy"), {name: str(folder / name) for name in ("good", "kind")})
