"""A generator gives back what it can before it answers with its last rollouts: who waits for them needs the memory."""

from pathlib import Path

import pytest
import ray

from actors.generator import Generator
from rlhf.config import RoleConfig, RolloutConfig
from rlhf.generate.transformers_engine import TransformersEngine
from rlhf.types import WorkItem

pytestmark = pytest.mark.actors


class Traced(TransformersEngine):
    """Writes down what it is asked for, in the file that its options name."""

    @classmethod
    def open(cls, policy, chat, rollout, device):
        engine = super().open(policy, chat, rollout, device)
        engine.trace = Path(rollout.options["trace"])
        return engine

    def _told(self, what: str) -> None:
        with open(self.trace, "a") as file:
            file.write(f"{what}\n")

    def submit(self, item):
        self._told(f"submit {item.id}")
        return super().submit(item)

    def advance(self):
        done = super().advance()
        for _, rollouts in done:
            self._told(f"done {rollouts.item}")
        return done

    def rest(self) -> None:
        self._told("rest")
        super().rest()


def test_it_rests_before_its_last_answer(cluster, policy_folder, tmp_path):
    trace = tmp_path / "trace"
    rollout = RolloutConfig(f"{__name__}:Traced", {"trace": str(trace)}, "float32", 6, 1.0, 8, 2)
    role = RoleConfig(count=1, cpus=0.1, gpus=0.0)
    generator = ray.remote(Generator).options(num_cpus=0.1).remote(0, rollout, None, role)
    try:
        ray.get(generator.load.remote(str(policy_folder)))
        items = [WorkItem(n, ("what is tea ?", "bread"), 4, seed=n) for n in range(3)]
        asked = [generator.generate.options(num_returns=2).remote(item)[1] for item in items[:2]]
        assert [summary.item for summary in ray.get(asked)] == [0, 1]
        lines = trace.read_text().splitlines()
        assert lines[-1] == "rest"  # it is there before the last answer is
        assert lines.count("rest") <= 2
        assert {"done 0", "done 1"} <= {*lines[:-1]}
        summary = ray.get(generator.generate.options(num_returns=2).remote(items[2])[1])
        assert summary.responses == 8
        assert trace.read_text().splitlines()[-2:] == ["done 2", "rest"]
    finally:
        ray.kill(generator)
