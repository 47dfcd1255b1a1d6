"""The DeepSpeed configuration of a learner."""

from __future__ import annotations

import math
from typing import Any

import torch

from rlhf.config import DeepSpeedConfig
from rlhf.models.precision import dtype_of


def deepspeed_settings(
    config: DeepSpeedConfig, learning_rate: float, weight_decay: float, clip: float, device: str
) -> dict:
    """What `deepspeed.initialize` is given. Gradients add up in float32, over micro-batches and over ranks.

    The optimiser is PyTorch's on every device: DeepSpeed's own would be compiled at start, by a CUDA toolkit that need
    not be there.

    ZeRO 0 in bfloat16 is done by ZeRO 1, which gives the same: the optimiser that DeepSpeed has for it adds gradients
    up in bfloat16 and is made with a step of zeros, which Adam counts.
    """
    bfloat16 = dtype_of(config.dtype, device) == torch.bfloat16
    optimizer: dict[str, Any] = {
        "lr": learning_rate,
        "weight_decay": weight_decay,
        "betas": [0.9, 0.95],
        "torch_adam": True,
        "fused": True,
    }
    zero: dict[str, Any] = {"stage": max(config.zero_stage, 1) if bfloat16 else config.zero_stage}
    if config.offload_optimizer:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 1,
        "managed_gradient_accumulation": False,
        "gradient_clipping": clip or math.inf,  # at 0 DeepSpeed would tell no norm
        "optimizer": {"type": "AdamW", "params": optimizer},
        "zero_optimization": zero,
        "bf16": {"enabled": bfloat16},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
