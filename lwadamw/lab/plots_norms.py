"""Figures of weights and activations: against width, as spectra, and against the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from statistics import median
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from .exponents import exponent
from .plots import by_name, by_width, fold, hide, legend, log2_axis, log_axis, panels, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Row = Mapping[str, str]  # One line of a CSV file: the text of each cell by the name of its column.
SHOWN: Final = 1e-3  # A spectrum is shown down to this share of its largest singular value.


@styled
def against_width(rows: Sequence[Row], layout: Sequence[Sequence[str]], title: str, caption: str = "") -> Figure:
    """Draw quantities against width on logarithmic axes, with a fitted power law per arm.

    The legend shows the exponent of each arm and its 95 % interval.

    Args:
        rows: one run per line, with the columns arm, width, seed and those of the layout.
        layout: names of the columns to show, one panel each, by row and column of the figure. "" leaves the panel empty.
        title: text above the panels.
        caption: text below the panels.
    """
    figure, grid = panels(len(layout), max(map(len, layout)), title, caption)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    colours = by_name(arms)
    for axes_row, names in zip(grid, layout, strict=True):
        for axes, name in zip(axes_row, names, strict=False):
            if not name:
                continue
            for arm in arms:
                _power_law(axes, [row for row in rows if row["arm"] == arm], name, arm, colours[arm])
            log_axis(axes, "y")
            log2_axis(axes, "x", {int(row["width"]) for row in rows})
            axes.set_title(name.replace("_", " "))
            axes.legend(fontsize=6, handlelength=1.2, labelspacing=0.25)
            axes.set_xlabel("width")
        hide([axes for axes, name in zip(axes_row, [*names, *[""] * len(axes_row)], strict=False) if not name])
    return figure


def _power_law(axes: Axes, rows: Sequence[Row], column: str, arm: str, colour: str) -> None:
    known = {(row["seed"], int(row["width"])): float(row[column]) for row in rows if row.get(column)}
    if not known:
        return
    widths = sorted({width for _, width in known})
    style: dict[str, Any] = {"color": colour, "linestyle": "", "marker": "o", "markersize": 3, "alpha": 0.6}
    axes.plot([width for _, width in known], list(known.values()), label=f"_runs {arm}", **style)
    complete = [s for s in sorted({s for s, _ in known}) if all((s, w) in known for w in widths)]
    if len(widths) < 2 or not complete:
        return
    fit = exponent(widths, [[known[seed, width] for width in widths] for seed in complete])
    line = [math.exp(fit.intercept) * width**fit.slope for width in widths]
    axes.plot(widths, line, color=colour, linewidth=1.3, label=f"{arm} {fit}")


@styled
def spectra(rows: Sequence[Row], title: str, caption: str = "") -> Figure:
    """Draw singular values against rank on logarithmic axes.

    The figure has a row of panels per matrix and a column per arm. Each width and seed has a line.

    Args:
        rows: one singular value per line, with the columns arm, width, seed, name (of the matrix), index (rank of the
            singular value, from 1) and singular_value.
        title: text above the panels.
        caption: text below the panels.
    """
    names, arms = (list(dict.fromkeys(row[key] for row in rows)) for key in ("name", "arm"))
    figure, grid = panels(len(names), len(arms), title, caption, sharex=True, sharey=True)
    colours = by_width(int(row["width"]) for row in rows)
    for axes_row, name in zip(grid, names, strict=True):
        for axes, arm in zip(axes_row, arms, strict=True):
            here = [row for row in rows if (row["name"], row["arm"]) == (name, arm)]
            for (width, _), lines in _grouped(here):
                points = sorted((int(row["index"]), float(row["singular_value"])) for row in lines)
                x, y = zip(*points, strict=True)
                label = None if f"width {width}" in axes.get_legend_handles_labels()[1] else f"width {width}"
                style: dict[str, Any] = {"color": colours[width], "linewidth": 1.0, "alpha": 0.8}
                axes.plot(x, y, label=label, **style)
            axes.set_title(f"{arm}, {name}")
        axes_row[0].set_ylabel("singular value")
    # The smallest singular value of a square matrix is nearly 0 and tells nothing, so the axis ends above it.
    grid[0][0].set_ylim(bottom=max(float(row["singular_value"]) for row in rows) * SHOWN)
    log_axis(grid[0][0], "x")
    log_axis(grid[0][0], "y")
    for axes in grid[-1]:
        axes.set_xlabel("rank")
    legend(figure, grid[0][0])
    return figure


@styled
def series(rows: Sequence[Row], statistic: str, title: str, caption: str = "") -> Figure:
    """Draw one statistic against the step, in a panel per arm, learning rate and weight decay.

    A thick line is the mean over seeds; a thin line is one seed. Each point is the median over the matrices of a run.

    Args:
        rows: one value per line, with the columns arm, width, lr, weight_decay, seed, step, name (of the matrix),
            statistic and value.
        statistic: name of the statistic.
        title: text above the panels.
        caption: text below the panels.

    Raises:
        ValueError: no line has this statistic.
    """
    here = [row for row in rows if row["statistic"] == statistic and row["value"]]
    if not here:
        there = sorted({row["statistic"] for row in rows})
        raise ValueError(f"no row has statistic {statistic!r}; there are {', '.join(there) or 'none'}.")
    settings = list(dict.fromkeys((row["arm"], row["lr"], row["weight_decay"]) for row in here))
    several = len({setting[1:] for setting in settings}) > 1
    rows_of, columns = fold(len(settings))
    figure, grid = panels(rows_of, columns, title, caption, sharex=True, sharey=True)
    flat = [axes for row in grid for axes in row]
    colours = by_width(int(row["width"]) for row in here)
    for axes, setting in zip(flat, settings, strict=False):
        runs: dict[int, list[dict[int, float]]] = {}
        for (width, _), lines in _grouped(
            row for row in here if (row["arm"], row["lr"], row["weight_decay"]) == setting
        ):
            runs.setdefault(width, []).append(_medians(lines))
        for width, seeds in runs.items():
            _over_steps(axes, seeds, width, colours[width])
        arm, lr, decay = setting
        axes.set_title(f"{arm}, lr {float(lr):g}, wd {float(decay):g}" if several else arm)
        axes.tick_params(labelbottom=True)
        axes.set_xlabel("step")
    if all(float(row["value"]) > 0 for row in here):
        log_axis(flat[0], "y")
    for row_of_axes in grid:
        row_of_axes[0].set_ylabel(statistic.replace("_", " "))
    hide(flat[len(settings) :])
    legend(figure, max(flat, key=lambda axes: len(axes.get_legend_handles_labels()[0])))
    return figure


def _grouped(rows: Iterable[Row]) -> list[tuple[tuple[int, str], list[Row]]]:
    def key(row: Row) -> tuple[int, str]:
        return int(row["width"]), row["seed"]

    return [(group, list(lines)) for group, lines in groupby(sorted(rows, key=key), key)]


def _medians(rows: Iterable[Row]) -> dict[int, float]:
    """Return the median over the matrices at every step."""
    values: dict[int, list[float]] = {}
    for row in rows:
        values.setdefault(int(row["step"]), []).append(float(row["value"]))
    return {step: median(found) for step, found in sorted(values.items())}


def _over_steps(axes: Axes, seeds: Sequence[dict[int, float]], width: int, colour: tuple[float, ...]) -> None:
    if len(seeds) > 1:
        for seed in seeds:
            axes.plot(list(seed), list(seed.values()), color=colour, linewidth=0.5, alpha=0.5)
    steps = sorted(set.intersection(*(set(seed) for seed in seeds)))
    mean = [float(np.mean([seed[step] for seed in seeds])) for step in steps]
    axes.plot(steps, mean, color=colour, linewidth=1.5, label=f"width {width}")
