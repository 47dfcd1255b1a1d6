"""Work items, and the seed of each."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from rlhf.types import Content, Prompt, WorkItem


def seed_of(seed: int, purpose: str, index: int) -> int:
    """A seed of its own for each work item of each purpose."""
    words = [seed, index, *purpose.encode()]
    return int(np.random.SeedSequence(words).generate_state(1, np.uint64)[0] >> np.uint64(1))


def work_items(
    prompts: Sequence[Prompt], size: int, samples: int, seed: int, purpose: str, first: int = 0
) -> list[WorkItem]:
    """Prompts cut into work items, numbered from `first`."""
    contents: list[Content] = [p.content for p in prompts]
    starts = range(0, len(contents), size)
    return [
        WorkItem(i, tuple(contents[start : start + size]), samples, seed_of(seed, purpose, i))
        for i, start in enumerate(starts, start=first)
    ]
