"""A policy on held-out prompts: its samples, scored and judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from actors.failures import Call
from actors.generator_pool import Sampled
from actors.reward_pool import RewardPool
from actors.roles import Roles
from actors.work import work_items
from rlhf.config import Config
from rlhf.evaluate.judges import judge_for
from rlhf.evaluate.samples import PolicySamples
from rlhf.sources.source import Source, rewards_of
from rlhf.types import Prompt, Rollouts
from rlhf.utility.statistics import BaselineStatistics, ReferenceRule

Scores = Mapping[str, np.ndarray]


class Evaluation:
    """Samples of the generators' policy on the evaluation prompts, and their scores by every model."""

    def __init__(self, config: Config, prompts: Sequence[Prompt], roles: Roles) -> None:
        self._config, self._prompts, self._roles = config, prompts, roles
        self._silence = config.recovery.silence
        self._judge = judge_for(config.data.judge)
        self.ids = np.array([p.id for p in prompts], np.uint64)
        self.items = -(-len(prompts) // config.rollout.prompts_per_item)

    def sample(self, purpose: str, samples: int, tell: Callable[[int], None]) -> list[Sampled]:
        """`samples` responses to each prompt; `tell` gets the items done. The same for the same purpose."""
        c = self._config
        items = work_items(self._prompts, c.rollout.prompts_per_item, samples, c.seed, purpose)
        found: list[Sampled] = []
        for sampled in self._roles.generators.sample(items, lambda s: s.rollouts):
            found.append(sampled)
            tell(len(found))
        return sorted(found, key=lambda s: s.item.id)

    def measure(self, sampled: list[Sampled]) -> PolicySamples:
        """Samples with all their scores; the references they are compared with, and the log-ratio, are still open."""
        found = rollouts(sampled)
        shape = (len(self._prompts), sampled[0].item.samples)
        texts = _texts(found, shape[1])
        return PolicySamples(
            prompts=tuple(p.content for p in self._prompts),
            prompt_ids=self.ids,
            meta=tuple(p.meta for p in self._prompts),
            texts=texts,
            lengths=np.concatenate([r.tokens.lengths for r in found]).astype(np.int32).reshape(shape),
            finished=np.concatenate([r.finished for r in found]).reshape(shape),
            rewards=_scores(self._roles.rewards, self._config.reward_models, sampled, self._silence),
            reference={},
            judged={} if self._judge is None else self._judge.score(self._prompts, texts),
            judge_reference={},
            log_ratio=np.zeros(shape, np.float32),
            evaluated=self._evaluated(sampled),
            evaluator_reference={},
        )

    def _evaluated(self, sampled: list[Sampled]) -> Scores:
        evaluators = self._config.evaluators
        if not evaluators:
            return {}
        return _scores(self._roles.evaluators, evaluators, sampled, self._silence)

    def judge_reference(self, sampled: list[Sampled]) -> Scores:
        """What a score of the judge's must reach, float32 [P], by what it is a score of; nothing, without a judge."""
        if self._judge is None:
            return {}
        texts = _texts(rollouts(sampled), sampled[0].item.samples)
        return self._judge.reference(self._judge.score(self._prompts, texts))

    def evaluator_references(self, sampled: list[Sampled], rules: Mapping[str, ReferenceRule]) -> Scores:
        """What an evaluator's score must reach, float32 [P], by these samples of the base policy."""
        statistics = BaselineStatistics()
        for name, scores in self._evaluated(sampled).items():
            self._fill(statistics, name, rules[name], scores)
        return {n: statistics.reference(n, self.ids, rule).r_ref for n, rule in rules.items()}

    def _fill(
        self, statistics: BaselineStatistics, name: str, rule: ReferenceRule, scores: np.ndarray
    ) -> None:
        statistics.add_scores(name, np.repeat(self.ids, scores.shape[1]), scores.ravel(), 0)
        own = rewards_of(self._config.evaluators)[name]
        contents = [p.content for p in self._prompts]
        for i, canned in enumerate(own.canned if rule.kind == "canned" else []):
            score = partial(self._roles.evaluators.texts, name, contents, [canned] * len(contents))
            rewards = Call(f"scoring of evaluators.{name}.canned", score, self._silence).result()
            applies = ~np.isnan(rewards)
            statistics.add_canned(name, self.ids[applies], rewards[applies], i)
        if rule.kind == "column":
            values = [float(p.meta[str(own.column)]) for p in self._prompts]
            statistics.add_column(name, self.ids, np.array(values, np.float32))


def _scores(
    pool: RewardPool, sources: Mapping[str, Source], sampled: list[Sampled], silence: float
) -> dict[str, np.ndarray]:
    """Raw rewards by name, float32 [prompts, n], NaN where one does not apply."""
    prompts = sum(s.item.groups for s in sampled)
    calls = [
        Call(f"scoring of evaluation item {s.item.id}", partial(pool.raw, s.rollouts), silence)
        for s in sampled
    ]
    raw = np.concatenate([call.result() for call in calls])
    return {name: raw[:, i].reshape(prompts, -1) for i, name in enumerate(rewards_of(sources))}


def rollouts(sampled: list[Sampled]) -> list[Rollouts]:
    """Fetched as each was sampled; from then on a lost node takes one of two copies at most."""
    return [s.used for s in sampled]


def log_ratio(sampled: list[Sampled], reference: list[np.ndarray]) -> np.ndarray:
    """log policy - log reference of each response, float32 [B]."""
    sums = [
        np.add.reduceat(r.logprobs - base, r.tokens.offsets[:-1])
        for r, base in zip(rollouts(sampled), reference, strict=True)
    ]
    return np.concatenate(sums)


def _texts(rollouts: Sequence[Rollouts], samples: int) -> tuple[tuple[str, ...], ...]:
    """Texts by prompt, [P][samples]."""
    flat = [text for r in rollouts for text in r.texts]
    return tuple(tuple(flat[i : i + samples]) for i in range(0, len(flat), samples))
