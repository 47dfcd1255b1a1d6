"""Compiled layers for CPUs that multiply bfloat16 (AVX512-BF16): attention, linear layers, norms, gates and rotary
positions, and a step of sampling made of them.

The system's C compiler builds the `.c` files at first use, once for each kind of processor, into the user's cache
folder. Without such a processor or a compiler `library` is None, and PyTorch's operations serve.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from rlhf.models.precision import processor_flags

SOURCES = [Path(__file__).with_name(name) for name in ("attention.c", "layers.c", "linear.c", "vectors.h")]
FUNCTIONS = {
    "tree_forward": "ppppppplllllf",
    "tree_backward": "ppppppppppplllllf",
    "decode": "ppppppppppppplllllfi",
    "norm_forward": "pppplllf",
    "norm_backward": "pppppplll",
    "gate_forward": "ppplll",
    "gate_backward": "ppppplll",
    "rotate": "ppppplllli",
    "pack_linear": "ppllll",
    "linear": "pppppllli",
}
"""The arguments of the compiled functions."""
LANES = 16
"""Numbers in a vector: sizes are multiples of it."""
OPTIONS = ("-O3", "-fopenmp", "-march=native", "-mprefer-vector-width=512", "-shared", "-fPIC")

log = logging.getLogger(__name__)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled functions, or None where they cannot be had; it says why, once."""
    if "avx512_bf16" not in processor_flags():
        return None
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        log.warning("no C compiler (cc): bfloat16 models take PyTorch's slower operations")
        return None
    try:
        return _declared(ctypes.CDLL(str(_built(shlex.split(compiler)))))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or error
        log.warning("%s could not compile rlhf/native, so PyTorch's operations serve: %s", compiler, said)
        return None


def _built(compiler: list[str]) -> Path:
    """The shared library of this source, compiler and processor; built if it is not there."""
    kind = [*(path.read_text() for path in SOURCES), *compiler, *OPTIONS, *sorted(processor_flags())]
    name = hashlib.sha256("\n".join(kind).encode()).hexdigest()[:16]
    folder = _folder()
    target = folder / f"native-{name}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(dir=folder) as building:
            made = Path(building) / target.name
            sources = [str(path) for path in SOURCES if path.suffix == ".c"]
            command = [*compiler, *OPTIONS, *sources, "-o", str(made), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True)
            os.replace(made, target)
    return target


def _folder() -> Path:
    """Where libraries are kept; without a home that can be written to, a folder of this process."""
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlhf"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):
        return Path(tempfile.mkdtemp(prefix="rlhf-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="rlhf-"))


def _declared(found: ctypes.CDLL) -> ctypes.CDLL:
    """With the kinds of the functions' arguments: p an address, l a long, i an int, f a float."""
    kinds = {"p": ctypes.c_void_p, "l": ctypes.c_long, "i": ctypes.c_int, "f": ctypes.c_float}
    for name, arguments in FUNCTIONS.items():
        getattr(found, name).argtypes = [kinds[a] for a in arguments]
    return found


def takes(*tensors: torch.Tensor) -> bool:
    """Whether they are of the kind that compiled code computes with."""
    return all(x.dtype == torch.bfloat16 and x.device.type == "cpu" for x in tensors)


def addresses(*data: torch.Tensor | np.ndarray) -> list[int]:
    return [x.data_ptr() if isinstance(x, torch.Tensor) else x.ctypes.data for x in data]


@functools.cache
def _workers(count: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(count, thread_name_prefix="rlhf-native")


def over(count: int, work: Callable[[int, int], int]) -> None:
    """Calls `work(first, last)` on parts of 0..count, one for each of PyTorch's threads; 0 means that it worked. For
    long work: a step of sampling calls what takes microseconds, which divides itself, by OpenMP, or not at all."""
    parts = min(torch.get_num_threads(), count)
    if parts <= 1:
        failed = [work(0, count)]
    else:
        bounds = [count * i // parts for i in range(parts + 1)]
        failed = list(_workers(parts).map(work, bounds[:-1], bounds[1:]))
    check(any(failed))


def check(failed: int) -> None:
    """Of what a compiled function returned."""
    if failed:
        raise MemoryError("no memory for attention: lower deepspeed.micro_batch_tokens")
