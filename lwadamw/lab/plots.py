"""Parts of all figures: panels, colours, captions, and files with the same bytes every time."""

from __future__ import annotations

import math
import textwrap
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
LETTERS: Final = 20  # of a caption, per inch; a line has at most so many
# Maps the suffix of a file to the metadata that keep the time of drawing out of the file.
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
    """Make a function draw in the style of the figures.

    Args:
        draw: a function that draws with matplotlib.

    Raises:
        RuntimeError: when the function is called and matplotlib is not installed. The message says how to install it.
    """

    @wraps(draw)
    def inside(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            from matplotlib import rc_context
        except ImportError as error:
            raise RuntimeError(f"no figure without matplotlib: {LAB_HINT}") from error
        # Start from matplotlib's own defaults, because a matplotlibrc file of this machine would change the figure.
        with rc_context():
            from matplotlib import rcdefaults, rcParams

            rcdefaults()
            rcParams.update(STYLE)
            return draw(*args, **kwargs)

    return inside


@styled
def save(figure: Figure, path: Path) -> None:
    """Write a figure as SVG, PNG or PDF. The same figure gives the same bytes.

    Args:
        figure: the figure.
        path: path of the file. Its suffix chooses the format.

    Raises:
        ValueError: the suffix is not one of `KINDS`.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise ValueError(f"{str(path)!r} ends in none of {', '.join(KINDS)}. Give a path that ends in one of them.")
    figure.savefig(path, format=kind[1:], dpi=150, facecolor="white", metadata=KINDS[kind])


def panels(
    rows: int, columns: int, title: str, caption: str = "", size: tuple[float, float] = PANEL, **share: Any
) -> tuple[Figure, list[list[Axes]]]:
    """Make a figure with rows times columns panels.

    Args:
        rows: number of rows.
        columns: number of columns.
        title: text above the panels.
        caption: text below the panels.
        size: width and height of a panel in inches.
        share: sharex and sharey, as for matplotlib's `Figure.subplots`.

    Returns:
        The figure, and its panels by row and column.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(size[0] * columns + 1.2, size[1] * rows + 0.9), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **share)
    figure.suptitle(title, fontsize=9.5)
    if caption:
        letters = int(figure.get_figwidth() * LETTERS)
        caption = "\n".join(textwrap.fill(line, letters) for line in caption.splitlines())
        figure.supxlabel(caption, fontsize=6.5, color=GREY)
    return figure, [list(row) for row in axes]


def fold(count: int) -> tuple[int, int]:
    """Return the rows and columns that hold `count` panels."""
    rows = math.ceil(count / MOST_COLUMNS)
    return rows, math.ceil(count / rows)


def by_width(widths: Iterable[int]) -> dict[int, tuple[float, ...]]:
    """Return a colour (red, green, blue, alpha) for every width. A larger width has a darker colour."""
    from matplotlib import colormaps

    ordered = sorted(set(widths))
    places = np.linspace(0.12, 0.92, len(ordered)) if len(ordered) > 1 else [0.75]
    return {width: tuple(colormaps["viridis_r"](place)) for width, place in zip(ordered, places, strict=True)}


def by_name(names: Iterable[str]) -> dict[str, str]:
    """Return a colour for every name, in the order of the names."""
    return {name: f"C{i % 10}" for i, name in enumerate(dict.fromkeys(names))}


def log2_axis(axes: Axes, which: Literal["x", "y"], values: Iterable[float]) -> None:
    """Make an axis logarithmic to base 2, with a tick at every value.

    Args:
        axes: the panel.
        which: the axis.
        values: positions of the ticks. At most MOST_TICKS of the ticks get a number, because there is no room for more.
    """
    from matplotlib.ticker import FixedLocator, NullFormatter

    ordered = sorted(set(values))
    (axes.set_xscale if which == "x" else axes.set_yscale)("log", base=2)
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator(ordered[:: math.ceil(len(ordered) / MOST_TICKS)]))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(FixedLocator(ordered))
    axis.set_minor_formatter(NullFormatter())


def log_axis(axes: Axes, which: Literal["x", "y"]) -> None:
    """Make an axis logarithmic, with the numbers that suit the range of what has been drawn.

    Args:
        axes: the panel, with everything drawn.
        which: the axis.
    """
    from matplotlib.ticker import LogLocator, NullFormatter

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    axis, (low, high) = (axes.xaxis, axes.get_xlim()) if which == "x" else (axes.yaxis, axes.get_ylim())
    subs = (1.0, 1.5, 2.0, 3.0, 5.0, 7.0) if high / low < 5 else (1.0, 2.0, 5.0) if high / low < 200 else (1.0,)
    axis.set_major_locator(LogLocator(subs=subs))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def legend(figure: Figure, axes: Axes) -> None:
    """Put one legend beside all panels.

    Args:
        figure: the figure.
        axes: the panel whose labels the legend shows.
    """
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside right center")


def hide(axes: Sequence[Axes]) -> None:
    """Hide panels in which nothing was drawn."""
    for unused in axes:
        unused.set_axis_off()
