"""Trying something on a model that need not take it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why a model does not take what was tried on it."""

    reason: str


def attempt(call: Callable[[], T]) -> T | Failure:
    """What a call into a model's own code gives, or why it failed. The one place where an exception of any kind is an
    answer: only the call itself belongs in it, not what is made of its result. A lack of memory is no answer."""
    try:
        return call()
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = str(error).strip().splitlines()
        return Failure(f"{type(error).__name__}: {said[0][:200]}" if said else type(error).__name__)


def takes_argument(function: Callable[..., Any], name: str) -> bool:
    """Whether a function has a parameter of this name."""
    return name in inspect.signature(function).parameters
