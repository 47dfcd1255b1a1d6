"""Generators that sample as the real one does, and fail as a folder of flags says."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

from actors.generator import Generator


class Frail(Generator):
    """`chat_template` names the folder. Prompts say what happens: "kill" ends the process each time; "hang once" blocks
    it, if it is the first to be asked. Each load leaves a line in "loads"; one that finds "slow" waits for "go"."""

    def __init__(self, number, rollout, chat_template, role):
        super().__init__(number, rollout, None, role)
        self._number, self._flags = number, Path(chat_template)

    async def load(self, policy):
        with (self._flags / "loads").open("a") as file:
            file.write(f"{self._number}\n")
        while (self._flags / "slow").exists() and not (self._flags / "go").exists():
            time.sleep(0.05)
        await super().load(policy)

    async def generate(self, item):
        if "kill" in item.prompts:
            os.kill(os.getpid(), signal.SIGKILL)
        if "hang once" in item.prompts and not (self._flags / "hung").exists():
            (self._flags / "hung").touch()
            time.sleep(1e6)
        return await super().generate(item)


class Stillborn:
    """Its process cannot start."""

    def __init__(self, *_):
        raise RuntimeError("no such device")

    async def ping(self):
        """Never answered."""


class Mayfly:
    """Its process ends whenever it loads a policy."""

    def __init__(self, *_):
        pass

    async def ping(self):
        """It is there."""

    async def load(self, policy):
        os.kill(os.getpid(), signal.SIGKILL)


class Slow(Generator):
    """Takes 0.3 s for each token."""

    async def load(self, policy):
        await super().load(policy)
        advance = self._engine.advance

        def slowly():
            time.sleep(0.3)
            return advance()

        self._engine.advance = slowly
