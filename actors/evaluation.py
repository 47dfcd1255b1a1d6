"""The evaluation stage: the base and the aligned policy on held-out prompts, scored and judged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import ray

from actors.generator import GeneratorPool, Sampled
from actors.reward_pool import RewardPool
from actors.work import work_items
from rlhf.config import Config
from rlhf.evaluate.judges import judge_for
from rlhf.evaluate.samples import PolicySamples
from rlhf.progress import StageView
from rlhf.types import Prompt, Rollouts
from rlhf.utility.statistics import BaselineStatistics, ReferenceRule


class Evaluation:
    """Samples both policies on the evaluation prompts and saves base.npz and aligned.npz to a folder."""

    def __init__(
        self,
        config: Config,
        prompts: Sequence[Prompt],
        generators: GeneratorPool,
        rewards: RewardPool,
        statistics: Path,
        rules: dict[str, ReferenceRule],
    ) -> None:
        self._config, self._prompts, self._generators, self._rewards = config, prompts, generators, rewards
        ids = np.array([p.id for p in prompts], np.uint64)
        stored = BaselineStatistics.load(statistics)
        self._reference = {n: stored.reference(n, ids, rule)[0] for n, rule in rules.items()}
        self._judge = judge_for(config.data.judge)
        self._items = -(-len(prompts) // config.rollout.prompts_per_item)
        self._done = 0

    @property
    def total(self) -> int:
        return self._items * (2 if self._judge is None else 3)

    def run(self, base: str, aligned: str, folder: Path, progress: StageView) -> None:
        n = self._config.evaluate.samples
        self._generators.load(base)
        judge_reference = None
        if self._judge is not None:
            sampled = self._sample("judge", self._config.baseline.samples, progress)
            texts = _texts([ray.get(s.rollouts) for s in sampled], self._config.baseline.samples)
            judge_reference = self._judge.reference(self._judge.score(self._prompts, texts))
        base_sampled = self._sample("evaluate base", n, progress)
        self._save(folder / "base.npz", base_sampled, None, judge_reference)
        self._generators.load(aligned)
        aligned_sampled = self._sample("evaluate aligned", n, progress)
        self._generators.load(base)
        reference = self._generators.logprobs([s.rollouts for s in aligned_sampled])
        self._save(folder / "aligned.npz", aligned_sampled, reference, judge_reference)

    def _sample(self, purpose: str, samples: int, progress: StageView) -> list[Sampled]:
        items = work_items(
            self._prompts, self._config.rollout.prompts_per_item, samples, self._config.seed, purpose
        )
        found = []
        for sampled in self._generators.sample(items):
            found.append(sampled)
            self._done += 1
            progress.update(self._done, purpose)
        return sorted(found, key=lambda s: s.item.id)

    def _save(
        self,
        path: Path,
        sampled: list[Sampled],
        reference_logprobs: list[np.ndarray] | None,
        judge_reference: dict[str, np.ndarray] | None,
    ) -> None:
        raw = np.concatenate(ray.get([self._rewards.raw(s.rollouts) for s in sampled]))
        rollouts: list[Rollouts] = ray.get([s.rollouts for s in sampled])
        shape = (len(self._prompts), self._config.evaluate.samples)
        texts = _texts(rollouts, shape[1])
        rewards = {n: raw[:, i].reshape(shape) for i, n in enumerate(self._config.reward_models)}
        if self._judge is None or judge_reference is None:
            judged, judge_reference = rewards, self._reference
        else:
            judged = self._judge.score(self._prompts, texts)
        ratio = np.zeros(shape, np.float32)
        if reference_logprobs is not None:
            ratio = np.concatenate(
                [
                    np.add.reduceat(r.logprobs - reference, r.tokens.offsets[:-1])
                    for r, reference in zip(rollouts, reference_logprobs, strict=True)
                ]
            ).reshape(shape)
        samples = PolicySamples(
            prompts=tuple(p.content for p in self._prompts),
            prompt_ids=np.array([p.id for p in self._prompts], np.uint64),
            meta=tuple(p.meta for p in self._prompts),
            texts=texts,
            lengths=np.concatenate([r.tokens.lengths for r in rollouts]).astype(np.int32).reshape(shape),
            finished=np.concatenate([r.finished for r in rollouts]).reshape(shape),
            rewards=rewards,
            reference=self._reference,
            judged=judged,
            judge_reference=judge_reference,
            log_ratio=ratio,
        )
        from rlhf.evaluate.record import save_samples

        save_samples(path, samples)


def _texts(rollouts: Sequence[Rollouts], samples: int) -> tuple[tuple[str, ...], ...]:
    """Texts by prompt, [P][samples]."""
    flat = [text for r in rollouts for text in r.texts]
    return tuple(tuple(flat[i : i + samples]) for i in range(0, len(flat), samples))
