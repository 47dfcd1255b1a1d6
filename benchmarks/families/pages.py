"""The table as a page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
import transformers

from benchmarks.families.known import KNOWN
from benchmarks.families.measure import BFLOAT16, DTYPES, FLOAT32, Row

HEAD = f"""# Families of models

What `python -m benchmarks.families` found: a tiny model with random weights of every causal language model that
`transformers` has, sampled from, learnt from and, where the family has a sequence classifier, used as a reward model.
Each is held to a plain `transformers` pass of each sequence alone, in float32. Prompts have 2 to 40 tokens, beyond
windows, chunks and original lengths; 24 tokens follow, at temperature 0.8, in fewer slots than there are responses.

*Equal* means: in float32 no log-probability or reward is {FLOAT32:g} or more away; in bfloat16 ours are at most
{BFLOAT16} times as far from the float32 pass as the model's own bfloat16 pass, by root mean square and by maximum.
*Refused* means an error that names the model, before anything is sampled or trained.
"""


def counts(rows: Sequence[Row]) -> str:
    """How many rows came out in which way.

    >>> counts([Row("a"), Row("b"), Row("c", "refused: its name is c")])
    '3 rows: 2 equal, 1 refused'
    """
    order = (
        "equal",
        "refused in float32",
        "refused in bfloat16",
        "refused",
        "not a causal text model",
        "FAILS",
    )
    kinds = Counter(next(kind for kind in order if row.outcome.startswith(kind)) for row in rows)
    found = ", ".join(f"{kinds[kind]} {kind}" for kind in order if kinds[kind])
    return f"{len(rows)} rows: {found}"


def line(row: Row) -> str:
    """A row as it is printed."""
    if not row.policy:
        return f"{row.name:40s} {row.outcome}"
    cells = [
        f"{row.sampler[dtype]}, {row.learner[dtype]}, {_number(row.policy.get(dtype))}"
        for dtype in row.policy
    ]
    rewards = [_number(row.reward[dtype]) for dtype in row.reward]
    return f"{row.name:40s} {' | '.join(cells)} | reward {' '.join(rewards) or '-'} | {row.outcome}"


def page(rows: Sequence[Row]) -> str:
    """The whole page, rows sorted by name."""
    heads = (
        "family",
        "for example",
        "sampler",
        "learner",
        "float32, nats",
        "bfloat16, over its own",
        "reward",
        "",
    )
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in sorted(rows, key=lambda row: row.name):
        cells = [
            row.name,
            KNOWN.get(row.name, ""),
            _paths(row.sampler),
            _paths(row.learner),
            *(_number(row.policy.get(dtype)) for dtype in DTYPES),
            _reward(row),
            row.outcome,
        ]
        lines.append(f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |")
    versions = f"transformers {transformers.__version__}, torch {torch.__version__.partition('+')[0]}"
    return f"{HEAD}\n**{counts(rows)}** ({versions}).\n\n" + "\n".join(lines) + "\n"


def _paths(found: dict[str, str]) -> str:
    """A path for each format, or the one that they share."""
    return " / ".join(dict.fromkeys(found.values()))


def _reward(row: Row) -> str:
    if not row.reward:
        return ""
    return f"{row.reward_path}, {' / '.join(_number(row.reward.get(dtype)) for dtype in DTYPES)}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}" if value < 1e-2 else f"{value:.2f}"
