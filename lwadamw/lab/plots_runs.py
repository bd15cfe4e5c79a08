"""Figures of losses: against the learning rate, and over learning rate and weight decay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from lwadamw.state.arrays import Array

from .curves import Curve, noise_of
from .outcomes import Outcomes
from .plots import GREY, by_width, fold, hide, legend, log2_axis, log_axis, panels, styled
from .ridge import Ridge, ridge
from .transfer import NOISE, Optimum, analyse, curves_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The loss axis ends at least this share of the loss above the best loss of the worst width; see `_cut`.
HEADROOM: Final = 0.15
MAP: Final = (4.2, 3.8)  # inches
BAR: Final = 0.04  # height of a panel that the bar of one width takes
SIDE: Final = 0.06  # share of the lr axis, in octaves, that is free on either side
TINY: Final = 1e-12  # a learning rate that is outside of every panel
NUMBER: Final = 0.2  # the height at which a number stands in its cell, from 0 to 1


@styled
def transfer(
    outcomes: Outcomes,
    title: str = "Loss against base learning rate",
    *,
    proxy: int | None = None,
    lr: float | None = None,
    scaled: str = "width",
    swept: str = "base learning rate",
) -> Figure:
    """Draw loss against learning rate, in a panel per arm and weight decay, with a line per width.

    A thick line is the mean over seeds, with a circle at its best run. A thin line is one seed. A cross at the top edge
    marks a run that diverged. A bar at the bottom edge is the 95 % interval of the optimum, with a dot at the fitted optimum;
    it goes to the edge of the panel where the interval is open. The dotted line marks the learning rate whose regret the
    tables have.

    Args:
        outcomes: the runs.
        title: text above the panels.
        proxy: width whose best run has the learning rate of the dotted line. By default the smallest width.
        lr: learning rate of the dotted line, instead of that of the proxy's best run.
        scaled: what the column `width` holds, in words.
        swept: what the column `lr` holds, in words.
    """
    curves = curves_of(outcomes.rows)
    settings = list(dict.fromkeys((c.arm, c.weight_decay) for c in curves))
    several = len({decay for _, decay in settings}) > 1
    rows, columns = fold(len(settings))
    proxy = min(c.width for c in curves) if proxy is None else proxy
    value = swept.removeprefix("base ")
    dotted = f"{value} of the best run at {scaled} {proxy}" if lr is None else f"{value} {lr:g}"
    bars = "bars at the bottom: fitted optimum and its 95 % interval"
    key = f"circle: best run; {bars}; dotted: {dotted}; crosses at the top: diverged"
    optima = {(arm.name, arm.weight_decay): arm.optima for arm in analyse(outcomes.rows, proxy=proxy, lr=lr).arms}
    caption = "\n".join(filter(None, (key, outcomes.caption)))
    figure, grid = panels(rows, columns, title, caption, sharey=True, sharex=True)
    colours = by_width(c.width for c in curves)
    flat = [axes for row in grid for axes in row]
    for axes, (arm, decay) in zip(flat, settings, strict=False):
        here = [c for c in curves if (c.arm, c.weight_decay) == (arm, decay)]
        for curve in here:
            rank = list(colours).index(curve.width)
            _curve(axes, curve, colours[curve.width], 0.985 - 0.035 * rank, scaled)
        for optimum in optima[arm, decay]:
            rank = list(colours).index(optimum.width)
            _bar(axes, optimum, colours[optimum.width], BAR * (rank + 0.7))
        at_proxy = [float(c.lr[c.best]) for c in here if c.width == proxy and np.isfinite(c.mean).any()]
        for mark in at_proxy if lr is None else [lr]:
            axes.axvline(mark, color=GREY, linewidth=0.8, linestyle=":", zorder=1, label="_lr of the regret")
        axes.set_title(f"{arm}, wd {decay:g}" if several else arm)
        axes.tick_params(labelbottom=True)
        axes.set_xlabel(swept)
    lrs = {row.lr for row in outcomes.rows}
    if outcomes.swept == "lr":
        log2_axis(flat[0], "x", lrs)
    else:  # values at other widths lie between those of the first one, so not every value gets a tick
        log_axis(flat[0], "x")
    # Bars of open intervals do not count.
    beyond = max((max(lrs) / min(lrs)) ** SIDE, 2**SIDE)
    flat[0].set_xlim(min(lrs) / beyond, max(lrs) * beyond)
    for row_of_axes in grid:
        row_of_axes[0].set_ylabel(outcomes.loss.replace("_", " "))
    _cut(flat[0], curves)
    hide(flat[len(settings) :])
    legend(figure, max(flat, key=lambda axes: len(axes.get_legend_handles_labels()[0])))
    return figure


def _curve(axes: Axes, curve: Curve, colour: tuple[float, ...], top: float, scaled: str) -> None:
    finite = np.isfinite(curve.mean)
    if len(curve.losses) > 1:
        for losses in curve.losses:
            ended = np.isfinite(losses)
            axes.plot(curve.lr[ended], losses[ended], color=colour, linewidth=0.6, alpha=0.5)
    style: dict[str, Any] = {"color": colour, "linewidth": 1.8, "marker": "o", "markersize": 2.5}
    axes.plot(curve.lr[finite], curve.mean[finite], label=f"{scaled} {curve.width}", **style)
    if finite.any():
        best = curve.lr[curve.best], curve.mean[curve.best]
        circle: dict[str, Any] = {"marker": "o", "markersize": 7.5, "markeredgecolor": colour, "markeredgewidth": 1.4}
        axes.plot(*best, linestyle="", markerfacecolor="white", zorder=4, label=f"_best {curve.width}", **circle)
    diverged = curve.lr[np.isinf(curve.losses).any(axis=0)]
    if len(diverged):
        cross: dict[str, Any] = {
            "marker": "x",
            "markersize": 4.5,
            "markeredgewidth": 1.3,
            "color": colour,
            "linestyle": "",
        }
        where = axes.get_xaxis_transform()
        axes.plot(diverged, np.full(len(diverged), top), transform=where, label=f"_diverged {curve.width}", **cross)


def _bar(axes: Axes, optimum: Optimum, colour: tuple[float, ...], height: float) -> None:
    """Draw the fitted optimum and its interval at a height from 0, the bottom of the panel, to 1."""
    if not np.isfinite(optimum.best_loss):
        return
    where = axes.get_xaxis_transform()
    ends = [max(optimum.low, TINY), min(optimum.high, 1 / TINY)]
    # An end that is open lies far outside of the panel, which cuts the bar off.
    axes.plot(ends, [height] * 2, transform=where, color=colour, linewidth=2.2, solid_capstyle="butt")
    point: dict[str, Any] = {"marker": "o", "markersize": 4.5, "markeredgecolor": "white", "markeredgewidth": 0.7}
    label = f"_optimum {optimum.width}"
    axes.plot(optimum.lr, height, transform=where, color=colour, linestyle="", label=label, zorder=5, **point)


def _cut(axes: Axes, curves: Sequence[Curve]) -> None:
    """Cut the loss axis, because one run that almost diverged would otherwise make all curves look flat.

    The axis ends above the best loss of the worst width, by the larger of two distances: the distance between the best
    losses of the widths, and HEADROOM times the loss.
    """
    finite = [c.mean[np.isfinite(c.mean)] for c in curves if np.isfinite(c.mean).any()]
    if not finite:
        return
    best = [float(mean.min()) for mean in finite]
    highest = max(float(mean.max()) for mean in finite)
    top = min(highest, max(best) + max(max(best) - min(best), HEADROOM * abs(max(best))))
    margin = 0.06 * (top - min(best)) or 0.01
    bars = BAR * (len({c.width for c in curves}) + 0.5)
    axes.set_ylim(min(best) - margin - (top - min(best) + 2 * margin) * bars / (1 - bars), top + margin)


@styled
def heatmap(outcomes: Outcomes, title: str = "Loss over learning rate and weight decay") -> Figure:
    """Draw the loss over learning rate and weight decay, in a panel per arm and width with three weight decays or more.

    A circle is the best learning rate at a weight decay, from a local fit. The solid line is the ridge through the circles.
    Along the dashed line lr wd is constant, along the dotted line lr / wd. A hatched cell marks a run that diverged.

    Args:
        outcomes: the runs.
        title: text above the panels.

    Raises:
        ValueError: no arm has runs at three weight decays and one width.
    """
    curves = curves_of(outcomes.rows)
    places = list(dict.fromkeys((c.arm, c.width) for c in curves))
    grouped = {place: [c for c in curves if (c.arm, c.width) == place and c.weight_decay] for place in places}
    grouped = {place: found for place, found in grouped.items() if len(found) >= 3}
    if not grouped:
        raise ValueError(
            f"{outcomes.source}: no arm has runs at three weight decays above 0 and one width. Add runs at more weight decays."
        )
    rows, columns = fold(len(grouped))
    figure, grid = panels(rows, columns, title, outcomes.caption, MAP)
    flat = [axes for row in grid for axes in row]
    for axes, ((arm, width), found) in zip(flat, grouped.items(), strict=False):
        _map(axes, found)
        ridge_ = ridge(found, noise_of(c for c in curves if c.arm == arm) or NOISE)
        slope = _ridge_lines(axes, ridge_) if ridge_ else "no ridge: too few optima inside the grid"
        axes.set_title(f"{arm}, width {width}\n{slope}")
    hide(flat[len(grouped) :])
    legend(figure, max(flat, key=lambda axes: len(axes.get_legend_handles_labels()[0])))
    return figure


def _map(axes: Axes, curves: Sequence[Curve]) -> None:
    decays = [c.weight_decay or 0.0 for c in curves]
    lrs = np.unique(np.concatenate([c.lr for c in curves]))
    table = np.full((len(decays), len(lrs)), np.nan)
    for i, curve in enumerate(curves):
        table[i, np.searchsorted(lrs, curve.lr)] = curve.mean
    finite = table[np.isfinite(table)]
    # The reader looks at the valley, so the upper half of the losses shares one colour.
    colours: dict[str, Any] = (
        {"cmap": "viridis_r", "vmin": float(finite.min()), "vmax": float(np.median(finite))} if finite.size else {}
    )
    mesh = axes.pcolormesh(
        _edges(lrs), _edges(decays), np.where(np.isfinite(table), table, np.nan), alpha=0.9, **colours
    )
    for i, j in np.ndindex(*table.shape):
        if np.isfinite(table[i, j]):
            dark = table[i, j] > (np.median(finite) + finite.min()) / 2
            # In the lower part of the cell, because circles are in the middle; and on a patch, because lines cross the cell.
            patch = {"facecolor": mesh.cmap(mesh.norm(table[i, j])), "edgecolor": "none", "pad": 0.4, "alpha": 0.8}
            ink: dict[str, Any] = {
                "color": "white" if dark else "black",
                "fontsize": 6,
                "ha": "center",
                "va": "center",
                "zorder": 6,
                "bbox": patch,
            }
            low, high = np.log2(_edges(decays)[i : i + 2])
            axes.text(float(lrs[j]), 2.0 ** float(low + (high - low) * NUMBER), f"{table[i, j]:.3f}", **ink)
        elif np.isinf(table[i, j]):
            (x0, x1), (y0, y1) = _edges(lrs)[j : j + 2], _edges(decays)[i : i + 2]
            axes.fill([x0, x1, x1, x0], [y0, y0, y1, y1], facecolor="none", edgecolor=GREY, hatch="////", linewidth=0)
    log2_axis(axes, "x", lrs)
    log2_axis(axes, "y", decays)
    axes.grid(False)
    axes.set(xlim=_edges(lrs)[[0, -1]], ylim=_edges(decays)[[0, -1]])
    axes.set(xlabel="base learning rate", ylabel="base weight decay")
    axes.figure.colorbar(mesh, ax=axes, extend="max", shrink=0.9)


def _edges(values: Sequence[float] | Array) -> Array:
    """Return the bounds of cells around values. A bound lies half-way between two values in log2."""
    x = np.log2(values)
    middle = (x[1:] + x[:-1]) / 2
    first, last = (x[0] - 0.5, x[-1] + 0.5) if len(x) == 1 else (2 * x[0] - middle[0], 2 * x[-1] - middle[-1])
    return np.asarray(2.0 ** np.array([first, *middle, last]))


def _ridge_lines(axes: Axes, found: Ridge) -> str:
    x, y = np.log2(found.lr), np.log2(found.weight_decay)
    wd = 2.0 ** np.array([y.min() - 1, y.max() + 1])
    point: dict[str, Any] = {
        "linestyle": "",
        "marker": "o",
        "markersize": 5,
        "markerfacecolor": "white",
        "markeredgecolor": "black",
    }
    axes.plot(found.lr, found.weight_decay, zorder=5, label="best lr of a decay", **point)
    for slope, style, label in (
        (found.slope, "-", "ridge"),
        (-1.0, "--", "lr·wd constant"),
        (1.0, ":", "lr/wd constant"),
    ):
        line = 2.0 ** (x.mean() + slope * (np.log2(wd) - y.mean()))
        axes.plot(line, wd, color="black", linewidth=1.4, linestyle=style, label=label)
    return f"best lr ∝ wd^{found.slope:+.2f} ({found.slope_low:+.2f} to {found.slope_high:+.2f})"
