"""Tiny configurations of every causal language model that `transformers` has.

A family's sizes are set by name wherever its configuration class has the field; `ODD` says what else a family needs,
and `VARIANTS` the boundaries that a family has beyond its first configuration. Windows, chunks and original lengths are
shorter than the prompts that `measure.py` samples from. Kinds of layers are those of the family's own default, each at
least once.
"""

from __future__ import annotations

from typing import Any

from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

VOCABULARY, PAD, END = 60, 0, 1
WINDOW = 12
"""Tokens that a layer with a window looks back on; also chunks, and the original length of stretched rotary kinds."""

SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "pad_token_id": PAD,
    "eos_token_id": END,
    "bos_token_id": 2,
    "decoder_start_token_id": 2,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "ffn_hidden_size": 96,
    "decoder_ffn_dim": 96,
    "encoder_ffn_dim": 96,
    "num_hidden_layers": 3,
    "n_layer": 3,
    "n_layers": 3,
    "num_layers": 3,
    "decoder_layers": 3,
    "encoder_layers": 3,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "rotary_dim": 8,
    "sliding_window": WINDOW,
    "window_size": WINDOW,
    "attention_chunk_size": WINDOW,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "index_topk": 8,
    "index_head_dim": 16,
    "index_n_heads": 8,
    "state_size": 8,
    "mamba_d_state": 8,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "mamba_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_head_dim": 16,
    "linear_num_heads": 4,
    "ssm_state_size": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "swa_head_dim": 32,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "logits_mup_width_multiplier": 1.0,
    "sliding_window_size": WINDOW,
    "rel_extent": 64,
    "index_block_size": 4,
    "shared_intermediate_size": 32,
    "dense_intermediate_size": 96,
    "moe_shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "o_groups": 2,
    "o_lora_rank": 16,
    "adapter_in_dim": 64,
    "adapter_input_size": 64,
    "adapter_out_dim": 64,
    "hidden_size_global": 64,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 16,
    "image_size": 32,
    "patch_size": 16,
}
KINDS = ("layer_types", "layers_block_type", "mlp_layer_types")
"""Fields that name the kind of each layer."""

DECODER = {"is_decoder": True}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": WINDOW}
NO_FLOOR = {"time_step_min": 1e-9}
"""`transformers` keeps time steps above this floor in whole passes, and not in steps: 0.001 makes up to 0.002 nats."""

ODD: dict[str, dict[str, Any]] = {
    "bert": DECODER,
    "bert-generation": DECODER,
    "big_bird": DECODER | {"attention_type": "original_full"},
    "bigbird_pegasus": {"attention_type": "original_full"},
    "camembert": DECODER,
    "data2vec-text": DECODER,
    "electra": DECODER,
    "ernie": DECODER,
    "megatron-bert": DECODER,
    "rembert": DECODER | {"input_embedding_size": 32, "output_embedding_size": 48},
    "roberta": DECODER,
    "roberta-prelayernorm": DECODER,
    "roc_bert": DECODER | {"pronunciation_vocab_size": VOCABULARY, "shape_vocab_size": VOCABULARY},
    "roformer": DECODER,
    "xlm-roberta": DECODER,
    "xlm-roberta-xl": DECODER,
    "xmod": DECODER | {"languages": ("en",), "default_language": "en"},
    "xlm": {"causal": True, "emb_dim": 64},
    "bamba": {"attn_layer_indices": [0, 2], "num_hidden_layers": 4},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "num_hidden_layers": 4, "mamba_dt_rank": 8}
    | {"expert_layer_period": 2, "expert_layer_offset": 1, "use_mamba_kernels": False},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2, "num_hidden_layers": 4},
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "cpmant": {"dim_head": 16, "dim_ff": 96, "prompt_length": 4, "position_bias_max_distance": 64},
    "ctrl": {"dff": 96},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 96, "hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "falcon_h1": {"mamba_d_ssm": 128},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0],
        "laurel_rank": 8,
    },
    "gpt_neo": {"num_layers": 4, "attention_types": [[["global", "local"], 2]]},
    "helium": {"head_dim": 16},
    "lfm2_moe": {
        "layer_types": ["conv", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
    },
    "longcat_flash": {"head_dim": 16, "num_layers": 2, "moe_topk": 2, "zero_expert_num": 2}
    | {"expert_ffn_hidden_size": 32},
    "nemotron_h": {"chunk_size": 8, "n_groups": 2} | NO_FLOOR,
    "zamba2": NO_FLOOR,
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "chunk_size": 8},
    "minicpm3": {"scale_emb": 1.0, "dim_model_base": 64},
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 8,
        "indexer_compress_ratio": 2,
        "hc_lowrank": 16,
    },
    "reformer": {
        "is_decoder": True,
        "axial_pos_shape": (8, 16),
        "axial_pos_embds_dim": (32, 32),
        "attn_layers": ["local", "local"],
        "num_hidden_layers": 2,
        "attention_head_size": 16,
        "feed_forward_size": 96,
        "local_attn_chunk_length": 128,
    },
    "rwkv": {"context_length": 128},
    "zaya": {"num_experts_per_tok": 1},
    "xlstm": {"num_heads": 4, "num_blocks": 3, "num_hidden_layers": 3, "qk_dim_factor": 1.0},
    "xlnet": {"d_inner": 96},
}
REASONS = {
    "gemma3n": "its vision part needs the package timm; as a text model: gemma3n_text",
    "gemma4_assistant": "drafts tokens for another model, from that model's states",
    "gemma4_unified_assistant": "drafts tokens for another model, from that model's states",
    "musicgen": "makes audio codes, of several codebooks at a time",
    "musicgen_melody": "makes audio codes, of several codebooks at a time",
}
"""Entries of `transformers`' list of causal language models that are none."""

VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "llama": {
        "tied": {"tie_word_embeddings": True},
        "heads of 16": {"head_dim": 16},
        "llama3 rotary": {
            "rope_parameters": YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        },
        "linear rotary": {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
        "yarn rotary": {"rope_parameters": YARN},
        "dynamic rotary": {
            "max_position_embeddings": 64,
            "rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0},
        },
    },
    "mistral": {"no window": {"sliding_window": None}, "heads of 16": {"head_dim": 16}},
    "qwen2": {"window": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}},
    "phi3": {
        "longrope": {
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": [1.0] * 8,
                "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
                "original_max_position_embeddings": 32,
            },
            "original_max_position_embeddings": 32,
            "sliding_window": None,
        },
    },
    "ministral3": {
        "beyond its original length": {
            "rope_parameters": YARN
            | {"factor": 1.0, "llama_4_scaling_beta": 0.5, "beta_fast": 32.0, "beta_slow": 1.0}
            | {"mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16},
            "sliding_window": None,
        },
    },
    "smollm3": {"heads of 32": {"hidden_size": 128, "num_hidden_layers": 4}},
    "falcon": {
        "alibi": {"alibi": True},
        "new architecture": {"new_decoder_architecture": True, "num_kv_heads": 2, "multi_query": False},
    },
    "gemma2": {"caps": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}},
    "mixtral": {"no window": {"sliding_window": None}},
    "qwen2_moe": {"window": {"use_sliding_window": True, "max_window_layers": 1, "layer_types": None}},
    "granite": {
        "multipliers": {
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_multiplier": 0.3,
            "logits_scaling": 2.0,
        }
    },
    "opt": {"projected": {"word_embed_proj_dim": 32, "do_layer_norm_before": False}},
    "llama4_text": {"temperature": {"floor_scale": 8, "attn_scale": 0.5, "num_hidden_layers": 4}},
    "phi": {"heads of 32": {"hidden_size": 128}},
    "gpt2": {"heads of 32": {"n_embd": 128}},
    "bert": {"as an encoder": {"is_decoder": False}},
}
"""Boundaries of a family beside its first configuration: by family, a name and what differs."""


def names() -> list[str]:
    """Every row of the table: a family, or a family and one of its variants, "llama: tied"."""
    return sorted(
        row
        for family in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        for row in (family, *(f"{family}: {variant}" for variant in VARIANTS.get(family, {})))
    )


def make(name: str) -> Any:
    """The configuration of a row."""
    family, _, variant = name.partition(": ")
    changes = VARIANTS[family][variant] if variant else {}
    return _tiny(CONFIG_MAPPING[family], ODD.get(family, {}) | changes)


def _tiny(kind: type, given: dict[str, Any]) -> Any:
    """A configuration of a class with the sizes of above, and what is given."""
    taken, aliases = getattr(kind, "__dataclass_fields__", {}), getattr(kind, "attribute_map", {})
    values = {name: value for name, value in SIZES.items() if name in taken}
    if "kv_lora_rank" in taken:  # keys and values are made for every head
        values.pop("head_dim", None)
        values["num_key_value_heads"] = values["num_attention_heads"]
    default = _default(kind)
    kinds = {
        name: list(dict.fromkeys(getattr(default, name, None) or []))
        for name in KINDS
        if name in taken and name not in aliases
    }
    if any(len(found) > 1 for found in kinds.values()):
        values["num_hidden_layers"] = max(4, *map(len, kinds.values()))
    layers = given.get("num_hidden_layers", values.get("num_hidden_layers", 3))
    values |= {name: (found * layers)[:layers] for name, found in kinds.items() if found}
    for name in getattr(kind, "sub_configs", {}):
        part = getattr(default, name, None)
        if part is not None:
            inner = ODD.get(part.model_type, {}) | given.get(name, {})
            values[name] = _tiny(type(part), inner).to_dict()
    return kind(**values | {n: v for n, v in given.items() if n not in getattr(kind, "sub_configs", {})})


def _default(kind: type) -> Any:
    """The class's own default; a few classes refuse theirs."""
    try:
        return kind()
    except ValueError:
        return None


def chooses(config: Any) -> bool:
    """Whether the model chooses experts, or tokens to attend to, by their scores."""
    text = config.get_text_config().to_dict()
    return any("expert" in name or name.startswith("index") for name in text)
