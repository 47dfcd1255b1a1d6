"""A Python function as a reward: called as TRL calls its `reward_funcs`, with the columns of the prompts' data set."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

from rlhf.config_numbers import POSITIVE, Range
from rlhf.sources.answers import as_rewards, named, text_of
from rlhf.sources.source import COMMON_RANGES, Batch, Place, RewardSource, Rows, Source
from rlhf.types import Content, Response

if TYPE_CHECKING:
    from rlhf.types import Prompt

OURS = ("prompts", "completions", "completion_ids", "finished")
"""What a function is given beside its arguments and columns, a value for each response. prompts and completions are
text, or messages where the prompt is; completion_ids are the policy's tokens; finished says whether the response ended
by its end-of-sequence token. The first three are TRL's."""


@dataclass(kw_only=True)
class FunctionSource(Source):
    """
    >>> load_function("a source", "rlhf.sources.function:load_function").__name__
    'load_function'
    """

    path: str | None  # package.module:function, or file.py:function
    arguments: dict[str, Any]  # further keyword arguments
    timeout: float  # seconds of one call

    ranges: ClassVar[Mapping[str, Range]] = {**COMMON_RANGES, "timeout": POSITIVE}
    reads_columns: ClassVar[bool] = True

    def check(self, key: str) -> None:
        super().check(key)
        if self.path is None or not all(self.path.rpartition(":")[::2]):
            raise ValueError(f"{key}.path={self.path} must be package.module:function or file.py:function")
        for name in OURS:
            if name in self.arguments:
                raise ValueError(
                    f"{key}.arguments.{name}: '{name}' is what every function is given; rename it"
                )

    def identity(self) -> Any:
        """Where the function is, and the text of its file; what that imports is not looked at."""
        assert self.path is not None
        function = inspect.unwrap(load_function(self.path, self.path))
        while isinstance(function, functools.partial):
            function = function.func
        written = function if inspect.isroutine(function) else type(function)
        file = None if inspect.isbuiltin(written) else inspect.getsourcefile(written)
        text = b"" if file is None else Path(file).read_bytes()
        name = self.path.rpartition(":")[2]
        return (name, hashlib.blake2b(text, digest_size=8).hexdigest(), self.arguments)

    def preflight(self, key: str, prompts: Sequence[Prompt]) -> None:
        """That the function is there, and can be called with what it will get."""
        assert self.path is not None
        function = load_function(f"{key}.path={self.path}", self.path)
        columns = set.intersection(*(set(p.meta) for p in prompts)) if prompts else set()
        given = {*OURS, *self.arguments, *columns}
        for name in sorted(_required(function)):
            if inspect.signature(function).parameters[name].kind == inspect.Parameter.POSITIONAL_ONLY:
                raise ValueError(
                    f"{key}.path={self.path}: its argument '{name}' is positional only; it is called by names"
                )
            if name not in given:
                raise ValueError(
                    f"{key}.path={self.path} takes '{name}', which is no column that every prompt has, nor in "
                    f"{key}.arguments; it can be given {', '.join(sorted(given))}"
                )
        if columns & {*OURS}:
            raise ValueError(
                f"{key}.path={self.path}: the prompts' data set has a column '{min(columns & {*OURS})}', which is the "
                "name of what every function is given; rename the column"
            )

    def check_texts(self, key: str, pairs: bool) -> None:
        """Tokens and the end of a response are those of rollouts alone, columns those of the prompts' data set."""
        assert self.path is not None
        required = _required(load_function(f"{key}.path={self.path}", self.path))
        lacks = required & {"completion_ids", "finished"}
        lacks |= required - {*OURS, *self.arguments} if pairs else set()
        if lacks:
            what = "pairs to calibrate on" if pairs else "texts that are not sampled here (canned, served)"
            raise ValueError(f"{key}.path={self.path} takes '{min(lacks)}', which {what} do not have")

    def open(self, name: str, place: Place) -> RewardSource:
        assert self.path is not None
        function = load_function(f"reward source '{name}'", self.path)
        return FunctionRewards(
            f"reward source '{name}' ({self.path})", function, self.arguments, self.timeout
        )


class _LateError(Exception):
    """A call has not returned in its time."""


