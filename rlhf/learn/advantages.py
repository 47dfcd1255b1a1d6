"""Advantages of response tokens. Adding one is a function and a YAML in conf/algorithm.

All work on the responses of one rank, tokens flat; a rank has whole groups (all responses to a prompt).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

SMALL = 1e-6  # added to a standard deviation that divides


@dataclass(frozen=True)
class Outcome:
    """What a rank's b responses, of t tokens together, were worth. Groups are contiguous and of equal size.

    A response's utility comes with its last token; a penalty (KL in the reward) with each token. A model's utility is
    NaN where it does not apply to a prompt: then for the whole group.
    """

    utility: torch.Tensor  # float32 [b]
    penalty: torch.Tensor  # float32 [t]
    lengths: torch.Tensor  # int64 [b], tokens of each response
    group_size: int
    values: torch.Tensor | None = None  # float32 [t]: the critic's, of the state before each token
    trace: float = 1.0  # lambda of GAE
    utilities: torch.Tensor | None = None  # float32 [b, M]: each model's, of which `utility` is made
    weights: torch.Tensor | None = None  # float32 [M], of the models
    over_ranks: Callable[[torch.Tensor], torch.Tensor] = lambda sums: sums  # adds up over ranks

    @property
    def response(self) -> torch.Tensor:
        """The response of each token, int64 [t]."""
        return torch.arange(len(self.lengths)).repeat_interleave(self.lengths)

    @property
    def total(self) -> torch.Tensor:
        """Utility less all penalties, float32 [b]."""
        return self.utility.index_add(0, self.response, self.penalty, alpha=-1)

    @property
    def rewards(self) -> torch.Tensor:
        """Of each token, float32 [t]."""
        return (-self.penalty).index_add(0, self.lengths.cumsum(0) - 1, self.utility)

    def over_tokens(self, values: torch.Tensor) -> torch.Tensor:
        """A value of each response given to all its tokens, float32 [t]."""
        return values.repeat_interleave(self.lengths)

    def grouped(self) -> torch.Tensor:
        """`total`, float32 [groups, group_size]."""
        return self.total.view(-1, self.group_size)


Advantage = Callable[[Outcome], torch.Tensor]
"""The advantage of each token, float32 [t]."""

ADVANTAGES: dict[str, Advantage] = {}


def register(name: str) -> Callable[[Advantage], Advantage]:
    def add(function: Advantage) -> Advantage:
        ADVANTAGES[name] = function
        return function

    return add


@register("leave_one_out")
def leave_one_out(outcome: Outcome) -> torch.Tensor:
    """A_i = R_i - mean of R_j over the other responses j to the prompt (RLOO, arXiv 2402.14740).

    >>> o = Outcome(torch.tensor([1.0, 2.0, 6.0]), torch.zeros(4), torch.tensor([1, 2, 1]), group_size=3)
    >>> leave_one_out(o).tolist()
    [-3.0, -1.5, -1.5, 4.5]
    """
    rewards, k = outcome.grouped(), outcome.group_size
    centred = (rewards - rewards.mean(-1, keepdim=True)) * (k / (k - 1))
    return outcome.over_tokens(centred.flatten())


@register("group_mean")
def group_mean(outcome: Outcome) -> torch.Tensor:
    """A_i = R_i - mean of R_j over all responses j to the prompt (GRPO, arXiv 2402.03300)."""
    rewards = outcome.grouped()
    return outcome.over_tokens((rewards - rewards.mean(-1, keepdim=True)).flatten())


@register("batch_mean")
def batch_mean(outcome: Outcome) -> torch.Tensor:
    """A_t = (utility less the penalties from token t on) - their mean over the batch's tokens (REINFORCE++,
    arXiv 2501.03262). Prompts share one baseline, so an easy prompt is told from a hard one.
    """
    to_go = reward_to_go(outcome)
    sums = outcome.over_ranks(torch.tensor([to_go.sum(), float(len(to_go))], dtype=torch.float64))
    return to_go - (sums[0] / sums[1]).float()


@register("gdpo")
def decoupled(outcome: Outcome) -> torch.Tensor:
    """A = sum_i w_i (u_i - mean of u_i) / (std of u_i + SMALL), over the models i, with mean and deviation of the
    prompt's responses; then A / (std of A over the batch's responses + SMALL) (GDPO, arXiv 2601.05242).

    Where the paper subtracts the batch's mean first, it is 0 here: each group's is. Deviations are unbiased, of
    responses and not of tokens, as in the authors' code (github.com/NVlabs/GDPO, its trl). Ours: SMALL is 1e-6, not
    1e-4, and a model whose utilities are NaN or all equal in a group adds exactly 0 there. So neither the unit of a
    model's utility nor the size of all weights together matters, only their ratios. The unit of an advantage is the
    spread of the policy's own responses, which changes as it learns: there is no closed form of its optimum.

    >>> u = torch.tensor([[0.0, 5.0], [100.0, 5.0], [7.0, 3.0], [7.0, 2.0]])
    >>> none, one = torch.zeros(4), torch.ones(4, dtype=torch.int64)
    >>> found = decoupled(Outcome(none, none, one, 2, utilities=u, weights=torch.ones(2)))
    >>> [round(a, 3) for a in found.tolist()]
    [-0.866, 0.866, 0.866, -0.866]
    """
    assert outcome.utilities is not None
    assert outcome.weights is not None
    assert not outcome.penalty.any(), "a penalty has no place in utilities that are normalised apart"
    utilities = outcome.utilities.double()  # in which equal float32 numbers are equal to their mean
    groups = utilities.view(-1, outcome.group_size, utilities.shape[-1])
    absent = groups.isnan()
    assert torch.equal(absent.any(1), absent.all(1)), "a utility is NaN for some of a prompt's responses"
    centred = groups - groups.mean(1, keepdim=True)
    deviation = ((centred**2).sum(1, keepdim=True) / (outcome.group_size - 1)).sqrt()
    each = centred / (deviation + SMALL)
    advantage = (each.masked_fill(absent, 0.0) @ outcome.weights.double()).flatten()
    squares, count = outcome.over_ranks(torch.stack([(advantage**2).sum(), torch.tensor(len(advantage))]))
    return outcome.over_tokens((advantage / ((squares / (count - 1)).sqrt() + SMALL)).float())


@register("gae")
def generalised(outcome: Outcome) -> torch.Tensor:
    """A_t = sum_s lambda^(s-t) (r_s + V_{s+1} - V_s), undiscounted, V = 0 after the last token (arXiv 1506.02438).

    >>> o = Outcome(torch.tensor([2.0]), torch.zeros(2), torch.tensor([2]), 1, torch.tensor([1.0, 0.5]), trace=0.5)
    >>> generalised(o).tolist()
    [0.25, 1.5]
    """
    assert outcome.values is not None
    values = padded(outcome.values, outcome.lengths)
    rewards = padded(outcome.rewards, outcome.lengths)
    advantage = torch.zeros_like(values)
    following = torch.zeros(len(values))
    for t in range(values.shape[1] - 1, -1, -1):  # beyond a response's end all is 0
        after = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros(len(values))
        following = rewards[:, t] + after - values[:, t] + outcome.trace * following
        following = torch.where(t < outcome.lengths, following, 0.0)
        advantage[:, t] = following
    inside = torch.arange(values.shape[1])[None] < outcome.lengths[:, None]
    return advantage[inside]


def reward_to_go(outcome: Outcome) -> torch.Tensor:
    """The sum of a response's rewards from each token on, float32 [t]."""
    before = padded(outcome.rewards, outcome.lengths)
    to_go = before.flip(1).cumsum(1).flip(1)
    inside = torch.arange(before.shape[1])[None] < outcome.lengths[:, None]
    return to_go[inside]


def padded(flat: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Flat token values as rows, float32 [b, longest], zeros after each response's end."""
    rows = torch.zeros(len(lengths), int(lengths.max()) if len(lengths) else 0)
    rows[torch.arange(rows.shape[1])[None] < lengths[:, None]] = flat
    return rows


def scaled(advantage: torch.Tensor, outcome: Outcome, scale: str) -> torch.Tensor:
    """Advantages divided by nothing, by the standard deviation of the prompt's rewards (GRPO), or by their own
    root mean square over the batch's tokens (REINFORCE++).

    Dividing by a prompt's deviation rescales its utilities against the other prompts', and so undoes part of the
    transformation; dividing by the batch's changes the step size only.
    """
    if scale == "group":
        std = outcome.grouped().std(-1, keepdim=True).expand(-1, outcome.group_size)
        return advantage / (outcome.over_tokens(std.flatten()) + SMALL)
    if scale == "batch":
        sums = torch.tensor([(advantage.double() ** 2).sum(), float(len(advantage))], dtype=torch.float64)
        squares, count = outcome.over_ranks(sums)
        return advantage / ((squares / count).sqrt().float() + SMALL)
    assert scale == "none", scale
    return advantage
