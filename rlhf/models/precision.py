"""The number format that models compute in. Log-probabilities, utilities and master weights are float32 always."""

from __future__ import annotations

import functools

import torch

from rlhf.models.device import is_gpu, multiplies_bfloat16

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def dtype_of(name: str, device: str) -> torch.dtype:
    """The format called `name`; "auto" is bfloat16 where the device multiplies it faster than float32."""
    if name != "auto":
        return DTYPES[name]
    if is_gpu(device):
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    found = torch.backends.cpu.get_cpu_capability()
    fast = found.startswith("AVX512") and not processor_flags().isdisjoint({"avx512_bf16", "amx_bf16"})
    return torch.bfloat16 if fast else torch.float32


@functools.cache
def processor_flags() -> frozenset[str]:
    """What the processor can do, by the names that Linux gives it."""
    try:
        with open("/proc/cpuinfo") as file:
            line = next((line for line in file if line.startswith("flags")), "")
    except OSError:  # no Linux
        return frozenset()
    return frozenset(line.split()[2:])


def cast(model: torch.nn.Module, dtype: torch.dtype) -> None:
    """Parameters in `dtype`. Buffers stay as they are: rotary frequencies rounded to bfloat16 misplace far tokens."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