class FunctionRewards:
    """A function, called with whole batches; several at once, if it is a coroutine function."""

    def __init__(
        self, name: str, function: Callable[..., Any], arguments: Mapping[str, Any], timeout: float
    ) -> None:
        self._name, self._function, self._arguments, self._timeout = name, function, arguments, timeout
        parameters = inspect.signature(function).parameters.values()
        takes_any = any(p.kind == p.VAR_KEYWORD for p in parameters)
        self._takes = None if takes_any else {p.name for p in parameters}
        self._coroutine = inspect.iscoroutinefunction(function)
        self.alone = not self._coroutine
        self.notes: list[str] = []
        self._loop: asyncio.AbstractEventLoop | None = None

    def score(self, batch: Batch) -> Rows:
        if not len(batch):
            return [[]]
        try:
            given = self._call(batch)
        except _LateError:
            raise ValueError(
                f"{self._name} has not returned after {self._timeout:g} s (timeout), for {len(batch)} responses, the "
                f"first of {named(batch, 0)}"
            ) from None
        except Exception as error:
            raise self._fault(batch, error) from error
        return [as_rewards(self._name, given, batch)]

    def _call(self, batch: Batch) -> Any:
        """
        Raises:
            _LateError: it takes too long. A thread cannot be ended: it is left behind, and the next call has another.
        """
        arguments = self._given(batch)
        call: Future[Any]
        if self._coroutine:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
                threading.Thread(target=self._loop.run_forever, daemon=True).start()
            call = asyncio.run_coroutine_threadsafe(self._function(**arguments), self._loop)
        else:
            call = Future()
            threading.Thread(target=self._run, args=(call, arguments), daemon=True).start()
        if not wait([call], self._timeout).done:
            call.cancel()
            self._loop = None  # it may be blocked
            raise _LateError
        return call.result()

    def _run(self, call: Future[Any], arguments: Mapping[str, Any]) -> None:
        if (
            not call.set_running_or_notify_cancel()
        ):  # given up before it began; from here on nobody cancels it
            return
        try:
            call.set_result(self._function(**arguments))
        except BaseException as error:
            call.set_exception(error)

    def _given(self, batch: Batch) -> dict[str, Any]:
        every: dict[str, Any] = {
            **batch.columns,
            **self._arguments,
            "prompts": list(batch.prompts),
            "completions": [_completion(p, r) for p, r in zip(batch.prompts, batch.responses, strict=True)],
        }
        if batch.tokens is not None:
            every["completion_ids"] = [row.tolist() for row in batch.tokens]
        if batch.finished is not None:
            every["finished"] = batch.finished.tolist()
        return every if self._takes is None else {k: v for k, v in every.items() if k in self._takes}

    def _fault(self, batch: Batch, error: Exception) -> ValueError:
        """Finds the response by which the function fails: it is called once more for each, alone."""
        for row in range(len(batch)):
            try:
                self._call(batch.part([row]))
            except _LateError:
                break
            except Exception as own:
                return ValueError(f"{self._name} raised {_told(own)} for {named(batch, row)}")
        return ValueError(
            f"{self._name} raised {_told(error)} for {len(batch)} responses together, the first of {named(batch, 0)}, "
            "though for none of them alone"
        )


def _required(function: Callable[..., Any]) -> set[str]:
    """The arguments without which it cannot be called by names."""
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters.items()
    return {name for name, p in parameters if p.default is p.empty and p.kind not in variable}


def load_function(what: str, path: str) -> Callable[..., Any]:
    """The function at package.module:function or file.py:function.

    Raises:
        ValueError: there is none; it begins with `what`.
    """
    place, _, name = path.rpartition(":")
    try:
        module = (
            _of_file(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
        )
    except Exception as error:  # whatever the user's module does when it is imported
        raise ValueError(f"{what}: {place} cannot be imported: {_told(error)}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"{what}: {place} has no function '{name}'")
    return function


def _of_file(path: Path) -> ModuleType:
    """A module by its file, under a name that no other has; its neighbours can be imported."""
    if not path.is_file():
        raise FileNotFoundError(f"there is no such file: {path}")
    full = path.resolve()
    name = f"_rlhf_function_{hashlib.blake2b(str(full).encode(), digest_size=6).hexdigest()}"
    if str(full.parent) not in sys.path:
        sys.path.append(str(full.parent))
    specification = importlib.util.spec_from_file_location(name, full)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module


def _completion(prompt: Content, response: Response) -> Content:
    """As TRL has it: messages where the prompt is."""
    if isinstance(prompt, str):
        return text_of(response)
    if isinstance(response, str):
        return [{"role": "assistant", "content": response}]
    return list(response)


def _told(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
