"""What all figures have in common: panels, colours, captions, and files that come out the same every time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, ParamSpec, TypeVar

import numpy as np

from .report import LAB_HINT

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

P = ParamSpec("P")
T = TypeVar("T")

PANEL: Final = (2.7, 2.3)  # inches
MOST_COLUMNS: Final = 3
# Suffix of a file -> what keeps the time of drawing out of it.
KINDS: Final[dict[str, dict[str, Any]]] = {".svg": {"Date": None}, ".png": {}, ".pdf": {"CreationDate": None}}
MOST_TICKS: Final = 5
GREY: Final = "#555555"
STYLE: Final[dict[Any, Any]] = {
    "font.size": 8.0,
    "axes.titlesize": 8.5,
    "axes.labelsize": 8.0,
    "legend.fontsize": 7.5,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "svg.hashsalt": "lwadamw",
}


def styled(draw: Callable[P, T]) -> Callable[P, T]:
    """In the style of the figures, or with word of how to get matplotlib, as a RuntimeError."""

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            from matplotlib import rc_context
        except ImportError as error:
            raise RuntimeError(f"no figure without matplotlib: {LAB_HINT}") from error
        # From the defaults, not from what a matplotlibrc of this machine says.
        with rc_context():
            from matplotlib import rcdefaults, rcParams

            rcdefaults()
            rcParams.update(STYLE)
            return draw(*args, **kwargs)

    return inside


@styled
def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, PNG or PDF, by the path's suffix. The same figure gives the same bytes.

    Raises:
        ValueError: another suffix.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"{str(path)!r} ends in none of {', '.join(KINDS)}. Give one of them.")
    figure.savefig(path, format=kind[1:], dpi=150, facecolor="white", metadata=KINDS[kind])


def panels(
    rows: int, columns: int, title: str, caption: str = "", size: tuple[float, float] = PANEL, **share: Any
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of rows times columns panels, under a title, over a caption."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns + 1.2, size[1] * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **share)
    figure.suptitle(title, fontsize=9.5)
    if caption:
        figure.supxlabel(caption, fontsize=6.5, color=GREY)
    return figure, [list(row) for row in axes]


def fold(count: int) -> tuple[int, int]:
    """Rows and columns of so many panels."""
    rows = math.ceil(count / MOST_COLUMNS)
    return rows, math.ceil(count / rows)


def by_width(widths: Iterable[int]) -> dict[int, tuple[float, ...]]:
    """A colour for every width, the darker the wider."""
    from matplotlib import colormaps

    ordered = sorted(set(widths))
    places = np.linspace(0.12, 0.92, len(ordered)) if len(ordered) > 1 else [0.75]
    return {width: tuple(colormaps["viridis_r"](place)) for width, place in zip(ordered, places, strict=True)}


def by_name(names: Iterable[str]) -> dict[str, str]:
    """A colour for every name, in the order given."""
    return {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(names))}


def log2_axis(axes: Axes, which: Literal["x", "y"], values: Iterable[float]) -> None:
    """A log2 axis with ticks at the values themselves, and numbers at no more of them than there is room for."""
    from matplotlib.ticker import FixedLocator, NullFormatter

    ordered = sorted(set(values))
    (axes.set_xscale if which == "x" else axes.set_yscale)("log", base=2)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(ordered[:: math.ceil(len(ordered) / MOST_TICKS)]))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(FixedLocator(ordered))
    axis.set_minor_formatter(NullFormatter())


def log_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    """A log axis of what has been drawn, with as many numbers as its range asks for."""
    from matplotlib.ticker import LogLocator, NullFormatter

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis, (low, high) = (axes.xaxis, axes.get_xlim()) if which == "x" else (axes.yaxis, axes.get_ylim())
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high / low < 5 else (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, axes: Axes) -> None:
    """One legend for all panels, beside them, from the labels of one."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center")


def hide(axes: Sequence[Axes]) -> None:
    """Panels that nothing was drawn in."""
    for unused in axes:
        unused.set_axis_off()
