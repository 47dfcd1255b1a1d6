"""Penalties for length, as functions of the form that TRL's `reward_funcs` have: each takes columns of B responses and
its own settings by name, ignores what else it is given, and returns B rewards of 0 or less.

`completion_ids` are the responses' tokens, with the token that ended a response if it was sampled: [B] of [tokens].
`finished`, bool [B], says which ended by their end-of-sequence token; it is no column of TRL's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sized
from typing import Any


def overlong(completion_ids: Iterable[Sized], limit: int, buffer: int, **_: Any) -> list[float]:
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), float [B] within [-1, 0]: 0 up to limit - buffer
    tokens, then falling linearly to -1 at `limit` tokens, and -1 beyond.

    With limit = rollout.max_new_tokens, -1 is what a response gets that was cut.

    >>> overlong([[7] * n for n in (4, 6, 8, 10, 12)], limit=10, buffer=4)
    [0.0, 0.0, -0.5, -1.0, -1.0]

    Raises:
        ValueError: `buffer` is not within [1, limit].
    """
    if not 1 <= buffer <= limit:
        raise ValueError(f"overlong: buffer={buffer} must be within [1, limit={limit}], in tokens")
    free = limit - buffer
    return [min(0.0, max(-1.0, (free - len(tokens)) / buffer)) for tokens in completion_ids]


def length(completion_ids: Iterable[Sized], per_token: float, **_: Any) -> list[float]:
    """-per_token for each token of a response, float [B].

    >>> length([[7, 7, 2], [2]], per_token=0.5)
    [-1.5, -0.5]

    Raises:
        ValueError: `per_token` is negative or not finite.
    """
    _check("length", "per_token", per_token)
    return [-per_token * len(tokens) for tokens in completion_ids]


def unfinished(finished: Iterable[bool], penalty: float, **_: Any) -> list[float]:
    """-penalty for a response that did not end by its end-of-sequence token, else 0, float [B].

    >>> unfinished([True, False], penalty=2.0)
    [0.0, -2.0]

    Raises:
        ValueError: `penalty` is negative or not finite.
    """
    _check("unfinished", "penalty", penalty)
    return [0.0 if ended else -float(penalty) for ended in finished]


def _check(function: str, name: str, value: float) -> None:
    if not 0 <= value < math.inf:
        raise ValueError(
            f"{function}: {name}={value} must be 0 or more, and finite: it is what is taken off; to reward instead, "
            "make the weight of this reward negative"
        )
