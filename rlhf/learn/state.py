"""The state of a trainer on disk: float32 weights and Adam's moments of its trainable parameters, by name and place.

Each rank has fragments of parameters: all of each (ZeRO 0), a part of some (ZeRO 1 and 2), a part of each (ZeRO 3). It
saves its own, and loads whatever it has from whichever files hold it. So a state may be loaded by another number of
ranks, and under another ZeRO stage. There is no pickle in it (DeepSpeed's own files are pickles, and of one world).
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from rlhf.learn.trainer import Trainer

MOMENTS = ("exp_avg", "exp_avg_sq")
STEP = "step"
TYPES = {torch.float32: "F32", torch.int64: "I64"}
"""As safetensors calls them. Adam's count of steps is saved as a whole number."""


@dataclass(frozen=True)
class Fragment:
    """A part of a parameter in the optimiser's memory of this rank."""

    name: str
    shape: tuple[int, ...]  # of the whole parameter
    start: int  # where it begins in the whole, flat
    flat: torch.Tensor  # the optimiser's parameter that it is in, float32
    offset: int  # where it begins in that
    size: int

    def of(self, like_flat: torch.Tensor) -> torch.Tensor:
        """Its part of a tensor that is laid out as `flat`; a view, float32 [size]."""
        return like_flat.detach().view(-1).narrow(0, self.offset, self.size)


def fragments(trainer: Trainer) -> list[Fragment]:
    """Of all trainable parameters what this rank has."""
    found = []
    for name, parameter in trainer.model.named_parameters():
        place = _place(trainer, parameter) if parameter.requires_grad else None
        if place is not None:
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            found.append(Fragment(name, shape, *place))
    return found


def _place(trainer: Trainer, parameter: Any) -> tuple[int, torch.Tensor, int, int] | None:
    """Start, flat tensor, offset and size of a parameter's fragment; None: the rank has nothing of it."""
    optimizer = trainer.engine.optimizer
    if hasattr(parameter, "ds_id"):  # ZeRO 3: of each rank as much, the last one's padded
        group, offset, size = optimizer.grad_position[optimizer.get_param_id(parameter)]
        start = trainer.rank * size
        size = min(size, parameter.ds_numel - start)
        return (start, optimizer.fp32_partitioned_groups_flat[group], offset, size) if size > 0 else None
    if hasattr(parameter, "_hp_mapping"):  # ZeRO 1 and 2
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        whole, part = mapping.lp_fragment_address, mapping.hp_fragment_address
        flats = getattr(optimizer, "single_partition_of_fp32_groups", None)
        if flats is None:  # DeepSpeed's optimiser for ZeRO 1 in bfloat16
            flats = optimizer.fp32_groups_flat_partition
        return whole.start, flats[mapping.param_group_index], part.start, part.numel
    return 0, parameter, 0, parameter.numel()


def _adam(trainer: Trainer) -> Any:
    """The optimiser that has the moments."""
    optimizer = trainer.engine.optimizer
    return getattr(optimizer, "optimizer", optimizer)


