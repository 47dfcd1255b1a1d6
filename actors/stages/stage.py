"""What a stage is, and the stages of a configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from rlhf.config import STAGES, Config
from rlhf.data.prepare import RunData
from rlhf.store import Store

if TYPE_CHECKING:
    from actors.stages.job import Job

S = TypeVar("S", bound="Stage")


@dataclass(frozen=True)
class Output:
    """A folder of the store."""

    label: str  # as the command calls it
    kind: str
    name: str  # the fingerprint of all that it depends on


class Stage:
    """One stage. It knows its `outputs` by name without a Ray; `execute` makes those that are not there.

    `make` begins with an empty folder, or with one that an earlier call left when it was interrupted, by whatever: what
    it finds under `checkpoints` there is its own. It is called again after a fault, with roles that are new.
    """

    name: ClassVar[str]

    def __init__(self, stages: Stages) -> None:
        self.stages, self.config, self.data, self.store = stages, stages.config, stages.data, stages.store

    @property
    def given(self) -> list[str]:
        """What of it the user brings, in words."""
        return []

    @property
    def outputs(self) -> list[Output]:
        """What it makes."""
        return []

    @property
    def done(self) -> bool:
        return all(self.store.has(output.kind, output.name) for output in self.outputs)

    def execute(self, job: Job) -> None:
        for why in self.given:
            job.skip(self.name, why)
        for output in self.outputs:
            if self.store.has(output.kind, output.name):
                what = "" if output.label == self.name else f"{output.label} "
                job.skip(self.name, f"{what}done before ({output.name})")
            else:
                job.make(self, output)

    def make(self, job: Job, output: Output, folder: Path) -> None:
        raise NotImplementedError

    def links(self) -> Mapping[str, Path]:
        """What a run's folder points to, by name there; of what is in the store."""
        return {}

    def made(self, output: Output) -> Path:
        """The folder of an output.

        Raises:
            ValueError: it is not there.
        """
        if not self.store.has(output.kind, output.name):
            raise ValueError(
                f"stages={self.config.stages}: stage {self.name} has no output for this configuration; add it to stages"
            )
        return self.store.folder(output.kind, output.name)


class Stages:
    """The stages of a configuration, each made when it is first asked for."""

    def __init__(self, config: Config, data: RunData, store: Store) -> None:
        self.config, self.data, self.store = config, data, store
        self._made: dict[type[Stage], Any] = {}

    def of(self, kind: type[S]) -> S:
        if kind not in self._made:
            self._made[kind] = kind(self)
        return self._made[kind]

    def configured(self) -> list[Stage]:
        """In their order."""
        return [self.of(_class(name)) for name in STAGES if name in self.config.stages]

    def complete(self) -> bool:
        """Whether every configured stage has its output."""
        return all(stage.done for stage in self.configured())

    def links(self) -> dict[str, Path]:
        """What a run's folder points to, of all stages."""
        return {name: path for each in STAGES for name, path in self.of(_class(each)).links().items()}


def _class(name: str) -> type[Stage]:
    """`RewardModels` of actors/stages/reward_models.py."""
    module = import_module(f"actors.stages.{name}")
    return getattr(module, "".join(part.title() for part in name.split("_")))
