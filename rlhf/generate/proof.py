"""Whether a cache gives what the model's own forward pass gives, tried across every boundary that the model names."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel

from rlhf.generate.decoding import RowCache
from rlhf.models import probe
from rlhf.models.attempt import Failure, attempt, takes_argument
from rlhf.models.reach import Reach

PROMPTS, SAMPLES, STEPS = 2, 2, 6
NEAR, NEAREST = 1.5, 2.5
"""How many times as far from the float32 pass as the model's own a cache may be in another format: over all lengths of
prompts, and for any one of them."""


@dataclass(frozen=True)
class _Case:
    """A prompt int64 [P] at position `first`, and SAMPLES responses to it, int64 [SAMPLES, steps]."""

    prompt: torch.Tensor
    responses: torch.Tensor
    first: int = 0

    @property
    def kind(self) -> tuple[int, int]:
        return len(self.prompt), self.first

    def logprobs(self, model: PreTrainedModel) -> torch.Tensor:
        """The model's own, of every response token and the one after the last, float32 [SAMPLES, steps + 1, V]."""
        rows = torch.cat([self.prompt.expand(SAMPLES, -1), self.responses], 1)
        return probe.own_logprobs(model, rows, "policy", self.responses.shape[1] + 1, self.first)


class Proof:
    """Made while the model computes in float32 by its own attention; `measure` once it is as it will be sampled from.

    Prompts are short and on both sides of the model's lengths (`Reach`); they begin at position 0, and before each
    position from which the model computes otherwise. Rows of all prompts stand side by side, join and leave.

    Raises:
        ValueError: the model's logits are no numbers, or depend on later tokens.
    """

    def __init__(self, model: PreTrainedModel, max_new_tokens: int) -> None:
        reach, self._kind = Reach.of(model.config), type(model).__name__
        self._steps = min(
            n for n in (STEPS, max_new_tokens - 1, reach.limit and reach.limit - 2) if n is not None
        )
        vocabulary = model.config.get_text_config().vocab_size
        moves = takes_argument(model.forward, "position_ids")
        self.cases = _cases(reach, vocabulary, self._steps, moves)
        self._exact = [case.logprobs(model) for case in self.cases]
        for exact in self._exact:
            probe.check_finite(exact, f"policy ({self._kind})")
        self._check_causal(model)
        self._own: list[float] | None = None

    def _check_causal(self, model: PreTrainedModel) -> None:
        case, exact = self.cases[0], self._exact[0]
        alone = probe.own_logprobs(model, case.prompt[None], "policy", 1)[0, 0]
        off = probe.distance(alone, exact[0, 0])
        if off > 10 * probe.tolerance(exact[0]):
            raise ValueError(
                f"policy ({self._kind}): what it predicts depends on later tokens ({off:.2g} nats), so it is no causal "
                "language model; give one (an encoder needs is_decoder=true in its config.json)"
            )

    def measure(self, model: PreTrainedModel) -> None:
        """Takes the distance of the model's own pass, in the format that it computes in."""
        if model.dtype != torch.float32:
            self._own = [
                _typical(case.logprobs(model), exact)
                for case, exact in zip(self.cases, self._exact, strict=True)
            ]

    @torch.no_grad()
    def fault(self, cache: RowCache) -> str | None:
        """Why the cache is not to be taken; None: it is proven."""
        starts = sorted({case.first for case in self.cases})
        found: dict[int, torch.Tensor] = {}
        for first in starts if hasattr(cache, "first") else [0]:
            places = [i for i, case in enumerate(self.cases) if case.first == first]
            tried = attempt(partial(self._sampled, cache, places, first))
            if isinstance(tried, Failure):
                return tried.reason
            found |= tried
        return self._judged(found)

    def _judged(self, found: dict[int, torch.Tensor]) -> str | None:
        """By the distance of each case."""
        if self._own is None:
            off = {i: probe.distance(logprobs, self._exact[i]) for i, logprobs in found.items()}
            worst = max(off, key=lambda i: off[i] / probe.tolerance(self._exact[i]))
            if off[worst] <= probe.tolerance(self._exact[worst]):
                return None
            return f"{off[worst]:.2g} nats off after {self._told(worst)}"
        off = {i: _typical(logprobs, self._exact[i]) for i, logprobs in found.items()}
        times = {i: off[i] / max(self._own[i], probe.tolerance(self._exact[i])) for i in off}
        kinds = {self.cases[i].kind for i in times}
        # the better of the prompts of one length: rounding alone spoils one at times
        best = [min((i for i in times if self.cases[i].kind == k), key=times.__getitem__) for k in kinds]
        worst = max(best, key=times.__getitem__)
        if times[worst] > NEAREST:
            return f"{off[worst]:.2g} nats off after {self._told(worst)}, the model's own pass {self._own[worst]:.2g}"
        whole = (sum(times[i] ** 2 for i in best) / len(best)) ** 0.5
        return None if whole <= NEAR else f"{whole:.2g} times as far off as the model's own pass"

    def _told(self, i: int) -> str:
        case = self.cases[i]
        return f"{len(case.prompt)} tokens" + (f" from position {case.first}" if case.first else "")

    def _sampled(self, cache: RowCache, places: list[int], first: int) -> dict[int, torch.Tensor]:
        """The log-probabilities by the cache, float32 [SAMPLES, steps + 1, V] of each case."""
        if hasattr(cache, "first"):
            cache.first = first
        handles, logits = cache.prefill([self.cases[i].prompt.tolist() for i in places])
        assert len(logits) == len(places), f"{len(logits)} distributions for {len(places)} prompts"
        rows = [(n, s) for s in range(SAMPLES) for n in range(len(places))]
        early = len(rows) // 2 if cache.joins else len(rows)  # the others join while these are under way
        out = {row: [logits[row[0]]] for row in rows}
        alive: list[tuple[int, int]] = []

        def join(new: list[tuple[int, int]]) -> None:
            cache.join([handles[n] for n, _ in new])
            alive.extend(new)

        def step() -> None:
            tokens = [self.cases[places[n]].responses[s, len(out[n, s]) - 1] for n, s in alive]
            found = cache.step(torch.stack(tokens).to(logits.device))
            for row, one in zip(alive, found, strict=True):
                out[row].append(one)

        join(rows[:early])
        if self._steps:
            step()
        if early < len(rows):
            join(rows[early:])
        while alive:
            staying = [i for i, row in enumerate(alive) if len(out[row]) <= self._steps]
            if len(staying) < len(alive):
                cache.keep(torch.tensor(staying, dtype=torch.long))
                alive[:] = [alive[i] for i in staying]
            if alive:
                step()
        for handle in handles:
            cache.release(handle)
        cache.clear()
        if hasattr(cache, "first"):
            cache.first = 0
        return {
            i: torch.stack([torch.log_softmax(torch.stack(out[n, s]).float(), -1) for s in range(SAMPLES)])
            for n, i in enumerate(places)
        }


