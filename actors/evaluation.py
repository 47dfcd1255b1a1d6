"""The evaluation stage: the base and the aligned policy on held-out prompts, scored and judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from actors.artifacts import Artifacts
from actors.failures import Call
from actors.generator_pool import Sampled
from actors.reward_pool import RewardPool
from actors.roles import Roles
from actors.work import work_items
from rlhf.config import Config, RewardModelConfig
from rlhf.evaluate.judges import judge_for
from rlhf.evaluate.record import load_samples, save_samples
from rlhf.evaluate.samples import PolicySamples
from rlhf.progress import StageView
from rlhf.types import Prompt, Rollouts
from rlhf.utility.statistics import BaselineStatistics, ReferenceRule

Scores = Mapping[str, np.ndarray]


class Evaluation:
    """Samples of both policies on the evaluation prompts. Those of the base policy are the same for every run of a
    sweep that has the same base policy and models, and are made once."""

    def __init__(self, config: Config, prompts: Sequence[Prompt], artifacts: Artifacts, roles: Roles) -> None:
        self._config, self._prompts, self._artifacts, self._roles = config, prompts, artifacts, roles
        self._ids = np.array([p.id for p in prompts], np.uint64)
        self._judge = judge_for(config.data.judge)
        self._items = -(-len(prompts) // config.rollout.prompts_per_item)
        self._done = 0

    @property
    def total(self) -> int:
        return self._items * 3

    def base(self, folder: Path, progress: StageView) -> None:
        """Writes base.npz: the base policy's samples, and what the judge and the evaluators compare with."""
        self._roles.generators.load(self._artifacts.policy_path)
        sampled = self._sample("judge", self._config.evaluate.judge_samples, progress)
        judge_reference = {}
        if self._judge is not None:
            texts = _texts(_rollouts(sampled), self._config.evaluate.judge_samples)
            judge_reference = self._judge.reference(self._judge.score(self._prompts, texts))
        references = self._evaluator_references(sampled)
        found = self._measure(self._sample("evaluate base", self._config.evaluate.samples, progress))
        save_samples(
            folder / "base.npz",
            replace(found, judge_reference=judge_reference, evaluator_reference=references),
        )

    def aligned(self, base: Path, folder: Path, progress: StageView) -> None:
        """Writes base.npz, with this run's reference rewards, and aligned.npz."""
        stored, rules = BaselineStatistics.load(self._artifacts.statistics_path), self._artifacts.rules
        reference = {n: stored.reference(n, self._ids, rule).r_ref for n, rule in rules.items()}
        before = replace(load_samples(base / "base.npz"), reference=reference)
        if self._judge is None:
            before = replace(before, judged=before.rewards, judge_reference=reference)
        self._done = 2 * self._items
        self._roles.generators.load(str(self._artifacts.align_path / "policy"))
        sampled = self._sample("evaluate aligned", self._config.evaluate.samples, progress)
        self._roles.generators.load(self._artifacts.policy_path)
        logprobs = self._roles.generators.logprobs(sampled)
        after = self._measure(sampled)
        after = replace(
            after,
            reference=reference,
            judged=after.rewards if self._judge is None else after.judged,
            judge_reference=before.judge_reference,
            evaluator_reference=before.evaluator_reference,
            log_ratio=_log_ratio(_rollouts(sampled), logprobs).reshape(after.lengths.shape),
        )
        save_samples(folder / "base.npz", before)
        save_samples(folder / "aligned.npz", after)

    def _sample(self, purpose: str, samples: int, progress: StageView) -> list[Sampled]:
        c = self._config
        items = work_items(self._prompts, c.rollout.prompts_per_item, samples, c.seed, purpose)
        found = []
        for sampled in self._roles.generators.sample(items, lambda s: s.rollouts):
            found.append(sampled)
            self._done += 1
            progress.update(self._done, purpose)
        return sorted(found, key=lambda s: s.item.id)

    def _measure(self, sampled: list[Sampled]) -> PolicySamples:
        """Samples with all their scores; the references they are compared with, and the log-ratio, are still open."""
        rollouts = _rollouts(sampled)
        shape = (len(self._prompts), self._config.evaluate.samples)
        texts = _texts(rollouts, shape[1])
        return PolicySamples(
            prompts=tuple(p.content for p in self._prompts),
            prompt_ids=self._ids,
            meta=tuple(p.meta for p in self._prompts),
            texts=texts,
            lengths=np.concatenate([r.tokens.lengths for r in rollouts]).astype(np.int32).reshape(shape),
            finished=np.concatenate([r.finished for r in rollouts]).reshape(shape),
            rewards=_scores(self._roles.rewards, self._config.reward_models, sampled, shape[0]),
            reference={},
            judged={} if self._judge is None else self._judge.score(self._prompts, texts),
            judge_reference={},
            log_ratio=np.zeros(shape, np.float32),
            evaluated=self._evaluate(sampled),
            evaluator_reference={},
        )

    def _evaluate(self, sampled: list[Sampled]) -> Scores:
        evaluators = self._config.evaluators
        if not evaluators:
            return {}
        return _scores(self._roles.evaluators, evaluators, sampled, len(self._prompts))

    def _evaluator_references(self, sampled: list[Sampled]) -> Scores:
        """What an evaluator's score must reach, float32 [P], by `Artifacts.evaluator_rules`."""
        rules = self._artifacts.evaluator_rules
        statistics = BaselineStatistics()
        for name, scores in self._evaluate(sampled).items():
            self._fill(statistics, name, rules[name], scores)
        return {n: statistics.reference(n, self._ids, rule).r_ref for n, rule in rules.items()}

    def _fill(
        self, statistics: BaselineStatistics, name: str, rule: ReferenceRule, scores: np.ndarray
    ) -> None:
        statistics.add_samples(name, np.repeat(self._ids, scores.shape[1]), scores.ravel(), 0)
        model = self._config.evaluators[name]
        contents = [p.content for p in self._prompts]
        for i, canned in enumerate(model.canned if rule.kind == "canned" else []):
            score = partial(self._roles.evaluators.canned, name, contents, [canned] * len(contents))
            rewards = Call(f"scoring of evaluators.{name}.canned", score).result()
            statistics.add_canned(name, self._ids, rewards, i)
        if rule.kind == "column":
            values = [float(p.meta[str(model.column)]) for p in self._prompts]
            statistics.add_column(name, self._ids, np.array(values, np.float32))


