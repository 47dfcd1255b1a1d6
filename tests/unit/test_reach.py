"""What configurations say of lengths."""

import numpy as np
import pytest
from transformers import (
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoConfig,
    Llama4TextConfig,
    LlamaConfig,
    Ministral3Config,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen2MoeConfig,
)

from rlhf.models.reach import Reach

LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LlamaConfig(max_position_embeddings=64), Reach(None, None, 64)),
        (GPT2Config(n_positions=32), Reach(None, None, 32)),
        (MistralConfig(sliding_window=12, max_position_embeddings=64), Reach(12, None, 64)),
        (MistralConfig(sliding_window=None, max_position_embeddings=64), Reach(None, None, 64)),
        (Qwen2Config(sliding_window=12, max_position_embeddings=64), Reach(None, None, 64)),
        (
            Qwen2MoeConfig(use_sliding_window=True, sliding_window=12, max_window_layers=1, max_position_embeddings=64),
            Reach(12, None, 64),
        ),
        (Gemma3TextConfig(sliding_window=16, max_position_embeddings=64), Reach(16, None, 64)),
        (GPTNeoConfig(window_size=8, max_position_embeddings=64), Reach(8, None, 64)),
        (
            Phi3Config(
                hidden_size=64, num_attention_heads=4, rope_parameters=LONGROPE, max_position_embeddings=128,
                original_max_position_embeddings=32, pad_token_id=0,
            ),
            Reach(None, 32, 128, (32,)),
        ),
        (Ministral3Config(rope_parameters=YARN, max_position_embeddings=64), Reach(None, None, 64, (16,))),
    ],
    ids=lambda x: getattr(x, "model_type", ""),
)  # fmt: skip
def test_reach_of_a_configuration(config, expected):
    assert Reach.of(config) == expected


def test_chunks_and_temperatures_of_llama_4():
    reach = Reach.of(Llama4TextConfig(attention_chunk_size=12, floor_scale=8))
    assert (reach.window, reach.beginnings) == (12, (8,))


def test_sequences_that_are_computed_alike_are_together():
    reach = Reach(window=10, switch=20)
    assert reach.parts([5, 30, 15, 10, 11, 21]) == [([0, 3], True), ([2, 4], False), ([1, 5], False)]
    assert Reach().parts([5, 30]) == [([0, 1], True)]
    assert Reach(window=4).narrowed(Reach(window=9, switch=7, limit=3)) == Reach(4, 7, 3)
    assert reach.switched(np.array([20, 21])).tolist() == [False, True]


def test_a_response_stays_on_one_side_of_a_switch():
    reach = Reach(switch=20, limit=50)
    assert reach.fault(12, 8) is None
    assert "cross 20 tokens" in reach.fault(13, 8)
    assert "cross 20 tokens" in reach.fault(20, 1)
    assert reach.fault(21, 20) is None
    assert "50 positions" in reach.fault(40, 11)
