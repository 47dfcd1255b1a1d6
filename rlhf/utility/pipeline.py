"""From raw rewards to what a learner maximises: reference, transform, combine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rlhf.shown import short
from rlhf.types import Content, Rewards, Rollouts
from rlhf.utility.combine import Terms, combine
from rlhf.utility.kinds import TRANSFORM_KINDS, check_utility, combination_kind
from rlhf.utility.prompt_references import PromptReferences
from rlhf.utility.reference import Reference
from rlhf.utility.transforms import TRANSFORMS, Pair, UnusableReference, log_probabilities, p_good


@dataclass(frozen=True)
class Utility:
    """A configured transformation and combination of M reward models, in a fixed order.

    References are of G prompts, for each model; `group`, int [B], says which of them a response answers. Models may
    have different numbers of samples. Rewards are raw, float32 [B, M], a column for each model.

    >>> Utility("lsc", "helpful & ~verbose", {}, {"helpful": 1.0, "verbose": 1.0}).needs_samples
    False

    Raises:
        ValueError: these do not go together (`check_utility`), or a prompt's references do not allow the
            transform; the latter names the model and the prompt.
    """

    transform: str
    combine: str
    parameters: Mapping[str, float]  # of the transform and the combination
    weights: Mapping[str, float]  # by model name; their order is that of the columns

    def __post_init__(self) -> None:
        check_utility(self.transform, self.combine, self.parameters, self.weights)

    @property
    def needs_samples(self) -> bool:
        """Whether the references must carry the base policy's rewards themselves."""
        return TRANSFORM_KINDS[self.transform].needs_samples

    @torch.inference_mode(False)  # autograd, wherever it is called from
    def rewards(
        self, rollouts: Rollouts, raw: np.ndarray, references: Mapping[str, PromptReferences]
    ) -> Rewards:
        """Everything a learner and the metrics want of rollouts, whose G prompts the references are of."""
        values, by_model = _tensor(raw), self._references(references, rollouts.group)
        utilities, combined = self._evaluate(values, by_model, rollouts.group, rollouts.prompts)
        return Rewards(
            item=rollouts.item,
            version=rollouts.version,
            models=tuple(self.weights),
            weights=tuple(self.weights.values()),
            raw=values.detach().numpy(),
            reference=_stack(r.r_ref for r in by_model.values()),
            utility=utilities.detach().numpy(),
            p_good=_stack(map(p_good, values.detach().unbind(-1), by_model.values())),
            combined=combined.detach().numpy(),
            slope=_slope(combined, values),
        )

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
        """d combined / d raw, float32 [B, M]: what one more unit of each model's reward is still worth."""
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
        terms = []
        for (model, reference), column in zip(references.items(), values.unbind(-1), strict=True):
            try:
                terms.append(self._term(column, reference))
            except UnusableReference as error:
                g = int(group[error.position[0]])
                prompt = f"{g} of those at hand" if prompts is None else short(prompts[g])
                raise ValueError(f"reward model {model}, prompt {prompt}: {error}") from error
        utilities = torch.stack([utility for utility, _ in terms], -1)
        kind = combination_kind(self.combine)
        operands = Terms(
            TRANSFORM_KINDS[self.transform].kind,
            utilities,
            torch.tensor(list(self.weights.values()), dtype=torch.float32),
            [pair for _, pair in terms if pair is not None],
        )
        parameters = {name: self.parameters[name] for name in kind.parameters}
        return utilities, combine(self.combine, tuple(self.weights), operands, parameters)

    def _term(self, rewards: torch.Tensor, reference: Reference) -> tuple[torch.Tensor, Pair | None]:
        """One model's utility, float32 [B], and the pair of log-probabilities if the combination needs it."""
        parameters = {name: self.parameters[name] for name in TRANSFORM_KINDS[self.transform].parameters}
        utility = TRANSFORMS[self.transform](rewards, reference, **parameters)
        if not combination_kind(self.combine).needs_pairs:
            return utility, None
        return utility, log_probabilities(self.transform, rewards, reference)


def _tensor(raw: np.ndarray) -> torch.Tensor:
    """A copy of raw rewards that a slope can be taken by, float32 [B, M]."""
    return torch.from_numpy(np.array(raw, np.float32)).requires_grad_()


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
    return slope.numpy()
