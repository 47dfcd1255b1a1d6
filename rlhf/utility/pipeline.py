"""From raw rewards to what a learner maximises: reference, transform, combine."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rlhf.shown import short
from rlhf.types import Content, Rewards, Rollouts
from rlhf.utility.combine import Terms, combine
from rlhf.utility.kinds import TRANSFORM_KINDS, check_utility, combination_kind
from rlhf.utility.prompt_references import PromptReferences
from rlhf.utility.reference import Reference
from rlhf.utility.scales import BT, Scale
from rlhf.utility.transforms import TRANSFORMS, UnusableReference, log_probabilities
from rlhf.utility.units import in_unit, p_good


@dataclass(frozen=True)
class Utility:
    """A configured transformation and combination of M rewards, in a fixed order.

    References are of G prompts, for each reward; `group`, int [B], says which of them a response answers. Rewards may
    have different numbers of samples. They are raw, float32 [B, M], a column for each; NaN where one does not apply,
    for all responses to a prompt: its term is then left out.

    >>> Utility("lsc", "helpful & ~verbose", {}, {"helpful": 1.0, "verbose": 1.0}).needs_samples
    False

    Raises:
        ValueError: these do not go together (`check_utility`), or a prompt's references do not allow the
            transform; the latter names the reward and the prompt.
    """

    transform: str
    combine: str
    parameters: Mapping[str, float]  # of the transform and the combination
    weights: Mapping[str, float]  # by reward; their order is that of the columns
    scales: Mapping[str, Scale] = field(
        default_factory=dict
    )  # by reward; those not named are Bradley-Terry's

    def __post_init__(self) -> None:
        assert self.scales.keys() <= self.weights.keys()
        kinds = {name: scale.kind for name, scale in self.scales.items()}
        check_utility(self.transform, self.combine, self.parameters, self.weights, kinds)

    @property
    def needs_samples(self) -> bool:
        """Whether the references must carry the base policy's rewards themselves."""
        return TRANSFORM_KINDS[self.transform].needs_samples

    def scale(self, model: str) -> Scale:
        return self.scales.get(model, BT)

    @torch.inference_mode(False)  # autograd, wherever it is called from
    def rewards(
        self, rollouts: Rollouts, raw: np.ndarray, references: Mapping[str, PromptReferences]
    ) -> Rewards:
        """Everything a learner and the metrics want of rollouts, whose G prompts the references are of."""
        found = self.details(raw, references, rollouts.group, rollouts.prompts)
        models, weights = tuple(self.weights), tuple(self.weights.values())
        return Rewards(item=rollouts.item, version=rollouts.version, models=models, weights=weights, **found)

    @torch.inference_mode(False)
    def details(
        self,
        raw: np.ndarray,
        references: Mapping[str, PromptReferences],
        group: np.ndarray,
        prompts: Sequence[Content] | None = None,
    ) -> dict[str, Any]:
        """raw, reference, utility, p_good, combined and slope of responses, as `Rewards` has them."""
        values, by_model = _tensor(raw), self._references(references, group)
        utilities, combined = self._evaluate(values, by_model, group, prompts)
        columns = zip(by_model.items(), values.detach().unbind(-1), strict=True)
        return {
            "raw": values.detach().numpy(),
            "reference": _stack(r.r_ref for r in by_model.values()),
            "utility": utilities.detach().numpy(),
            "p_good": _stack(p_good(self.scale(model), column, r) for (model, r), column in columns),
            "combined": combined.detach().numpy(),
            "slope": _slope(combined, values),
        }

    @torch.inference_mode(False)
    def combined(
        self,
        raw: np.ndarray,
        references: Mapping[str, PromptReferences],
        group: np.ndarray,
        prompts: Sequence[Content] | None = None,
    ) -> np.ndarray:
        """The utility that is maximised, float32 [B]. `prompts`: the G prompts, which an error then quotes."""
        by_model = self._references(references, group)
        return self._evaluate(_tensor(raw), by_model, group, prompts)[1].detach().numpy()

    @torch.inference_mode(False)
    def slope(
        self, raw: np.ndarray, references: Mapping[str, PromptReferences], group: np.ndarray
    ) -> np.ndarray:
        """d combined / d raw, float32 [B, M]: what one more unit of each reward is still worth; 0 where it does not
        apply."""
        values = _tensor(raw)
        return _slope(self._evaluate(values, self._references(references, group), group)[1], values)

    def _references(
        self, references: Mapping[str, PromptReferences], group: np.ndarray
    ) -> dict[str, Reference]:
        """For each model its references, one for each of the B responses."""
        rows = torch.from_numpy(np.asarray(group, np.int64))
        return {model: _gather(references[model], rows) for model in self.weights}

    def _evaluate(
        self,
        values: torch.Tensor,
        references: Mapping[str, Reference],
        group: np.ndarray,
        prompts: Sequence[Content] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Utilities [B, M] and the combined utility [B], float32, on the graph of `values`, float32 [B, M]."""
        assert values.shape == (len(group), len(self.weights)), (values.shape, len(group), len(self.weights))

        def prompt(row: int) -> str:
            g = int(group[row])
            return f"{g} of those at hand" if prompts is None else short(prompts[g])

        present = ~values.detach().isnan()
        self._check_present(present, group, prompt)
        terms = []
        for i, (model, reference) in enumerate(references.items()):
            rows = present[:, i].nonzero().squeeze(-1)
            self._check_reference(model, reference, rows, prompt)
            try:
                found = self._term(self.scale(model), values[rows, i], _rows(reference, rows))
            except UnusableReference as error:
                place = int(rows[error.position[0]])
                raise ValueError(f"reward model {model}, prompt {prompt(place)}: {error}") from error
            terms.append([_spread(value, rows, len(values)) for value in found])
        utilities = torch.stack([term[0] for term in terms], -1)
        kind = combination_kind(self.combine)
        operands = Terms(
            TRANSFORM_KINDS[self.transform].kind,
            utilities,
            torch.tensor(list(self.weights.values()), dtype=torch.float32),
            [(term[1], term[2]) for term in terms if len(term) > 1],
            None if present.all() else present,
        )
        parameters = {name: self.parameters[name] for name in kind.parameters}
        return utilities, combine(self.combine, tuple(self.weights), operands, parameters)

    def _check_present(self, present: torch.Tensor, group: np.ndarray, prompt: Callable[[int], str]) -> None:
        """A reward applies to all responses to a prompt or to none, and to each prompt at least one does."""
        if present.all():
            return
        whole = torch.from_numpy(np.asarray(group, np.int64))
        applies = torch.zeros(int(whole.max()) + 1, present.shape[1]).index_add(0, whole, present.float())
        uneven = ((applies > 0) & (applies < whole.bincount()[:, None]))[whole].nonzero()
        if len(uneven):
            row, column = uneven[0].tolist()
            raise ValueError(
                f"reward model {list(self.weights)[column]}, prompt {prompt(row)}: it says of some responses that it "
                "does not apply (None) and rewards others; it must say so of a whole prompt"
            )
        nothing = (~present.any(-1)).nonzero()
        if len(nothing):
            raise ValueError(
                f"prompt {prompt(int(nothing[0]))}: no reward applies to it (all of {', '.join(self.weights)} gave "
                "None); leave the prompt out"
            )

    def _check_reference(
        self, model: str, reference: Reference, rows: torch.Tensor, prompt: Callable[[int], str]
    ) -> None:
        """A reward that is compared with r_ref must have one."""
        if not TRANSFORM_KINDS[self.transform].of_log_odds or self.transform == "log_sigmoid":
            return
        unknown = reference.r_ref[rows].isnan().nonzero()
        if len(unknown):
            raise ValueError(
                f"reward model {model}, prompt {prompt(int(rows[unknown[0]]))}: it applies to this response, and said "
                "of the prompt's base samples that it does not (None); it must say the same of a prompt each time"
            )

    def _term(self, scale: Scale, rewards: torch.Tensor, reference: Reference) -> list[torch.Tensor]:
        """One reward's utility, float32 [b], and both log-probabilities if the combination needs them."""
        kind = TRANSFORM_KINDS[self.transform]
        rewards, reference = in_unit(scale, kind.of_log_odds, rewards, reference)
        parameters = {name: self.parameters[name] for name in kind.parameters}
        utility = TRANSFORMS[self.transform](rewards, reference, **parameters)
        if not combination_kind(self.combine).needs_pairs:
            return [utility]
        return [utility, *log_probabilities(self.transform, rewards, reference)]


def _tensor(raw: np.ndarray) -> torch.Tensor:
    """A copy of raw rewards that a slope can be taken by, float32 [B, M]."""
    return torch.from_numpy(np.array(raw, np.float32)).requires_grad_()


def _rows(reference: Reference, rows: torch.Tensor) -> Reference:
    """Of these responses only."""
    whole = ("population_mean", "population_std")
    return Reference(**{n: v if n in whole else v[rows] for n, v in vars(reference).items()})


def _spread(values: torch.Tensor, rows: torch.Tensor, count: int) -> torch.Tensor:
    """Values at their rows, float32 [count], NaN elsewhere."""
    if len(rows) == count:
        return values
    return torch.full((count,), torch.nan).index_put((rows,), values)


def _stack(columns: Iterable[torch.Tensor]) -> np.ndarray:
    return torch.stack(list(columns), -1).numpy()


def _gather(prompts: PromptReferences, rows: torch.Tensor) -> Reference:
    def of(values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(values, np.float32))[rows]

    return Reference(
        r_ref=of(prompts.r_ref),
        mean=of(prompts.mean),
        std=of(prompts.std),
        low=of(prompts.low),
        high=of(prompts.high),
        samples=of(prompts.samples),
        population_mean=torch.tensor(prompts.population_mean, dtype=torch.float32),
        population_std=torch.tensor(prompts.population_std, dtype=torch.float32),
    )


def _slope(combined: torch.Tensor, values: torch.Tensor) -> np.ndarray:
    """By autograd: each combined utility depends on its own row of rewards only. 0 where nothing depends on them."""
    if not combined.requires_grad:
        return np.zeros(values.shape, np.float32)
    (slope,) = torch.autograd.grad(combined.sum(), values)
    return slope.masked_fill(values.isnan(), 0.0).numpy()
