"""What a model's path holds: a model, or an adapter on one; and whether code that comes with it may run."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.store import ADAPTER

TRUST = "RLHF_TRUST_REMOTE_CODE"
TOKENIZERS = (
    "tokenizer_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
)


def trust_remote_code(allowed: bool) -> None:
    """Lets this process, and those it starts from here on, run code that comes with models; or forbids it."""
    os.environ[TRUST] = str(int(allowed))


def trusted() -> bool:
    """Whether code that comes with models may run. It may not, unless the user said so."""
    return os.environ.get(TRUST) == "1"


def check_allowed(path: str, key: str) -> None:
    """Refuses a model that only code of its own can load, unless that may run."""
    if not trusted():
        raise ValueError(
            f"{key}={path} brings code of its own, which is not run unasked: read it, and set trust_remote_code=true "
            "to allow it"
        )


@dataclass(frozen=True)
class Source:
    """Where a model's configuration and weights are, and the adapter that is merged into them."""

    model: str  # a folder or hub name
    adapter: str | None = None  # likewise
    task: str | None = None  # what the adapter is for, as peft calls it: CAUSAL_LM, SEQ_CLS

    def named(self, path: str) -> str:
        """The path that the user gave, and what it is where that is not the model itself."""
        return path if self.adapter is None else f"{path} (an adapter on {self.model})"


def find_source(path: str, key: str) -> Source:
    """The model at `path`; of a PEFT adapter its base, and the adapter.

    Raises:
        ValueError: there is neither; it names the key and the path, and a folder that may have been meant.
    """
    folder = _existing(path, key)
    if folder is not None and not (folder / ADAPTER).is_file():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{key}={path}: the folder holds no config.json{_hint(folder)}")
        return Source(str(folder))
    if folder is not None and (folder / "config.json").is_file():
        raise ValueError(
            f"{key}={path}: the folder holds a model (config.json) and an adapter ({ADAPTER}); move one of them away"
        )
    with naming(key, path):
        settings = _adapter_settings(path if folder is None else str(folder))
    if settings is None:
        return Source(path)
    where, base = str(folder or path), settings.get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{key}={path}: the adapter does not say its base (base_model_name_or_path in {ADAPTER})"
        )
    try:
        found = find_source(base, "base_model_name_or_path")
    except ValueError as error:
        raise ValueError(
            f"{key}={path} is an adapter whose base is not there: {error}; correct {ADAPTER}"
        ) from None
    if found.adapter is not None:
        raise ValueError(f"{key}={path} is an adapter on an adapter ({base}); merge that one first")
    return Source(found.model, where, settings.get("task_type"))


def find_tokenizer(path: str, key: str) -> str:
    """Where the tokenizer of the model at `path` is: there, or with the base of the adapter that is there.

    Raises:
        ValueError: as `find_source`, or there is none; it names the key and the path.
    """
    folder = _existing(path, key)
    if folder is not None and any((folder / name).is_file() for name in TOKENIZERS):
        return str(folder)
    if folder is None:
        return path
    if (folder / ADAPTER).is_file():
        return find_tokenizer(find_source(path, key).model, key)
    raise ValueError(f"{key}={path}: the folder holds no tokenizer{_hint(folder)}")


def _existing(path: str, key: str) -> Path | None:
    """The folder at `path`; None: it is a hub's name (which has at most one slash and no dot first)."""
    try:
        folder = Path(path).expanduser()
        if folder.is_dir():
            return folder
    except (OSError, RuntimeError) as error:  # a name too long, no right to look, no home of that user
        raise ValueError(
            f"{key}={path:.80} cannot be looked up: {getattr(error, 'strerror', error)}"
        ) from error
    if path.startswith(("/", ".", "~")) or path.count("/") > 1 or path.endswith("/"):
        raise ValueError(f"{key}={path}: no such folder")
    return None


def _hint(folder: Path) -> str:
    """What to do about a folder that is no model's: a trainer's output folder has them one level below."""
    steps = {p: int(m[1]) for p in folder.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", p.name))}
    held = {p: n for p, n in steps.items() if (p / "config.json").is_file() or (p / ADAPTER).is_file()}
    if held:
        return f"; the newest checkpoint in it is a model: give {max(held, key=held.__getitem__)}"
    return "; was it saved by save_pretrained?"


def _adapter_settings(path: str) -> dict[str, Any] | None:
    """What the adapter at a path says of itself; None: there is no adapter."""
    from transformers.utils.peft_utils import find_adapter_config_file

    file = find_adapter_config_file(path)
    return None if file is None else json.loads(Path(file).read_text(encoding="utf-8"))


@contextlib.contextmanager
def naming(key: str, path: str) -> Iterator[None]:
    """Turns a loading failure into one error that names the configuration key and the path."""
    from pickle import UnpicklingError

    from safetensors import SafetensorError

    try:
        yield
    except UnpicklingError as error:
        raise ValueError(
            f"{key}={path} cannot be loaded: its weights are a pickle that is damaged or holds more than tensors, "
            "which is not run; save the model as safetensors (save_pretrained)"
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, SafetensorError) as error:
        if "trust_remote_code" in str(error):
            check_allowed(path, key)
        lines = str(error).strip().splitlines() or [type(error).__name__]
        here = "" if Path(path).expanduser().exists() else "there is no such folder here, and "
        raise ValueError(f"{key}={path} cannot be loaded: {here}{lines[0]}") from error
