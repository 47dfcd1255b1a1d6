"""Generators that fail as they are told."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import numpy as np

from actors.generator import Generator, Summary


class Frail(Generator):
    """The real one, told by files in the folder that it is given for a chat template.

    "hang": the first to sample blocks its process, and takes the file away. "slow load": a load waits until the file is
    gone. "slow": it takes 0.4 s for each token. Each load leaves a line in "loads".
    """

    def __init__(self, number, rollout, chat_template, role):
        super().__init__(number, rollout, None, role)
        self._number, self._flags = number, Path(chat_template)

    async def load(self, policy):
        with (self._flags / "loads").open("a") as file:
            file.write(f"{self._number}\n")
        while (self._flags / "slow load").exists():
            time.sleep(0.05)
        notes = await super().load(policy)
        advance = self._engine.advance

        def slowly():
            if (self._flags / "slow").exists():
                time.sleep(0.4)
            return advance()

        self._engine.advance = slowly
        return notes

    async def generate(self, item):
        if self._first("hang"):
            time.sleep(1e6)
        return await super().generate(item)

    def _first(self, flag):
        try:
            (self._flags / flag).unlink()
        except FileNotFoundError:
            return False
        return True


class Brittle:
    """Samples nothing, and starts soon: its process ends at the prompt "kill", and at the policy "kill"."""

    def __init__(self, *_):
        self._progress = 0

    async def ping(self):
        """It is there."""

    async def progress(self):
        self._progress += 1
        return self._progress

    async def load(self, policy):
        if policy == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        return []

    async def generate(self, item):
        if "kill" in item.prompts:
            os.kill(os.getpid(), signal.SIGKILL)
        return np.zeros(1), Summary(item.id, 0, 1, 1, 1, 0.0, ())


class Stillborn:
    """Its process cannot start."""

    def __init__(self, *_):
        raise RuntimeError("no such device")

    async def ping(self):
        """Never answered."""