def _typical(found: torch.Tensor, exact: torch.Tensor) -> float:
    """The median distance of a distribution: rounding that sends a token to another expert moves a few by far."""
    return float(probe.distances(found, exact).median())


def _cases(reach: Reach, vocabulary: int, steps: int, moves: bool) -> list[_Case]:
    """moves: whether the model can be told other positions than those from 0."""
    most = probe.room(reach)
    short = sorted({max(1, min(n, most - steps)) for n in (3, 6, 11, most)})
    starts = [(length, 0) for length in short]
    for edge in sorted({n for n in (reach.window, reach.scan, reach.picks) if n is not None}):
        if reach.limit is None or edge + steps + 2 <= reach.limit:
            starts += [(max(1, n), 0) for n in (edge - steps // 2, edge, edge + 2)]
    if moves:
        span = short[-1]
        crossed = [b for b in reach.beginnings if b != reach.switch]
        firsts = [b - span - steps // 2 for b in crossed]
        firsts += [] if reach.switch is None else [reach.switch + 1]
        firsts += [] if reach.limit is None else [reach.limit - span - steps]
        fits = [
            n for n in sorted(set(firsts)) if n > 0 and n + span + steps <= (reach.limit or n + span + steps)
        ]
        starts += [(span, first) for first in fits]
    starts = [start for start in starts for _ in range(PROMPTS)]
    tokens = probe.sequences([length + SAMPLES * steps for length, _ in starts], vocabulary)
    return [
        _Case(torch.from_numpy(t[:n]), torch.from_numpy(t[n:]).view(SAMPLES, steps), first)
        for t, (n, first) in zip(tokens, starts, strict=True)
    ]