def _scores(
    pool: RewardPool, models: Mapping[str, RewardModelConfig], sampled: list[Sampled], prompts: int
) -> dict[str, np.ndarray]:
    """Raw rewards by model, float32 [prompts, n]."""
    calls = [Call(f"scoring of evaluation item {s.item.id}", partial(pool.raw, s.rollouts)) for s in sampled]
    raw = np.concatenate([call.result() for call in calls])
    return {name: raw[:, i].reshape(prompts, -1) for i, name in enumerate(models)}


def _rollouts(sampled: list[Sampled]) -> list[Rollouts]:
    """Fetched as each was sampled; from then on a lost node takes one of two copies at most."""
    return [s.used for s in sampled]


def _log_ratio(rollouts: list[Rollouts], reference: list[np.ndarray]) -> np.ndarray:
    """log policy - log reference of each response, float32 [B]."""
    sums = [
        np.add.reduceat(r.logprobs - base, r.tokens.offsets[:-1])
        for r, base in zip(rollouts, reference, strict=True)
    ]
    return np.concatenate(sums)


def _texts(rollouts: Sequence[Rollouts], samples: int) -> tuple[tuple[str, ...], ...]:
    """Texts by prompt, [P][samples]."""
    flat = [text for r in rollouts for text in r.texts]
    return tuple(tuple(flat[i : i + samples]) for i in range(0, len(flat), samples))
