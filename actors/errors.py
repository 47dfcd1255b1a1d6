"""What the command says of an error: the last line of stderr, and a traceback before it if the fault is here."""

from __future__ import annotations

import errno
import re
import sys
import traceback

from hydra.core.default_element import GroupDefault
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from actors.fault import Fault
from rlhf.shown import shown

# What the machine refuses, whatever the program does. Other numbers (no such file) may be a fault here.
MACHINE = {
    errno.EACCES, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.ENAMETOOLONG, errno.ENOSPC,
    errno.ENOTDIR, errno.EPERM, errno.EROFS, errno.ESTALE,
}  # fmt: skip
FULL = "No space left on device"  # of libraries that write by themselves and raise errors of their own
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_ROLE = re.compile(r"ray::(?:ServeReplica:[^:\s]*:([\w-]+)\.|([\w.]+)\()")
_CHAIN = re.compile(r"^(?:Traceback |ray::|ray\.exceptions\.)", re.MULTILINE)
_VALUE_ERROR = re.compile(r"^ValueError: (.*)\Z", re.MULTILINE | re.DOTALL)


def told(error: BaseException) -> str:
    """The line that ends the command. An error that is no user's has its traceback written to stderr first."""
    line = reason(error)
    if line is None:
        traceback.print_exception(error)
        line = in_one_line(_words(cause_of(error))) + _where(error)
    return f"error: {line}"


def reason(error: BaseException) -> str | None:
    """A user's or the machine's error in one line, with the actor it came from; None for any other error.

    Ray delivers an actor's error in several shapes: as `RayTaskError`, also of the cause's class; without the cause
    where that cannot be pickled; and as the death of an actor that could not be made. Of those without a cause, only
    the text is left.
    """
    cause = cause_of(error)
    if isinstance(cause, OmegaConfBaseException | HydraException):
        return in_one_line(_composition(cause))
    if (choice := _choice(cause)) is not None:
        return in_one_line(
            f"{choice} is no choice: give the name of a file in conf/{choice.partition('=')[0]}"
        )
    if (override := _override(cause)) is not None:
        return in_one_line(f"{override} does not fit the configuration: {cause}")
    if isinstance(cause, ValueError | Fault):
        return in_one_line(str(cause)) + _where(error)
    if isinstance(cause, OSError) and cause.errno in MACHINE:
        file = f": {cause.filename}" if cause.filename else " (output_dir, or the folder for temporary files)"
        return in_one_line(f"{cause.strerror}{file}") + _where(error)
    if FULL in str(cause):
        return in_one_line(str(cause)) + _where(error)
    if not _of_ray(cause):
        return None
    text = _COLOUR.sub("", str(error))
    found = _VALUE_ERROR.search(text, _last(_CHAIN, text))
    if found is not None:
        return in_one_line(found[1]) + _where(error)
    if "Traceback " in str(cause) or "ray::" in str(cause):
        return None  # an error of other code, which could not be pickled
    return in_one_line(str(cause)) + _where(error)


def in_one_line(text: str) -> str:
    """
    >>> in_one_line("a tensor\\n  of shape [2]\\n")
    'a tensor of shape [2]'

    Without secrets, and without what a terminal would obey.
    """
    return shown(" ".join(_COLOUR.sub("", text).split()))


def _of_ray(error: BaseException) -> bool:
    """Whether an error is Ray's own: lost objects, dead processes, a full object store."""
    if "ray" not in sys.modules:
        return False
    from ray.exceptions import RayError

    return isinstance(error, RayError)


def cause_of(error: BaseException) -> BaseException:
    """The error that an actor raised, where Ray kept it."""
    if _of_ray(error):
        from ray.exceptions import RayTaskError

        while isinstance(error, RayTaskError):
            error = error.cause
    return error


def _where(error: BaseException) -> str:
    """Of an actor's error " (in ROLE)": the innermost one, where an error passed through several. The text of the error
    has it in all shapes; the attribute `function_name` is missing in those that are of the cause's class."""
    if not _of_ray(error):
        return ""
    found = [a or b for a, b in _ROLE.findall(_COLOUR.sub("", str(error)))]
    return f" (in {found[-1]})" if found else ""


def _words(error: BaseException) -> str:
    """Class and words of an error; of one of which only text is left, its last line, which has them."""
    return str(error).strip().splitlines()[-1] if _of_ray(error) else f"{type(error).__name__}: {error}"


def _last(pattern: re.Pattern[str], text: str) -> int:
    return max((m.start() for m in pattern.finditer(text)), default=0)


def _choice(error: BaseException) -> str | None:
    """The group and its value on which Hydra failed with an error that is not its own: only the frame knows them."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_globals.get("__name__") == "hydra._internal.defaults_list":
            found = frame.f_locals.get("override", frame.f_locals.get("d"))
            if isinstance(found, Override):
                return found.input_line
            if isinstance(found, GroupDefault):
                return f"{found.group}={found.value}"
    return None


def _override(error: BaseException) -> str | None:
    """The override that Hydra could not apply, by an error that is not its own (a key within a list)."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_name == "_apply_overrides_to_config":
            found = frame.f_locals.get("override")
            return found.input_line if isinstance(found, Override) else None
    return None


def _composition(error: BaseException) -> str:
    """Hydra's words for a configuration that cannot be composed, without its advice that does not hold here (an unknown
    key cannot be appended) and what only a developer of Hydra reads."""
    if isinstance(error, OverrideParseException):
        if "=" not in error.override:
            return f"'{error.override}' is no KEY=VALUE"
        return (
            f"{error.override} cannot be read: a value with spaces or any of ()[]{{}},:=~$ needs quotes of its own, as "
            f"in '{error.override.partition('=')[0]}=\"...\"'"
        )
    dropped = ("To append", "full_key:", "object_type=", "Config search path:", "provider=", "Set the env")
    lines = [line.strip() for line in str(error).splitlines()]
    key = getattr(error.__cause__, "full_key", None) or getattr(error, "full_key", None)
    if isinstance(error.__cause__, ConfigAttributeError | ConfigKeyError):
        there = getattr(error.__cause__, "parent_node", None)
        names = ", ".join(map(str, there)) if there else ""
        return f"configuration key '{key}' is unknown" + (f"; there are: {names}" if names else "")
    kept = " ".join(line for line in lines if not line.startswith(dropped))
    return f"configuration key '{key}': {kept}" if key else kept
