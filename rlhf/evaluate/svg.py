"""Figures as SVG text that follows the page's theme.

Matplotlib draws with colours that stand for names; in the SVG each becomes a CSS variable, so that one
drawing serves light and dark pages. Text stays text and takes the page's font.
"""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SERIES = 6  # colours that tell series apart; further series repeat them
PALETTE: Mapping[str, tuple[str, str]] = MappingProxyType(
    {  # name: (light, dark)
        "page": ("#f6f7f9", "#14171c"),
        "surface": ("#ffffff", "#1c2027"),
        "ink": ("#1b1f26", "#e8ebf0"),
        "muted": ("#596270", "#a3acba"),
        "grid": ("#e1e5ea", "#323843"),
        "base": ("#98a2b1", "#7f8a9b"),
        "aligned": ("#1d63b8", "#69aef6"),
        "worse": ("#c2500a", "#f79a55"),
        "better": ("#0f766e", "#4cc6ae"),
        "series-0": ("#1d63b8", "#69aef6"),
        "series-1": ("#c2500a", "#f79a55"),
        "series-2": ("#0f766e", "#4cc6ae"),
        "series-3": ("#8a4fa3", "#c99be2"),
        "series-4": ("#8a6a00", "#d9b648"),
        "series-5": ("#6b7482", "#a3acba"),
    }
)
"""The colours of the report: each has enough contrast with its own surface."""

_STANDS_FOR = {f"#fe{40 + i:02x}0d": name for i, name in enumerate(PALETTE)}
COLOUR: Mapping[str, str] = MappingProxyType({name: code for code, name in _STANDS_FOR.items()})
"""Name -> what to give Matplotlib as that colour."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rlhf",
    "font.family": "DejaVu Sans",
    "font.size": 10.5,
    "figure.facecolor": "none",
    "figure.edgecolor": "none",
    "savefig.facecolor": "none",
    "savefig.edgecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": COLOUR["grid"],
    "axes.labelcolor": COLOUR["muted"],
    "axes.labelsize": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": COLOUR["grid"],
    "grid.linewidth": 0.8,
    "text.color": COLOUR["ink"],
    "xtick.color": COLOUR["grid"],
    "ytick.color": COLOUR["grid"],
    "xtick.labelcolor": COLOUR["muted"],
    "ytick.labelcolor": COLOUR["muted"],
    "ytick.major.size": 0,
    "xtick.major.size": 3,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "patch.linewidth": 0,
}


@dataclass(frozen=True)
class Panel:
    """One drawing with its heading and what its colours mean: (label, colour name) pairs."""

    title: str
    svg: Markup
    legend: tuple[tuple[str, str], ...] = ()


def panel(
    title: str,
    paint: Callable[[Axes], None],
    *,
    width: float = 310,
    height: float = 190,
    legend: tuple[tuple[str, str], ...] = (),
) -> Panel:
    """Draws one pair of axes; sizes are in CSS pixels at natural size."""
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(width / 72, height / 72), layout="constrained")
        axes = figure.add_subplot()
        paint(axes)
        buffer = io.StringIO()
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", metadata=no_metadata)
    return Panel(title, Markup(themed(buffer.getvalue(), title)), legend)


def themed(svg: str, label: str) -> str:
    """A Matplotlib SVG made fit to stand in a page: theme colours, ids of its own, no XML head."""
    svg = svg[svg.index("<svg") :]
    for code, name in _STANDS_FOR.items():
        svg = svg.replace(code, f"var(--{name})")
    svg = re.sub(r'\s(?:xmlns(?::xlink)?|version|width|height)="[^"]*"', "", svg, count=5)
    prefix = "f" + hashlib.blake2b(svg.encode(), digest_size=4).hexdigest()
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{prefix}-", svg)
    return svg.replace("<svg", f'<svg role="img" aria-label="{Markup.escape(label)}"', 1)


def css(theme: int) -> str:
    """The palette as CSS variables: theme 0 is light, 1 is dark.

    >>> css(0).startswith("--page: #f6f7f9;")
    True
    """
    return " ".join(f"--{name}: {codes[theme]};" for name, codes in PALETTE.items())