class Snapshot:
    """A rank's part of trainers' states: a copy, in memory that serves again for the next one, or where there is no
    room for that the state itself."""

    def __init__(self) -> None:
        self._copies: dict[str, torch.Tensor] = {}
        self._held = self._copies
        self._shapes: dict[str, tuple[int, ...]] = {}

    @property
    def size(self) -> int:
        """Bytes."""
        return sum(part.nbytes for part in self._held.values())

    def take(self, trainers: Mapping[str, Trainer], room: float = math.inf) -> bool:
        """Copies what is to be saved, if that takes at most `room` more bytes; whether it does. If not, it must be
        written before the trainers go on. What every rank has, one of them saves."""
        parts = self._parts(trainers)
        copied = sum(part.nbytes for key, part in parts.items() if key not in self._copies) <= room
        self._copies = {key: self._copy(key, part) for key, part in parts.items()} if copied else {}
        self._held = self._copies if copied else parts
        return copied

    def _parts(self, trainers: Mapping[str, Trainer]) -> dict[str, torch.Tensor]:
        """Views of what is to be saved."""
        seen = {}
        for label, trainer in trainers.items():
            state = _adam(trainer).state
            alike = trainer.engine.optimizer is _adam(trainer)  # all ranks have all
            for number, fragment in enumerate(fragments(trainer)):
                if alike and number % trainer.world != trainer.rank:
                    continue
                parts = {"": fragment.of(fragment.flat)}
                moments = state.get(fragment.flat, {})
                parts |= {f"/{key}": fragment.of(moments[key]) for key in MOMENTS if key in moments}
                if STEP in moments:
                    parts[f"/{STEP}"] = torch.as_tensor(moments[STEP]).reshape(1).to(torch.int64)
                for kind, part in parts.items():
                    seen[f"{label}/{fragment.name}@{fragment.start}{kind}"] = part.detach()
                self._shapes[f"{label}/{fragment.name}"] = fragment.shape
        return seen

    def _copy(self, key: str, part: torch.Tensor) -> torch.Tensor:
        copy = self._copies.get(key)
        if copy is None:
            return part.to("cpu", copy=True)
        return copy.copy_(part)

    def write(self, path: Path, wrote: Callable[[], object] = lambda: None) -> None:
        """A safetensors file. That package's own writer keeps the thread that trains from running meanwhile. `wrote`
        is called after each tensor."""
        ordered = sorted(self._held.items(), key=lambda item: -item[1].element_size())  # all aligned
        ends = itertools.accumulate(copy.nbytes for _, copy in ordered)
        header: dict[str, Any] = {"__metadata__": {"shapes": json.dumps(self._shapes)}}
        for (key, copy), end in zip(ordered, ends, strict=True):
            places = [end - copy.nbytes, end]
            header[key] = {"dtype": TYPES[copy.dtype], "shape": list(copy.shape), "data_offsets": places}
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with open(path, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for _, copy in ordered:
                file.write(copy.cpu().numpy().data)
                wrote()
            file.flush()
            os.fsync(file.fileno())


@dataclass(frozen=True)
class _Piece:
    start: int
    size: int
    file: Any
    key: str


class _Saved:
    """What the files of a folder hold of one trainer."""

    def __init__(self, folder: Path, label: str) -> None:
        self._folder, self._label = folder, label
        self._pieces: dict[str, list[_Piece]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            for key, shape in json.loads(file.metadata()["shapes"]).items():
                if key.startswith(f"{label}/"):
                    self.shapes[key.removeprefix(f"{label}/")] = tuple(shape)
            for key in file.keys():  # noqa: SIM118 - it is no dictionary
                if key.startswith(f"{label}/"):
                    name, _, rest = key.removeprefix(f"{label}/").rpartition("@")
                    start, _, kind = rest.partition("/")
                    size = file.get_slice(key).get_shape()[0]
                    self._pieces.setdefault(f"{name}/{kind}", []).append(_Piece(int(start), size, file, key))

    def has(self, name: str, kind: str) -> bool:
        return f"{name}/{kind}" in self._pieces

    def step(self, name: str) -> int:
        (piece, *_) = self._pieces[f"{name}/{STEP}"]
        return int(piece.file.get_tensor(piece.key)[0])

    def fill(self, into: torch.Tensor, name: str, kind: str, start: int) -> None:
        """Copies the part of a parameter that begins at `start`, as long as `into`."""
        filled = 0
        for piece in self._pieces[f"{name}/{kind}"]:
            first, last = max(start, piece.start), min(start + len(into), piece.start + piece.size)
            if first < last:
                part = piece.file.get_slice(piece.key)[first - piece.start : last - piece.start]
                into[first - start : last - start] = part.to(into.device)
                filled += last - first
        assert filled == len(into), (self._folder, name, kind, start, filled, len(into))


@torch.no_grad()
def restore(folder: Path, trainers: Mapping[str, Trainer]) -> None:
    """Sets trainers to a saved state. Every rank takes part.

    Raises:
        ValueError: the files are of other models.
    """
    for label, trainer in trainers.items():
        saved = _Saved(folder, label)
        _check(folder, label, saved.shapes, trainer)
        adam = _adam(trainer)
        moments: dict[torch.Tensor, dict[str, Any]] = {}
        if trainer.stage == 3:
            trainer.engine.optimizer.checkpoint_event_prologue()  # no rank keeps whole parameters
        for fragment in fragments(trainer):
            saved.fill(fragment.of(fragment.flat), fragment.name, "", fragment.start)
            if not saved.has(fragment.name, STEP):
                continue
            state = moments.setdefault(fragment.flat, {})
            for key in MOMENTS:
                whole = state.setdefault(key, torch.zeros_like(fragment.flat))
                saved.fill(fragment.of(whole), fragment.name, key, fragment.start)
            state[STEP] = _counted(adam, fragment.flat, saved.step(fragment.name))
        adam.state.clear()
        adam.state.update(moments)
        _compute_with(trainer)


def _counted(adam: Any, flat: torch.Tensor, step: int) -> torch.Tensor | int:
    """A count of steps as this optimiser keeps it: PyTorch's as a number of float32, DeepSpeed's as an integer."""
    if not isinstance(adam, torch.optim.Adam):
        return step
    group = adam.param_groups[0]
    on = flat.device if group["fused"] or group["capturable"] else "cpu"
    return torch.tensor(float(step), device=on)


def _check(folder: Path, label: str, saved: Mapping[str, tuple[int, ...]], trainer: Trainer) -> None:
    own = {
        name: tuple(getattr(p, "ds_shape", p.shape))
        for name, p in trainer.model.named_parameters()
        if p.requires_grad
    }
    for name in sorted({*own, *saved}):
        if own.get(name) != saved.get(name):
            raise ValueError(
                f"{folder} has the state of another {label}: of {name} it has {saved.get(name)}, this one has "
                f"{own.get(name)}"
            )


def _compute_with(trainer: Trainer) -> None:
    """Gives the float32 weights to the parameters that the model computes with."""
    optimizer = trainer.engine.optimizer
    if trainer.stage == 3:
        for flat, master, group in zip(
            optimizer.fp16_partitioned_groups_flat,
            optimizer.fp32_partitioned_groups_flat,
            optimizer.fp16_partitioned_groups,
            strict=True,
        ):
            flat.data.copy_(master.data)
            for own, part in zip(group, optimizer.unflatten(flat, group), strict=True):
                own.data = part.data
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
