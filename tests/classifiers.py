"""A tiny sequence classifier with random weights of every family that transformers has."""

from __future__ import annotations

import inspect

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

VOCABULARY = 60
NO_TEXT = {  # they read pictures, or words with their places on a page
    "layoutlm",
    "layoutlmv2",
    "layoutlmv3",
    "lilt",
    "markuplm",
    "modernvbert",
    "tapas",
    "ultravbert",
}
NOT_TINY = {"qwen3_5", "t5gemma2"}  # only with pictures' encoders of millions of parameters
NOT_TRIED = {"cohere_compass_text", "zamba"}  # what configuration makes a tiny one is not said
FAMILIES = sorted(NAMES.keys() - NO_TEXT - NOT_TINY - NOT_TRIED)

SIZES = {
    **dict.fromkeys(["hidden_size", "d_model", "n_embd", "emb_dim", "dim"], 32),
    **dict.fromkeys(["embedding_size", "word_embed_proj_dim", "moe_intermediate_size"], 32),
    **dict.fromkeys(["intermediate_size", "d_ff", "ffn_dim", "n_inner", "d_inner", "dff", "hidden_dim"], 48),
    **dict.fromkeys(["encoder_ffn_dim", "decoder_ffn_dim", "shared_expert_intermediate_size"], 48),
    **dict.fromkeys(["num_hidden_layers", "num_layers", "n_layer", "n_layers"], 2),
    **dict.fromkeys(["encoder_layers", "decoder_layers", "num_key_value_heads", "num_experts_per_tok"], 2),
    **dict.fromkeys(["num_attention_heads", "num_heads", "n_head", "n_heads", "num_experts"], 4),
    **dict.fromkeys(["encoder_attention_heads", "decoder_attention_heads", "num_local_experts"], 4),
    **dict.fromkeys(["head_dim", "d_kv", "d_head"], 8),
    **dict.fromkeys(["max_position_embeddings", "n_positions", "max_seq_len"], 128),
    "vocab_size": VOCABULARY,
    "use_mamba_kernels": False,
}
LATENT = {
    "num_key_value_heads": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "moe_intermediate_size": 16,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
PICTURES = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
OWN = {
    **dict.fromkeys(["axk1", "axk2", "deepseek_v2", "deepseek_v3", "minicpm3", "mistral4"], LATENT),
    **dict.fromkeys(["qwen3_next", "qwen3_5_text"], LINEAR),
    "esmc": {"num_key_value_heads": 4},
    "gemma3": {
        "text_config": SIZES,
        "vision_config": PICTURES | {"image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 12},
    "gptj": {"rotary_dim": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "longformer": {"attention_window": [8, 8]},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 8},
    "perceiver": {"num_latents": 4, "d_latents": 16, "num_blocks": 1, "num_self_attends_per_block": 1},
    "reformer": {
        "axial_pos_embds": False,
        "attn_layers": ["local", "lsh"],
        "hash_seed": 0,
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
        "num_hashes": 1,
        "is_decoder": False,
    },
    "roc_bert": {
        "pronunciation_vocab_size": 9,
        "shape_vocab_size": 9,
        "pronunciation_embed_dim": 8,
        "shape_embed_dim": 8,
    },
    "t5": {"decoder_start_token_id": 0},
    "t5gemma": {"encoder": SIZES, "decoder": SIZES},
    "xmod": {"default_language": "en_XX"},
    "zamba2": {
        "layers_block_type": ["mamba", "hybrid"],
        "mamba_d_state": 8,
        "mamba_headdim": 8,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
    },
}


def classifier(family: str, pad: int | None, end: int = 1, **changes: object) -> PreTrainedModel:
    """One label; weights wide enough that rewards of different texts differ."""
    kind = CONFIG_MAPPING[family]
    own = OWN.get(family, {}) | changes
    known = {*inspect.signature(kind.__init__).parameters, *getattr(kind, "__dataclass_fields__", {})}
    alias = kind.attribute_map
    sizes = {k: v for k, v in SIZES.items() if k in known or alias.get(k) in known}
    given = {k: v for k, v in {**sizes, **own}.items() if alias.get(k) not in sizes or k in own}
    config = kind(**given, num_labels=1, pad_token_id=pad, eos_token_id=end, bos_token_id=2)
    config.get_text_config().pad_token_id = pad
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    for weight in model.parameters():
        if weight.ndim >= 2:
            torch.nn.init.normal_(weight, std=0.3)
    return model
