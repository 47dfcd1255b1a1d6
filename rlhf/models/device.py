"""What a role computes on: the one place that decides it, and that asks for GPUs.

A role that is given a GPU, or a part of one, computes on it, and on nothing else: a GPU that cannot be used is an
error. Ray shows a process only its own GPUs, so its device is always the first. Imports torch only when it looks.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

from rlhf.config import RoleConfig

CPU, GPU = "cpu", "cuda"  # as PyTorch calls them; builds for AMD's GPUs say "cuda" too
BACKENDS = {CPU: "gloo", GPU: "nccl"}


@dataclass(frozen=True)
class Compute:
    """What a process of a role computes with.

    >>> Compute.of(RoleConfig(count=1, cpus=2.5, gpus=0.5))
    Compute(device='cuda', backend='nccl', accelerator='cuda', threads=2, shared=True)
    """

    device: str  # as PyTorch calls it
    backend: str  # of collectives among such processes
    accelerator: str  # as DeepSpeed calls it
    threads: int  # of PyTorch's own on the host
    shared: bool  # whether other processes have parts of the same GPU

    @classmethod
    def of(cls, role: RoleConfig) -> Compute:
        device = GPU if role.gpus > 0 else CPU
        return cls(device, BACKENDS[device], device, max(1, int(role.cpus)), 0 < role.gpus < 1)

    def check(self, key: str) -> None:
        """In the process itself.

        Raises:
            ValueError: it was given a GPU that it cannot use; it names the role's key and what to do.
        """
        if self.device == GPU and (fault := gpu_fault()) is not None:
            raise ValueError(f"{key}.gpus: {fault}")

    def rest(self) -> None:
        """Before an answer: who shares the GPU, and waits for it, gets the memory that was kept for the next call."""
        if self.shared:
            release(self.device)


@dataclass(frozen=True)
class Gpu:
    """A GPU that this process sees."""

    index: int
    name: str
    capability: str  # of its kind: 9.0
    free: int  # bytes
    total: int  # bytes
    bfloat16: bool  # whether it multiplies it itself

    @property
    def device(self) -> str:
        return f"{GPU}:{self.index}"


def built_for() -> str | None:
    """What this PyTorch was built for beside CPUs: CUDA or ROCm and its version; None: nothing."""
    import torch

    if torch.version.cuda is not None:
        return f"CUDA {torch.version.cuda}"
    return None if torch.version.hip is None else f"ROCm {torch.version.hip}"


def gpu_fault() -> str | None:
    """Why this process cannot compute on a GPU; None: it can."""
    import torch

    if (build := built_for()) is None:
        return (
            f"PyTorch {torch.__version__} is built without CUDA, so it sees no GPU; install a build with it "
            "(docs/gpus.md), or set gpus to 0"
        )
    if torch.cuda.is_available():
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    shown = "" if visible is None else f" (CUDA_VISIBLE_DEVICES={visible})"
    return (
        f"PyTorch {torch.__version__} for {build} finds no GPU here{shown}: there is none, or the driver is too old; "
        "`rlhf doctor` says which"
    )


def gpu_count() -> int:
    """GPUs that this process can compute on."""
    import torch

    return torch.cuda.device_count() if gpu_fault() is None else 0


def gpus() -> list[Gpu]:
    """All GPUs that this process can compute on. Opens each."""
    import torch

    found = []
    for index in range(gpu_count()):
        known: Any = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        capability = f"{known.major}.{known.minor}"
        with torch.cuda.device(index):
            found.append(Gpu(index, known.name, capability, free, total, multiplies_bfloat16(GPU)))
    return found


def multiplies_bfloat16(device: str) -> bool:
    """Whether a GPU, the current one, multiplies bfloat16 itself; of CPUs `rlhf/models/precision.py` knows."""
    import torch

    assert is_gpu(device)
    return torch.cuda.is_bf16_supported(including_emulation=False)


def is_gpu(device: str) -> bool:
    """
    >>> is_gpu("cuda:1"), is_gpu("cpu")
    (True, False)
    """
    return device.partition(":")[0] == GPU


def release(device: str) -> None:
    """Gives memory that no tensor is in back to the device, for other processes."""
    import gc

    gc.collect()
    if is_gpu(device):
        import torch

        torch.cuda.empty_cache()


def collectives() -> str | None:
    """The library for collectives among GPUs, and its version; None: this PyTorch has none."""
    import torch

    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return None
    return "NCCL " + ".".join(map(str, torch.cuda.nccl.version()))
