"""Errors outside of actors: what is a user's or the machine's is one line, the rest keeps its traceback."""

import errno
import os

import pytest
from hydra import compose, initialize_config_module

from actors.errors import reason, told
from actors.fault import Fault


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("a tensor\n  of shape [2]"), "a tensor of shape [2]"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "a/b"), "No space left on device: a/b"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left on device (output_dir, or the"),
        (PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a/b"), "Permission denied: a/b"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "I/O error: No space left"),
        (Fault("the queue gave no answer"), "the queue gave no answer"),
    ],
)
def test_of_users_and_the_machine(error, line):
    assert reason(error).startswith(line)
    assert told(error) == f"error: {reason(error)}"


def test_of_an_override_that_ends_in_a_list():
    with initialize_config_module("conf", version_base=None), pytest.raises(TypeError) as error:
        compose("config", ["++stages.a.b=1"])
    assert reason(error.value).startswith("++stages.a.b=1 does not fit the configuration: ")


def test_of_a_fault(capsys):
    assert reason(KeyError("x")) is None
    assert told(KeyError("x")) == "error: KeyError: 'x'"
    assert "KeyError: 'x'" in capsys.readouterr().err
