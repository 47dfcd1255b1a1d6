"""Rows measured in a process beside this one, so that a crash or a hang is a row too."""

from __future__ import annotations

import logging
import multiprocessing
import resource
import warnings
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from io import StringIO
from multiprocessing.connection import Connection

import torch
import transformers

from benchmarks.families.measure import Row, row

MEMORY = 8 * 2**30
"""Bytes of address space for a row: a configuration that came out large ends its row, not the machine."""


def work(pipe: Connection, dtypes: Sequence[str]) -> None:
    """Measures the rows whose names arrive, quietly: what counts is in the row."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    transformers.logging.set_verbosity_error()
    while (name := pipe.recv()) is not None:
        with redirect_stdout(StringIO()):  # a few models print
            found = row(name, dtypes)
        pipe.send(found)


def measured(chosen: Sequence[str], dtypes: Sequence[str], patience: float) -> Iterator[Row]:
    """The rows, one after another; the process is started again when a row ends it or takes too long."""
    context = multiprocessing.get_context("spawn")
    process = None
    for name in chosen:
        if process is None:
            pipe, end = context.Pipe()
            process = context.Process(target=work, args=(end, dtypes), daemon=True)
            process.start()
            end.close()
        pipe.send(name)
        if not pipe.poll(patience):
            found = Row(name, f"FAILS: took more than {patience:g} seconds")
        else:
            try:
                found = pipe.recv()
            except (EOFError, ConnectionResetError):
                process.join()
                found = Row(name, f"FAILS: ended the process with status {process.exitcode}")
        if found.outcome.startswith("FAILS: took") or not process.is_alive():
            process.kill()
            process = None
        yield found
    if process is not None:
        pipe.send(None)
        process.join()
