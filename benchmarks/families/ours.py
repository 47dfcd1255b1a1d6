"""What this project gives for a family: its sampler, its learner and its reward models, against plain `transformers`.

Only what a run goes through is used: `TransformersEngine` and its `logprobs`, `PolicyModel`, `Classifier`. Prompts of
several lengths, in and beyond every window, are sampled in fewer slots than there are responses.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.families import plain
from benchmarks.families.configurations import END, PAD, VOCABULARY
from rlhf.data.chat import ChatFormat
from rlhf.generate.transformers_engine import TransformersEngine
from rlhf.models.classifier import Classifier, score_rows
from rlhf.types import Rollouts, WorkItem

LENGTHS = (5, 2, 9, 21, 40)
SAMPLES, SLOTS, NEW, TEMPERATURE = 4, 12, 24, 0.8
BUDGET = 256
"""Tokens of a batch: several sequences, short and long ones, side by side."""


@dataclass(frozen=True)
class Distance:
    """Between log-probabilities of the same tokens, nats."""

    apart: np.ndarray  # float64 [T]

    @classmethod
    def of(cls, found: np.ndarray, expected: np.ndarray) -> Distance:
        assert found.shape == expected.shape
        apart = np.abs(found.astype(np.float64) - expected)
        return cls(np.where(np.isnan(apart), np.inf, apart))

    def __add__(self, other: Distance) -> Distance:
        return Distance(np.concatenate([self.apart, other.apart]))

    @property
    def largest(self) -> float:
        return float(self.apart.max())

    @property
    def mean(self) -> float:
        """The root of the mean square."""
        return float(np.sqrt((self.apart**2).mean()))


def prompts(seed: int = 0) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(END + 1, VOCABULARY, size=n).tolist() for n in LENGTHS]


def chat() -> ChatFormat:
    """A format in which "t5 t17" are the tokens 5 and 17."""
    words = {"<pad>": PAD, "<eos>": END} | {f"t{i}": i for i in range(END + 1, VOCABULARY)}
    core = Tokenizer(models.WordLevel(words, unk_token="t2"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", eos_token="<eos>")
    return ChatFormat(tokenizer, "policy")


class Policy:
    """A copy of a float32 model as the policy of an engine that computes in `dtype`."""

    def __init__(self, model: PreTrainedModel, dtype: str) -> None:
        self._plain = model
        self._own = None if dtype == "float32" else plain.as_bfloat16(model)
        self._engine = TransformersEngine(
            copy.deepcopy(model), chat(), NEW, TEMPERATURE, slots=SLOTS, budget=BUDGET, dtype=dtype
        )
        cache = self._engine._cache
        decoder = getattr(cache, "_decoder", None) is not None
        self.sampler = type(cache).__name__ + (" and compiled decoder" if decoder else "")
        self.learner = ""

    def measure(self, seed: int) -> tuple[Distance, Distance, Distance]:
        """Of sampling, learning and the model's own pass, over the tokens sampled from the prompts of a seed."""
        asked = prompts(seed)
        texts = tuple(" ".join(f"t{i}" for i in prompt) for prompt in asked)
        rollouts = self._engine.generate(WorkItem(seed, texts, SAMPLES, seed + 3))
        assert [rollouts.prompt_tokens[g].tolist() for g in range(len(asked))] == asked
        self.learner = self._learner(rollouts)
        exact = plain.logprobs(self._plain, rollouts)
        own = exact if self._own is None else plain.logprobs(self._own, rollouts)
        learnt = np.empty_like(exact)
        for places, values in self._engine.logprobs(rollouts):
            learnt[places] = values
        return Distance.of(rollouts.logprobs, exact), Distance.of(learnt, exact), Distance.of(own, exact)

    def _learner(self, rollouts: Rollouts) -> str:
        """Whether the batches of all rollouts together are packed."""
        rows = range(rollouts.responses)
        lay = self._engine._policy.lay
        batches = lay(rollouts.prompt_tokens, rollouts.tokens, rollouts.group, rows, BUDGET)
        return " and ".join(sorted({"padded" if batch.trees is None else "packed" for batch in batches}))


class Reward:
    """A sequence classifier of the family that computes in `dtype`, packed where it can be."""

    def __init__(self, config: Any, dtype: str) -> None:
        config = copy.deepcopy(config)
        config.num_labels = 1
        self._plain = plain.build(config, AutoModelForSequenceClassification)
        self._own = None if dtype == "float32" else plain.as_bfloat16(self._plain)
        self._classifier = Classifier(copy.deepcopy(self._plain))
        self._classifier.compute_in(getattr(torch, dtype))
        ways = {"packed": self._classifier.packs, "padded": self._classifier.apart or self._classifier.pads}
        self.path = next((way for way, taken in ways.items() if taken), "one by one")

    def measure(self, seed: int) -> tuple[Distance, Distance]:
        """Of the rewards here and of the classifier's own, over conversations that share the prompts of a seed."""
        random = np.random.default_rng(seed)
        asked = prompts(seed)
        kin = np.repeat(np.arange(len(asked)), SAMPLES)
        rows = [
            asked[k] + [*random.integers(END + 1, VOCABULARY, size=1 + i % 5).tolist(), END]
            for i, k in enumerate(kin)
        ]
        exact = _scores(self._plain, rows)
        own = exact if self._own is None else _scores(self._own, rows)
        with torch.inference_mode():
            found = score_rows(self._classifier, self._classifier, rows, kin.tolist(), BUDGET)
        return Distance.of(found.float().numpy(), exact), Distance.of(own, exact)


@torch.inference_mode()
def _scores(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> np.ndarray:
    """Of each row alone, float32 [rows]."""
    return np.array([float(model(input_ids=torch.tensor([row])).logits[0, 0]) for row in rows], np.float32)
