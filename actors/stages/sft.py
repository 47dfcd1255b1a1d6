"""The sft stage: a policy trained on demonstrations, unless one is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from actors.stages.fit import fit, trained_by
from actors.stages.stage import Output, Stage
from rlhf.code import code_version
from rlhf.data.prepare import demonstrations_source
from rlhf.store import fingerprint, source_fingerprint

if TYPE_CHECKING:
    from actors.stages.job import Job


class Sft(Stage):
    name = "sft"

    @cached_property
    def policy_name(self) -> str:
        policy = self.config.policy
        if policy.path is not None:
            return source_fingerprint(policy.path)
        return fingerprint(
            "sft",
            code_version("rlhf.learn.tasks", "rlhf.learn.tokenise"),
            replace(policy, lora=None),  # adapters come with alignment
            policy.init_from and source_fingerprint(policy.init_from),
            source_fingerprint(demonstrations_source(self.data)),
            trained_by(self.config),
            self.config.seed,
        )

    @property
    def policy_path(self) -> str:
        """Of the base policy."""
        return self.config.policy.path or str(self.made(self._output))

    @property
    def _output(self) -> Output:
        return Output("sft", "sft", self.policy_name)

    @property
    def given(self) -> list[str]:
        path = self.config.policy.path
        return [] if path is None else [f"policy.path={path} is given"]

    @property
    def outputs(self) -> list[Output]:
        return [] if self.given else [self._output]

    def make(self, job: Job, output: Output, folder: Path) -> None:
        from rlhf.learn.tasks import SupervisedTask
        from rlhf.learn.tokenise import demonstration_tokens, tokenizer_folder

        policy = self.config.policy
        with job.roles.start_beside("learner"):
            tokenizer = policy.init_from or str(tokenizer_folder(self.config, self.data, self.store))
            tokens = demonstration_tokens(self.config, tokenizer, demonstrations_source(self.data))
        task = SupervisedTask(policy.init_from, policy.architecture, tokenizer, self.config.seed)
        fit(job, "sft", task, tokens, tokenizer, policy.training, folder)

    def links(self) -> Mapping[str, Path]:
        return {"base_policy": Path(self.policy_path)} if self.outputs and self.done else {}
