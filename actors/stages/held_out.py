"""A reward model measured, while it is trained, on pairs apart: its curve, its best step, its temperature."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import ray

from actors.learner_group import LearnerGroup
from rlhf.files import write_atomic
from rlhf.learn.objectives import PreferencePairs
from rlhf.utility.calibration import POOR, calibrate, measure

CURVE, CALIBRATION = "held_out.json", "calibration.json"


class HeldOut:
    """Measures at `evaluations` steps, evenly spaced up to the last. The model of the step with the least log loss is
    saved, and its calibration beside it."""

    def __init__(self, pairs: PreferencePairs, evaluations: int, steps: int, folder: Path, step: int) -> None:
        """step: that training goes on from; what was measured later is of a history that was set back."""
        self._data, self._pairs, self._folder = ray.put(pairs), np.arange(len(pairs)), folder
        self._due = sorted({-(-steps * n // evaluations) for n in range(1, evaluations + 1)})
        path = folder / CURVE
        there = json.loads(path.read_text()) if path.exists() else []
        self._points = [point for point in there if point["step"] <= step]

    def next_stop(self, step: int) -> int:
        """The next step after which it measures."""
        return next(due for due in self._due if due > step)

    def take(self, learner: LearnerGroup, step: int, say: Callable[[str], None]) -> None:
        """Measures, if it is due and was not done. The best step's model has a folder of its own until the last: a
        process that ends in between leaves the one before."""
        if step not in self._due or step in [point["step"] for point in self._points]:
            return
        margins = learner.values(self._data, self._pairs)
        if not np.isfinite(margins).all():
            raise ValueError(
                f"after step {step} the rewards of held-out pairs are not finite: lower the learning rate"
            )
        found = measure(margins)
        before = min((p["log_loss"] for p in self._points), default=np.inf)
        self._points.append(
            {"step": step, "accuracy": found.accuracy, "log_loss": found.log_loss, "error": found.error}
        )
        if found.log_loss < before:
            folder = self._best(step)
            shutil.rmtree(folder, ignore_errors=True)
            learner.save(folder)
            calibration = {"step": step, **calibrate(margins).as_json()}
            write_atomic(folder / CALIBRATION, json.dumps(calibration, indent=1))
        write_atomic(self._folder / CURVE, json.dumps(self._points, indent=1))
        best = self._best(min(self._points, key=lambda p: p["log_loss"])["step"])
        for other in self._folder.glob("best-*"):
            if other != best:
                shutil.rmtree(other)
        if step == self._due[-1]:
            for file in best.iterdir():
                os.replace(file, self._folder / file.name)
            best.rmdir()
            self._tell(say)

    def _best(self, step: int) -> Path:
        return self._folder / f"best-{step}"

    def _tell(self, say: Callable[[str], None]) -> None:
        found = json.loads((self._folder / CALIBRATION).read_text())
        after, last = found["before"], self._points[-1]
        text = f"accuracy {after['accuracy']:.3f} on {found['pairs']} held-out pairs"
        if found["step"] != last["step"]:
            text += f", best at step {found['step']} of {last['step']}"
        if found["temperature"] is not None:
            text += f", temperature {found['temperature']:.2f}"
        else:
            text += f", no temperature: {found['fault']}"
        say(text)
        if after["accuracy"] < POOR:
            say(
                f"warning: an accuracy below {POOR} says little of what is preferred: alignment to it is in vain"
            )
