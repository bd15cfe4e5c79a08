"""Curves of loss against learning rate: where the lowest point is, and how precisely the noise of the runs shows it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from lwadamw.state.arrays import Array

from .outcomes import Outcome

DRAWS: Final = 2000
VALLEY: Final = 2  # The noise is estimated from this many learning rates on either side of the best one.

Edge = Literal["", "lowest lr", "highest lr", "next to a diverged run", "no run ended"]
Reached = Literal["run", "interpolated", "diverged", "outside the grid"]


@dataclass(frozen=True, eq=False)
class Curve:
    """The runs of one arm at one width and one weight decay.

    Args:
        arm: name of the arm.
        width: width of the model.
        weight_decay: base weight decay, or None where the file has no such column.
        seeds: the seeds, sorted. Empty where the file has no seeds.
        lr: base learning rates, rising, float64[lrs].
        losses: losses, float64[lines, lrs], a line for each seed. inf: the run diverged. NaN: there is no such run. Where only
            some runs have a seed, the others are in further lines. Where none has, there is one line with means.
        runs: number of runs behind each mean, float64[lrs].
        diverged: number of runs that diverged.
    """

    arm: str
    width: int
    weight_decay: float | None
    seeds: tuple[str, ...]
    lr: Array
    losses: Array
    runs: Array
    diverged: int = 0

    @classmethod
    def of(cls, rows: Sequence[Outcome]) -> Curve:
        """Build the curve from its runs.

        Runs with equal settings and no seed are averaged.

        Args:
            rows: runs of one arm, one width and one weight decay, at least one.
        """
        seeds = tuple(sorted({row.seed for row in rows if row.seed is not None}))
        lr = np.array(sorted({row.lr for row in rows}))
        line, place = {seed: i for i, seed in enumerate(seeds)}, {value: j for j, value in enumerate(lr.tolist())}
        nameless = Counter(row.lr for row in rows if row.seed is None)
        lines = len(seeds) + max(nameless.values(), default=0) if seeds else 1
        sums, runs = np.zeros((lines, len(lr))), np.zeros((lines, len(lr)))
        for row in rows:
            if row.seed is not None:
                i = line[row.seed]
            elif seeds:
                nameless[row.lr] -= 1
                i = len(seeds) + nameless[row.lr]
            else:
                i = 0
            sums[i, place[row.lr]] += row.loss
            runs[i, place[row.lr]] += 1
        losses = np.divide(sums, runs, out=np.full_like(sums, np.nan), where=runs > 0)
        first, diverged = rows[0], sum(math.isinf(row.loss) for row in rows)
        return cls(first.arm, first.width, first.weight_decay, seeds, lr, losses, runs.sum(axis=0), diverged)

    @cached_property
    def log2_lr(self) -> Array:
        """Base-2 logarithms of the learning rates, float64[lrs]."""
        return np.asarray(np.log2(self.lr))

    @cached_property
    def mean(self) -> Array:
        """Mean loss over the seeds, float64[lrs]. It is inf where at least one seed diverged."""
        return np.asarray(np.nanmean(self.losses, axis=0))

    @cached_property
    def best(self) -> int:
        """Index in `lr` of the lowest mean loss.

        If several means are equally low, the one nearest to the fitted optimum counts, and among those the first.
        """
        tied = np.flatnonzero(self.mean == self.mean.min())
        return int(tied[np.argmin(np.abs(self.log2_lr[tied] - lowest(self.log2_lr, self.mean)[0]))])

    @property
    def edge(self) -> Edge:
        """Why the optimum is a point of the grid and not a fit. Empty if it is a fit."""
        if not np.isfinite(self.mean.min()):
            return "no run ended"
        if _inner(self.mean[None]).any():
            return ""
        if self.best == 0:
            return "lowest lr"
        return "highest lr" if self.best == len(self.lr) - 1 else "next to a diverged run"

    def redraw(self, noise: float, generator: np.random.Generator) -> Array:
        """Draw the mean losses again, as other seeds might have given them.

        Args:
            noise: standard deviation of the loss of one run.
            generator: source of the random numbers.

        Returns:
            float64[DRAWS, lrs]. Each mean is moved by the noise of a mean of as many runs as stand behind it.
        """
        moves = generator.standard_normal((DRAWS, len(self.lr))) * (noise / np.sqrt(self.runs))
        return np.asarray(self.mean + moves)

    def bounds(self, drawn: Array) -> tuple[Array, Array]:
        """Return between which learning rates the optimum of each draw lies, float64[DRAWS] each, in log2 lr.

        Both are the lowest point of a parabola if it is inside the grid. If the lowest loss is at the first or last learning
        rate, the optimum may lie anywhere beyond it. Next to a diverged run it lies between the neighbours.

        Args:
            drawn: losses as `redraw` returns them.
        """
        found = lowest(self.log2_lr, drawn)
        low, high = found.copy(), found.copy()
        index = np.argmin(np.where(np.isfinite(drawn), drawn, np.inf), axis=1)
        outer = ~_inner(drawn).any(axis=1)
        x = np.concatenate([[-np.inf], self.log2_lr, [np.inf]])
        low[outer], high[outer] = x[index[outer]], x[index[outer] + 2]
        # Nothing is known to be on the far side of a point whose neighbour towards the inside is higher.
        first, last = index == 0, index == len(self.lr) - 1
        high[outer & first & ~last], low[outer & last & ~first] = (
            found[outer & first & ~last],
            found[outer & last & ~first],
        )
        return low, high

    def losses_at(self, lr: float, drawn: Array) -> Array:
        """Return the loss of each draw at a learning rate, float64[DRAWS]. It is NaN outside the grid.

        Args:
            lr: base learning rate. Between two learning rates of the grid the loss is linear in log2 lr.
            drawn: losses as `redraw` returns them.
        """
        near = int(np.argmin(np.abs(self.log2_lr - np.log2(lr))))
        if np.isclose(self.lr[near], lr, rtol=1e-6):
            return np.asarray(drawn[:, near])
        if not self.lr[0] < lr < self.lr[-1]:
            return np.full(len(drawn), np.nan)
        right = int(np.searchsorted(self.lr, lr))
        start, stop = self.log2_lr[right - 1 : right + 1]
        share = (np.log2(lr) - start) / (stop - start)
        return np.asarray((1 - share) * drawn[:, right - 1] + share * drawn[:, right])

    def at(self, lr: float) -> tuple[float, Reached]:
        """Return the mean loss at a learning rate, and how the loss is known.

        Args:
            lr: base learning rate. Between two learning rates of the grid the loss is linear in log2 lr.

        Returns:
            The loss and a word. The loss is NaN outside the grid.
        """
        loss = float(self.losses_at(lr, self.mean[None])[0])
        if np.isnan(loss):
            return loss, "outside the grid"
        how: Reached = "run" if np.isclose(self.lr, lr, rtol=1e-6).any() else "interpolated"
        return loss, how if np.isfinite(loss) else "diverged"


def lowest(x: Array, y: Array) -> Array:
    """Return the position of the lowest point of each row: the vertex of the parabola through it and its two neighbours.

    At the ends of the grid, and next to a diverged run, the position is the lowest point itself: nothing is extrapolated.
    If several points are equally low, their positions are averaged.

    Args:
        x: float64[lrs], rising.
        y: float64[rows, lrs] or float64[lrs]; inf where a run diverged.

    Returns:
        float64[rows]. NaN where a row has no finite value.
    """
    y = np.atleast_2d(y)
    tied = np.isfinite(y) & (y == y.min(axis=1, keepdims=True))
    inner = _inner(y)
    tied = np.where(inner.any(axis=1, keepdims=True), inner, tied)
    finite = np.where(np.isfinite(y), y, 0.0)
    left, right = np.diff(x, prepend=x[0] - 1), np.diff(x, append=x[-1] + 1)
    rise_left = -np.diff(finite, axis=1, prepend=finite[:, :1])
    rise_right = np.diff(finite, axis=1, append=finite[:, -1:])
    slope, curvature = rise_left * right**2 - rise_right * left**2, rise_left * right + rise_right * left
    move = np.divide(slope, 2 * curvature, out=np.zeros_like(slope), where=inner & (curvature > 0))
    with np.errstate(invalid="ignore"):
        return np.asarray(np.sum(np.where(tied, x + move, 0.0), axis=1) / np.sum(tied, axis=1))


def _inner(y: Array) -> NDArray[np.bool_]:
    """Mark the lowest points that have a finite neighbour on both sides; bool, shaped like y."""
    around = np.pad(np.isfinite(y), ((0, 0), (1, 1)))
    lowest_ = np.isfinite(y) & (y == y.min(axis=1, keepdims=True))
    return np.asarray(lowest_ & around[:, :-2] & around[:, 2:])


def noise_of(curves: Iterable[Curve]) -> float | None:
    """Estimate the standard deviation of a run's loss about its curve.

    The estimate compares the seeds of each curve around its optimum, and pools all curves. A seed that shifts its whole
    curve moves no optimum, so that shift does not count as noise.

    Args:
        curves: curves whose runs have the same noise, usually those of one arm.

    Returns:
        The standard deviation, or None if no curve has two seeds at two learning rates.
    """
    squares = freedom = 0.0
    for curve in curves:
        of_seeds = curve.losses[: max(1, len(curve.seeds))]
        valley = of_seeds[:, max(0, curve.best - VALLEY) : curve.best + VALLEY + 1]
        valley = valley[:, ~np.isinf(valley).any(axis=0)]
        valley = valley[np.isfinite(valley).sum(axis=1) > 1]  # the shift of a seed with one loss takes that loss up
        i, j = np.nonzero(np.isfinite(valley))
        # Each loss is that of its learning rate plus the shift of its seed. Some seeds may lack a learning rate.
        model = np.hstack([np.eye(valley.shape[0])[i], np.eye(valley.shape[1])[j]])
        degrees = len(i) - int(np.linalg.matrix_rank(model)) if len(i) else 0
        if degrees > 0:
            losses = valley[i, j] - valley[i, j].mean()
            squares += float(np.sum((losses - model @ np.linalg.lstsq(model, losses, rcond=None)[0]) ** 2))
            freedom += degrees
    return float(np.sqrt(squares / freedom)) if freedom else None


def slope_weights(x: Array) -> Array:
    """Return weights whose scalar product with y is the least-squares slope of y against x; float64, shaped like x."""
    centred = x - x.mean()
    return np.asarray(centred / (centred @ centred))


def interval(draws: Array, upper: Array | None = None) -> tuple[float, float]:
    """Return the ends of the interval that holds the middle 95 % of the draws.

    Args:
        draws: float64[n], infinite where a draw has no bound.
        upper: the upper bounds of the same draws, if a draw is a range. `draws` then holds the lower bounds.
    """
    upper = draws if upper is None else upper
    if np.isfinite(draws).all() and np.isfinite(upper).all():
        return float(np.quantile(draws, 0.025)), float(np.quantile(upper, 0.975))
    # Nothing lies half-way between a number and infinity.
    return float(np.quantile(draws, 0.025, method="lower")), float(np.quantile(upper, 0.975, method="higher"))


def combined(weights: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Return the bounds of a weighted sum of quantities of which bounds are known, float64[draws] each.

    Args:
        weights: float64[n].
        low: lower bounds, float64[n, draws].
        high: upper bounds, float64[n, draws].
    """
    used = weights != 0  # 0 times infinity is not a number
    weights, low, high = weights[used, None], low[used], high[used]
    positive = weights > 0
    return (
        np.asarray((weights * np.where(positive, low, high)).sum(axis=0)),
        np.asarray((weights * np.where(positive, high, low)).sum(axis=0)),
    )
