"""The base policy's rewards of each prompt, and the reference rewards drawn from them (arXiv 2402.00742).

Numpy only: the role that owns these needs no torch.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rlhf.utility.checks import finite, require
from rlhf.utility.columns import Column, Item, room_for
from rlhf.utility.prompt_references import PromptReferences
from rlhf.utility.rules import ReferenceRule
from rlhf.utility.snapshots import Snapshot, read, share_ids, write
from rlhf.utility.summary import Summary, compacted, summarise
from rlhf.utility.tables import give_back_memory

__all__ = ["BaselineStatistics", "Item", "PromptReferences", "ReferenceRule"]

COLUMN, ABSENT = "column", "absent"


class BaselineStatistics:
    """Float32 rewards of the base policy's samples and of canned responses, by prompt and reward model.

    Guarantees: a batch counts once, however often it is added (by model and item); every answer and the digest
    depend on the rewards held, not on the order in which they came or on what was read between; once frozen, nothing
    changes.

    Exact up to `exact` rewards of a prompt, a `GridSketch` of 4 kB beyond that. Memory, and the file, of P prompts,
    M models and m samples: 16 P + 4 m P M bytes (1 million prompts, 2 models, m = 16: 144 MB), and after `compact`
    16 P + (m + 20) P M (m = 64: 184 MB). While the tables of a column are united its rewards exist twice, and
    `compact` needs the exact ones first: the peaks of these two are 320 and 900 MB. An item takes about 100 bytes.

    Items: an int, or (source, int) where several sources, such as shards, number theirs alike.

    >>> statistics = BaselineStatistics()
    >>> prompts = np.array([7, 7, 7], np.uint64)
    >>> statistics.add_samples("helpful", prompts, np.array([1.0, 2.0, 4.0], np.float32), item=0)
    True
    >>> statistics.add_samples("helpful", prompts, np.array([1.0, 2.0, 4.0], np.float32), item=0)
    False
    >>> rule = ReferenceRule("quantile", 0.75, "empirical", 0.0)
    >>> statistics.reference("helpful", np.array([7], np.uint64), rule).r_ref.tolist()
    [3.0]

    Args:
        exact: rewards of a prompt kept exactly, 2 at least.
        keys: model -> fingerprint of all that its sampled rewards depend on (base policy, sampling, reward model).
            They are kept in the file, for other runs to `adopt`.
    """

    def __init__(self, exact: int = 512, keys: Mapping[str, str] | None = None) -> None:
        if exact < 2:
            raise ValueError(f"the rewards kept exactly must be 2 at least, not {exact}")
        self.exact = exact
        self.keys = dict(keys or {})
        self.frozen = False
        self._columns: dict[str, dict[str, Column]] = {"sampled": {}, "canned": {}, COLUMN: {}, ABSENT: {}}

    def add_samples(self, model: str, prompt_ids: np.ndarray, rewards: np.ndarray, item: Item) -> bool:
        """Takes in rewards of base-policy samples; False, and no change, when the item was taken in before.

        Args:
            prompt_ids: uint64 [B], the prompt of each reward; prompts may repeat.
            rewards: float32 [B].
            item: names this batch among the model's sampled ones.
        """
        return self._add("sampled", model, prompt_ids, rewards, item)

    def add_canned(self, model: str, prompt_ids: np.ndarray, rewards: np.ndarray, item: Item) -> bool:
        """As `add_samples`, for rewards of canned responses; their items are counted apart."""
        return self._add("canned", model, prompt_ids, rewards, item)

    def add_absent(self, model: str, prompt_ids: np.ndarray, item: Item) -> bool:
        """As `add_samples`, for samples of prompts, uint64 [B], to which the reward does not apply: they are counted,
        and such a prompt has no reference (NaN)."""
        return self._add(ABSENT, model, prompt_ids, np.zeros(len(prompt_ids), np.float32), item)

    def add_scores(self, model: str, prompt_ids: np.ndarray, scores: np.ndarray, item: Item) -> None:
        """As `add_samples` and `add_absent`: scores, float32 [B], are NaN where the reward does not apply."""
        applies = ~np.isnan(scores)
        self.add_samples(model, prompt_ids[applies], scores[applies], item)
        if not applies.all():
            self.add_absent(model, prompt_ids[~applies], item)

    def absent(self, model: str, prompt_ids: np.ndarray) -> np.ndarray:
        """Which prompts the reward does not apply to, bool [B].

        Raises:
            ValueError: it applies to some samples of a prompt and not to others; it names prompt and model.
        """
        prompt_ids = np.asarray(prompt_ids, np.uint64)
        absent, sampled = (self._counted(kind, model, prompt_ids) > 0 for kind in (ABSENT, "sampled"))
        both = np.flatnonzero(absent & sampled)
        if len(both):
            raise ValueError(
                f"reward model '{model}' says of some responses to prompt {prompt_ids[both[0]]} that it does not apply "
                "(None), and rewards others: it must say so of a whole prompt"
            )
        return absent

    def add_column(self, model: str, prompt_ids: np.ndarray, values: np.ndarray) -> None:
        """Takes in references that come with the data set. prompt_ids: uint64 [B], values: float32 [B].

        Raises:
            ValueError: a prompt has two different values, here or from before; nothing is taken in then.
        """
        self._check_open(model, "a column of references")
        prompt_ids, values = finite(model, prompt_ids, values, "the data set's references")
        ids, first, places = np.unique(prompt_ids, return_index=True, return_inverse=True)
        column = self._columns[COLUMN].get(model) or Column(self.exact)
        held = column.counts(ids) == 1
        expected = values[first]
        expected[held] = column.rewards(ids[held], 1)[:, 0]
        differ = np.flatnonzero(expected[places] != values)
        if len(differ):
            i = differ[0]
            raise ValueError(
                f"reward model '{model}' has two reference values of prompt {prompt_ids[i]} in the data set, "
                f"{expected[places][i]} and {values[i]} ({len(differ)} of the {len(values)} values differ)"
            )
        if not held.all():
            column.add(ids[~held], expected[~held], len(column.items))
            self._columns[COLUMN][model] = column

    def _add(self, kind: str, model: str, prompt_ids: np.ndarray, rewards: np.ndarray, item: Item) -> bool:
        self._check_open(model, f"item {item}")
        column = self._columns[kind].get(model)
        if column is not None and item in column.items:
            return False
        prompt_ids, rewards = finite(model, prompt_ids, rewards, f"item {item}")
        if column is None:
            column = self._columns[kind][model] = Column(self.exact)
        elif column.compact is not None:
            raise RuntimeError(f"the rewards of model '{model}' are compact: item {item} cannot be added")
        column.add(prompt_ids, rewards, item)
        return True

    def _check_open(self, model: str, what: str) -> None:
        if self.frozen:
            raise RuntimeError(f"the baseline statistics are frozen: {what} of model '{model}' came too late")

    def reference(
        self, model: str, prompt_ids: np.ndarray, rule: ReferenceRule, points: int = 0
    ) -> PromptReferences:
        """r_ref of the prompts, uint64 [B], and what the base policy's samples say; NaN where there are none,
        and, but for a constant, where the reward does not apply to the prompt (the standard error is then 0).

        With points = K > 0 a prompt's `samples` are all it has up to K; of more they are K equally spaced quantiles,
        at levels (i + 0.5) / K.

        Raises:
            ValueError: the rule needs rewards of a prompt that are not there; it names prompt and model.
        """
        prompt_ids = np.asarray(prompt_ids, np.uint64)
        sampled = self._summary("sampled", model, prompt_ids, rule, points)
        absent = self.absent(model, prompt_ids)
        r_ref, error = sampled.estimate
        if rule.sampled:
            require(absent | (sampled.counts > 0), prompt_ids, model, "samples of the base policy")
            if rule.kind == "quantile" and rule.estimator == "gaussian":
                require(
                    absent | (sampled.counts > 1), prompt_ids, model, "second sample, which a spread needs,"
                )
        else:
            r_ref, error = self._given(model, prompt_ids, rule, absent), np.zeros(len(prompt_ids))
        if rule.kind != "constant":
            r_ref, error = np.where(absent, np.nan, r_ref), np.where(absent, 0.0, error)
        column = self._columns["sampled"].get(model) or Column(self.exact)
        mean, std, low, high = sampled.moments.astype(np.float32)
        return PromptReferences(
            r_ref=r_ref.astype(np.float32),
            standard_error=error.astype(np.float32),
            mean=mean,
            std=std,
            low=low,
            high=high,
            samples=sampled.samples,
            population_mean=column.moments.mean,
            population_std=column.moments.std,
        )

    def _given(
        self, model: str, prompt_ids: np.ndarray, rule: ReferenceRule, absent: np.ndarray
    ) -> np.ndarray:
        """r_ref of a rule without samples, float64 [B]; anything where the reward does not apply."""
        if rule.kind == "constant":
            return np.full(prompt_ids.shape, rule.constant)
        summary = self._summary(rule.kind, model, prompt_ids, rule, 0)
        what = "canned responses" if rule.kind == "canned" else "reference value from the data set"
        require(absent | (summary.counts > 0), prompt_ids, model, what)
        return summary.moments[0]

    def _summary(
        self, kind: str, model: str, prompt_ids: np.ndarray, rule: ReferenceRule, points: int
    ) -> Summary:
        column = self._columns[kind].get(model)
        if column is None:
            return Summary.unknown(len(prompt_ids), points)
        return summarise(column, prompt_ids, rule, points)

    def counts(self, model: str, prompt_ids: np.ndarray) -> np.ndarray:
        """Base-policy samples held of each prompt, int64 [B]; those to which the reward does not apply count too."""
        prompt_ids = np.asarray(prompt_ids, np.uint64)
        return self._counted("sampled", model, prompt_ids) + self._counted(ABSENT, model, prompt_ids)

    def _counted(self, kind: str, model: str, prompt_ids: np.ndarray) -> np.ndarray:
        column = self._columns[kind].get(model)
        return np.zeros(len(prompt_ids), np.int64) if column is None else column.counts(prompt_ids)

    def known(self, model: str, prompt_ids: np.ndarray) -> np.ndarray:
        """Which prompts have samples of the base policy, bool [B]."""
        return self.counts(model, prompt_ids) > 0

    def canned(self, model: str, prompt_ids: np.ndarray) -> np.ndarray:
        """Which prompts have rewards of canned responses, bool [B]."""
        return self._counted("canned", model, np.asarray(prompt_ids, np.uint64)) > 0

    def samples(self, model: str, prompt_id: int) -> np.ndarray:
        """The base policy's rewards of one prompt, float32 [m], ascending.

        Of more than `exact` there are stand-ins from the sketch, and of a compact table they are off by its bound.
        """
        ids = np.array([prompt_id], np.uint64)
        held = int(self._counted("sampled", model, ids)[0])
        require(np.array([held > 0]), ids, model, "samples of the base policy")
        mean = ReferenceRule("mean", 0.5, "empirical", 0.0)
        return self._summary("sampled", model, ids, mean, held).samples[0]

    def merge(self, other: BaselineStatistics) -> None:
        """Adds what another has, such as another shard's; the same as adding all its batches here, to the last bit.

        Of a model both may have items: then none may be shared, or those of one include all of the other's (its
        rewards are not added again).

        Raises:
            ValueError: some items are shared and others are not, a prompt has two different reference values, a compact
                column is involved, or the two differ in `exact` and keep sketches.
        """
        self._take_over(other, {model: model for columns in other._columns.values() for model in columns})
        self.keys = {**other.keys, **self.keys}

    def adopt(self, path: Path, keys: Mapping[str, str]) -> list[str]:
        """Takes over the base policy's samples of an earlier file, of the models whose fingerprints are equal.

        The names of the models may differ. Rewards of canned responses and columns that came with the data set are not
        taken over: they depend on more than a model's fingerprint says.

        Args:
            keys: model -> fingerprint of this run; they become part of `keys`.

        Returns:
            The models, by this run's names, of which something was taken over.

        Raises:
            ValueError: no fingerprint is equal, the file is damaged, or what `merge` raises.
        """
        earlier = BaselineStatistics.load(path)
        earlier._columns["canned"], earlier._columns[COLUMN] = {}, {}
        theirs = {fingerprint: model for model, fingerprint in earlier.keys.items()}
        names = {model: theirs[fingerprint] for model, fingerprint in keys.items() if fingerprint in theirs}
        if not names:
            raise ValueError(
                f"{path}: the baseline statistics are of {sorted(theirs)}, none of which is a fingerprint of this "
                f"run: {dict(keys)}"
            )
        self._take_over(earlier, names)
        self.keys.update(keys)
        return list(names)

    def _take_over(self, other: BaselineStatistics, names: Mapping[str, str]) -> None:
        """names: model here -> model there. All items are checked before any is taken over."""
        planned = []
        for model, theirs in names.items():
            self._check_open(model, "other statistics")
            for kind in ("sampled", "canned", ABSENT):
                column = other._columns[kind].get(theirs)
                mine = self._columns[kind].get(model) or Column(self.exact)
                if column is not None and not column.items <= mine.items:
                    planned.append((kind, model, room_for(column, mine, f"model '{model}'"), column))
        for model, theirs in names.items():
            if theirs in other._columns[COLUMN]:
                table = other._columns[COLUMN][theirs].table()
                self.add_column(model, table.ids, table.values)
        for kind, model, mine, column in planned:
            mine.absorb(column)
            self._columns[kind][model] = mine

    def taken(self, source: str) -> set[int]:
        """The numbers of the items (source, number) that were taken in of every model."""
        columns = [self._columns["sampled"].get(model) for model in self.keys]
        items = [set() if column is None else column.items for column in columns]
        found = set.intersection(*(set(own) for own in items)) if items else set()
        return {item[1] for item in found if isinstance(item, tuple) and item[0] == source}

    def freeze(self) -> None:
        """From now on, adding raises RuntimeError. Puts every column in one table, with shared ids."""
        self.frozen = True
        self._share()

    def compact(self, rules: Mapping[str, ReferenceRule] | None = None) -> None:
        """Keeps one byte of each sample from now on, and mean, std, low and high exactly (to float32).

        Quantiles are then within (high - low) / 510 of the exact ones; r_ref of the empirical quantile in `rules`
        (model -> rule) stays exact, its standard error only nearly. Sketches stay, and so does the digest.

        Raises:
            RuntimeError: not frozen yet.
        """
        if not self.frozen:
            raise RuntimeError("baseline statistics must be frozen before they are made compact")
        mean = ReferenceRule("mean", 0.5, "empirical", 0.0)
        for model, column in self._columns["sampled"].items():
            if column.compact is None:
                column.digest()
                column.compact, column.tables = compacted(column, (rules or {}).get(model, mean)), []
        self._share()

    def digest(self) -> str:
        """Hash of the rewards held (not of how they were batched or compacted), 32 hexadecimal digits."""
        digest = hashlib.blake2b(digest_size=16)
        for kind, columns in self._columns.items():
            for model in sorted(columns):
                if columns[model].moments.count or columns[model].waiting:
                    digest.update(repr((kind, model, columns[model].digest())).encode())
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Writes everything to one npz file, atomically: it is the old file or the new one, never a part."""
        write(path, Snapshot(self.exact, self.frozen, self.keys, self._columns))

    @classmethod
    def load(cls, path: Path) -> BaselineStatistics:
        """What `save` wrote, frozen if it was.

        Raises:
            ValueError: the content is not what was saved; it names the file.
        """
        snapshot = read(path)
        statistics = cls(snapshot.exact, snapshot.keys)
        statistics.frozen = snapshot.frozen
        for kind, columns in snapshot.columns.items():
            statistics._columns[kind] = columns
        return statistics

    def _share(self) -> None:
        share_ids([column for columns in self._columns.values() for column in columns.values()])
        give_back_memory()
