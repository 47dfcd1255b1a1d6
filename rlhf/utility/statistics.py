"""The base policy's rewards of each prompt, and the reference rewards drawn from them (arXiv 2402.00742).

Numpy only: the role that owns these needs no torch.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist

import numpy as np

from rlhf.utility.tables import RewardTable

KINDS = ("quantile", "canned", "mean", "constant")
ESTIMATORS = ("empirical", "gaussian")


@dataclass(frozen=True)
class ReferenceRule:
    """How r_ref(x) of one reward model comes about.

    - quantile: the `level` quantile of the base policy's rewards of x. The `estimator` is empirical (linear
      interpolation of the sorted rewards, numpy's default) or gaussian (mean + z(level) * std).
    - canned: the mean reward of the canned responses to x.
    - mean: the mean of the base policy's rewards of x.
    - constant: `constant`, whatever x.
    """

    kind: str
    level: float
    estimator: str
    constant: float

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"reference '{self.kind}' is not one of {', '.join(KINDS)}")
        if self.estimator not in ESTIMATORS:
            raise ValueError(f"estimator '{self.estimator}' is not one of {', '.join(ESTIMATORS)}")
        if not 0 < self.level < 1:
            raise ValueError(f"the level of a quantile must be within (0, 1), not {self.level}")
        if not np.isfinite(self.constant):
            raise ValueError(f"the constant of a reference must be finite, not {self.constant}")


@dataclass
class _Column:
    """Rewards of one kind (sampled or canned) by one model: a table, and batches not merged into it yet."""

    table: RewardTable = field(default_factory=RewardTable.empty)
    pending: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    items: set[int] = field(default_factory=set)

    def merged(self) -> RewardTable:
        if self.pending:
            self.table, self.pending = self.table.with_rewards(self.pending), []
        return self.table


class BaselineStatistics:
    """Exact float32 rewards of the base policy's samples and of canned responses, by prompt and reward model.

    Guarantees: a batch counts once, however often it is added (by model and item); every answer and the
    digest depend on the rewards held and not on the order in which they came; once frozen, nothing changes.

    >>> statistics = BaselineStatistics()
    >>> prompts = np.array([7, 7, 7], np.uint64)
    >>> statistics.add_samples("helpful", prompts, np.array([1.0, 2.0, 4.0], np.float32), item=0)
    True
    >>> statistics.add_samples("helpful", prompts, np.array([1.0, 2.0, 4.0], np.float32), item=0)
    False
    >>> rule = ReferenceRule("quantile", 0.75, "empirical", 0.0)
    >>> r_ref, mean, std = statistics.reference("helpful", np.array([7], np.uint64), rule)
    >>> r_ref.tolist()
    [3.0]
    """

    def __init__(self) -> None:
        self._sampled: dict[str, _Column] = {}
        self._canned: dict[str, _Column] = {}
        self._cached: dict[tuple[str, ReferenceRule], np.ndarray] = {}
        self.frozen = False

    def add_samples(self, model: str, prompt_ids: np.ndarray, rewards: np.ndarray, item: int) -> bool:
        """Takes in rewards of base-policy samples; False, and no change, when the item was taken in before.

        Args:
            prompt_ids: uint64 [B], the prompt of each reward; prompts may repeat.
            rewards: float32 [B].
            item: names this batch among the model's sampled ones.
        """
        return self._add(self._sampled, model, prompt_ids, rewards, item)

    def add_canned(self, model: str, prompt_ids: np.ndarray, rewards: np.ndarray, item: int) -> bool:
        """As `add_samples`, for rewards of canned responses; their items are counted apart."""
        return self._add(self._canned, model, prompt_ids, rewards, item)

    def _add(
        self, columns: dict[str, _Column], model: str, prompt_ids: np.ndarray, rewards: np.ndarray, item: int
    ) -> bool:
        if self.frozen:
            raise RuntimeError(
                f"the baseline statistics are frozen: item {item} of model '{model}' came too late"
            )
        prompt_ids = np.asarray(prompt_ids)
        with np.errstate(over="ignore"):
            rewards = np.asarray(rewards).astype(np.float32)
        assert prompt_ids.dtype == np.uint64, prompt_ids.dtype
        assert prompt_ids.shape == rewards.shape == (rewards.size,), (prompt_ids.shape, rewards.shape)
        if model in columns and item in columns[model].items:
            return False
        bad = np.flatnonzero(~np.isfinite(rewards))
        if len(bad):
            raise ValueError(
                f"reward model '{model}' gave {rewards[bad[0]]} to prompt {prompt_ids[bad[0]]} "
                f"({len(bad)} of the {len(rewards)} rewards of item {item} are not finite)"
            )
        column = columns.setdefault(model, _Column())
        column.items.add(item)
        column.pending.append((prompt_ids.copy(), rewards))
        self._cached.clear()
        return True

    def reference(
        self, model: str, prompt_ids: np.ndarray, rule: ReferenceRule
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(r_ref, mean, std) of the prompts, float32 [B] each: mean and unbiased std are the base policy's.

        One sample has a std of 0. Where the rule needs no samples and there are none, mean and std are NaN.

        Raises:
            ValueError: the rule needs rewards of a prompt that are not there; it names prompt and model.
        """
        prompt_ids = np.asarray(prompt_ids, np.uint64)
        sampled = _table(self._sampled, model)
        rows, known = sampled.rows(prompt_ids)
        if rule.kind in ("quantile", "mean"):
            _require(known, prompt_ids, model, "samples of the base policy")
        mean, std = np.full((2, len(prompt_ids)), np.nan)
        mean[known], std[known] = sampled.mean[rows[known]], sampled.std[rows[known]]
        if rule.kind == "constant":
            r_ref = np.full(prompt_ids.shape, rule.constant)
        elif rule.kind == "canned":
            canned = _table(self._canned, model)
            rows, known = canned.rows(prompt_ids)
            _require(known, prompt_ids, model, "canned responses")
            r_ref = canned.mean[rows]
        elif rule.kind == "mean":
            r_ref = mean
        else:
            r_ref = self._quantiles(model, sampled, rule)[rows]
            if rule.estimator == "gaussian":
                _require(sampled.counts[rows] > 1, prompt_ids, model, "second sample, which a spread needs,")
        return r_ref.astype(np.float32), mean.astype(np.float32), std.astype(np.float32)

    def _quantiles(self, model: str, sampled: RewardTable, rule: ReferenceRule) -> np.ndarray:
        """r_ref of every prompt of the table, float64 [P]."""
        key = (model, rule)
        if key not in self._cached:
            if rule.estimator == "empirical":
                self._cached[key] = sampled.quantile(rule.level)
            else:
                self._cached[key] = sampled.mean + NormalDist().inv_cdf(rule.level) * sampled.std
        return self._cached[key]

    def counts(self, model: str, prompt_ids: np.ndarray) -> np.ndarray:
        """Base-policy samples held of each prompt, int64 [B]; 0 where there are none."""
        table = _table(self._sampled, model)
        rows, known = table.rows(np.asarray(prompt_ids, np.uint64))
        held = np.zeros(len(rows), np.int64)
        held[known] = table.counts[rows[known]]
        return held

    def samples(self, model: str, prompt_id: int) -> np.ndarray:
        """The base policy's rewards of one prompt, float32 [m], ascending."""
        table, ids = _table(self._sampled, model), np.array([prompt_id], np.uint64)
        rows, known = table.rows(ids)
        _require(known, ids, model, "samples of the base policy")
        return table.of_row(int(rows[0]))

    def freeze(self) -> None:
        """From now on, adding raises RuntimeError."""
        self.frozen = True

    def digest(self) -> str:
        """Hash of the rewards held (not of how they were batched), 32 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        for kind, columns in (("sampled", self._sampled), ("canned", self._canned)):
            for model in sorted(columns):
                table = columns[model].merged()
                if len(table.ids):
                    digest.update(repr((kind, model, len(table.ids), len(table.values))).encode())
                    for array, dtype in ((table.ids, "<u8"), (table.offsets, "<i8"), (table.values, "<f4")):
                        digest.update(array.astype(dtype).tobytes())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes everything to one npz file, atomically: it is the old file or the new one, never a part."""
        arrays: dict[str, np.ndarray] = {"frozen": np.array(self.frozen), "digest": np.array(self.digest())}
        for kind, columns in (("sampled", self._sampled), ("canned", self._canned)):
            arrays[f"{kind}.models"] = np.array(list(columns), dtype=np.str_)
            for i, column in enumerate(columns.values()):
                table = column.merged()
                arrays[f"{kind}.{i}.ids"] = table.ids
                arrays[f"{kind}.{i}.offsets"] = table.offsets
                arrays[f"{kind}.{i}.values"] = table.values
                arrays[f"{kind}.{i}.items"] = np.array(sorted(column.items), np.int64)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        with beside.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)

    @classmethod
    def load(cls, path: Path) -> BaselineStatistics:
        """What `save` wrote, frozen if it was.

        Raises:
            ValueError: the content is not what was saved; it names the file.
        """
        statistics = cls()
        with np.load(path, allow_pickle=False) as arrays:
            for kind, columns in (("sampled", statistics._sampled), ("canned", statistics._canned)):
                for i, model in enumerate(arrays[f"{kind}.models"].tolist()):
                    parts = (arrays[f"{kind}.{i}.{part}"] for part in ("ids", "offsets", "values"))
                    columns[model] = _Column(
                        RewardTable(*parts), [], set(arrays[f"{kind}.{i}.items"].tolist())
                    )
            statistics.frozen = bool(arrays["frozen"])
            if str(arrays["digest"]) != statistics.digest():
                raise ValueError(f"{path}: the baseline statistics in it are damaged; delete the file")
        return statistics


def _table(columns: dict[str, _Column], model: str) -> RewardTable:
    return columns[model].merged() if model in columns else RewardTable.empty()


def _require(known: np.ndarray, prompt_ids: np.ndarray, model: str, what: str) -> None:
    missing = np.flatnonzero(~known)
    if len(missing):
        raise ValueError(
            f"the baseline holds no {what} of prompt {prompt_ids[missing[0]]} for reward model '{model}' "
            f"({len(missing)} of {len(prompt_ids)} prompts)"
        )
