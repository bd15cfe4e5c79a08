"""Transfer: how far the best learning rate moves with width, and how much loss the proxy's learning rate costs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Final, Literal

import numpy as np

from lwadamw.state.arrays import Array

from .curves import Curve, Edge, Reached, combined, interval, lowest, noise_of, slope_weights
from .outcomes import Outcome
from .paired import Difference, differences, moved_lr
from .ridge import Ridge, ridge
from .transfer_next import Next, along, suggest
from .transfer_shape import problem

NOISE: Final = 0.01
MOST_PAIRED: Final = 12  # With more arms than this, differences of pairs are left out: nobody reads so many.
NoiseFrom = Literal["seeds", "given"]


@dataclass(frozen=True, slots=True)
class Optimum:
    """Best learning rate of one arm at one weight decay and width. All learning rates are base values.

    Args:
        width: width of the model.
        lr: lowest point of a parabola in log2 lr through the best run and its neighbours.
        low: lower end of the 95 % interval of lr. It is 0 if the best run may be the one with the lowest lr of the grid.
        high: upper end of the 95 % interval of lr. It is inf if the best run may be the one with the highest lr of the grid.
        edge: why `lr` is the learning rate of a run and not the result of a fit. Empty if it is a fit.
        best_lr: learning rate of the best run.
        best_loss: mean loss over seeds at best_lr. inf: every run diverged.
        runs: number of runs.
        diverged: number of runs that diverged.
        shape: why the loss around the optimum is no parabola. Empty if it is one, as far as the noise shows.
    """

    width: int
    lr: float
    low: float
    high: float
    edge: Edge
    best_lr: float
    best_loss: float
    runs: int
    diverged: int
    shape: str = ""


@dataclass(frozen=True, slots=True)
class Regret:
    """The cost of using a given learning rate at one width.

    Args:
        width: width of the model.
        lr: the given learning rate, a base value.
        loss: mean loss at that learning rate.
        regret: difference between the loss and the best loss of the arm at this width. inf: the run diverged. NaN: not
            known.
        reached: how the loss is known.
        low: lower end of the 95 % interval of regret: of the loss at lr minus the lowest loss, when the losses are moved by the
            noise of a run. NaN if the regret is not a number.
        high: upper end of this interval.
    """

    width: int
    lr: float
    loss: float
    regret: float
    reached: Reached
    low: float = math.nan
    high: float = math.nan


@dataclass(frozen=True, slots=True)
class Drift:
    """How the optimum moves with width. Intervals are 95 % intervals.

    Args:
        slope: octaves of lr per octave of width, by least squares.
        slope_low: lower end of the interval of slope. It is -inf if an optimum at the edge of the grid leaves it open.
        slope_high: upper end of the interval of slope; inf if it is open.
        total: octaves of lr from the first width to the last.
        total_low: lower end of the interval of total; -inf if it is open.
        total_high: upper end of the interval of total; inf if it is open.
        at_edge: widths whose optimum is not inside the grid. How much they add to the drift is not known.
    """

    slope: float
    slope_low: float
    slope_high: float
    total: float
    total_low: float
    total_high: float
    at_edge: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Arm:
    """The results of one arm at one weight decay.

    Args:
        name: name of the arm.
        weight_decay: base value of the weight decay. None: the file does not have it.
        noise: standard deviation of the loss of one run. The intervals follow from it.
        noise_from: whether the noise was estimated from seeds or given.
        optima: best learning rate at each width, by rising width.
        regrets: regret at the width of each optimum. Empty if the arm has no finished run at the proxy and no lr was given.
        drift: drift of the optimum. None if only one width has an optimum.
    """

    name: str
    weight_decay: float | None
    noise: float
    noise_from: NoiseFrom
    optima: tuple[Optimum, ...]
    regrets: tuple[Regret, ...]
    drift: Drift | None


@dataclass(frozen=True, slots=True)
class Transfer:
    """The whole analysis.

    Args:
        proxy: width of the proxy.
        given_lr: learning rate of the regrets, if it was given instead of taken from the proxy's best run.
        arms: results of every arm at every weight decay.
        ridges: ridges of the arms with several weight decays.
        differences: differences of the drifts and the regrets of all pairs of arms.
        next: what to run next, for every arm, weight decay and width, and along every ridge.
    """

    proxy: int
    given_lr: float | None
    arms: tuple[Arm, ...]
    ridges: tuple[Ridge, ...]
    differences: tuple[Difference, ...] = ()
    next: tuple[Next, ...] = ()

    def best(self) -> dict[int, tuple[Arm, Optimum]]:
        """Return the arm with the lowest loss at every width, and its optimum there."""
        found: dict[int, tuple[Arm, Optimum]] = {}
        for arm in self.arms:
            for optimum in arm.optima:
                if optimum.width not in found or optimum.best_loss < found[optimum.width][1].best_loss:
                    found[optimum.width] = (arm, optimum)
        return dict(sorted(found.items()))

    def as_dict(self) -> dict[str, Any]:
        """Return the fields by name, for JSON. None stands for numbers that are not finite."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain


def analyse(
    rows: Sequence[Outcome], *, proxy: int | None = None, lr: float | None = None, noise: float = NOISE
) -> Transfer:
    """Analyse how the best learning rate transfers over width: optimum, regret and drift of every arm.

    Each weight decay of an arm is analysed by itself. An interval holds the results of 95 % of refits. In a refit every
    mean loss is moved at random, by the noise of a mean of as many runs as stand behind it. The noise of a run is estimated
    for each arm from the differences between seeds.

    Args:
        rows: the runs.
        proxy: width at which the learning rate is tuned. By default the smallest width.
        lr: learning rate of the regrets. By default the learning rate of each arm's best run at the proxy.
        noise: standard deviation of the loss of one run, for arms without two seeds.

    Raises:
        ValueError: there are no rows, no run has the proxy's width, or an argument is not positive.
    """
    if not rows:
        raise ValueError("transfer: no runs. Give at least one.")
    for name, value in (("lr", lr), ("noise", noise)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"transfer: {name}={value} is not a positive number. Give one like 0.01.")
    widths = sorted({row.width for row in rows})
    proxy = widths[0] if proxy is None else proxy
    if proxy not in widths:
        raise ValueError(f"transfer: no run has the proxy's width {proxy}. Widths are {', '.join(map(str, widths))}.")
    curves = curves_of(rows)
    arms, ridges, planned = [], [], []
    for name in dict.fromkeys(curve.arm for curve in curves):
        of_arm = [curve for curve in curves if curve.arm == name]
        seen = noise_of(of_arm)
        level: tuple[float, NoiseFrom] = (noise, "given") if seen is None else (seen, "seeds")
        decays = dict.fromkeys(curve.weight_decay for curve in of_arm)
        arms += [_arm([c for c in of_arm if c.weight_decay == wd], proxy, lr, *level) for wd in decays]
        planned += [suggest(c, level[0]) for c in of_arm]
        for width in widths:
            here = [c for c in of_arm if c.width == width]
            if (found := ridge(here, level[0])) is not None:
                ridges.append(found)
                planned.append(along(found, here, level[0]))
    names = dict.fromkeys(curve.arm for curve in curves)
    pairs = differences(curves, noise, proxy, lr) if len(names) <= MOST_PAIRED else []
    return Transfer(proxy, lr, tuple(arms), tuple(ridges), tuple(pairs), tuple(planned))


def curves_of(rows: Iterable[Outcome]) -> list[Curve]:
    """Return one curve per arm, weight decay and width.

    Args:
        rows: the runs.

    Returns:
        The curves, sorted by arm (in the order of the rows), then by weight decay, then by width.
    """
    order = {name: i for i, name in enumerate(dict.fromkeys(row.arm for row in rows))}

    def key(row: Outcome) -> tuple[int, float, int]:
        return order[row.arm], -1.0 if row.weight_decay is None else row.weight_decay, row.width

    return [Curve.of(list(group)) for _, group in groupby(sorted(rows, key=key), key)]


def _arm(curves: Sequence[Curve], proxy: int, lr: float | None, noise: float, noise_from: NoiseFrom) -> Arm:
    generator = np.random.default_rng(0)
    fits = [lowest(c.log2_lr, c.mean)[0] for c in curves]
    drawn = [c.redraw(noise, generator) for c in curves]
    low, high = np.array([c.bounds(d) for c, d in zip(curves, drawn, strict=True)]).swapaxes(0, 1)
    optima = tuple(_optimum(c, noise, fit, *ends) for c, fit, *ends in zip(curves, fits, low, high, strict=True))
    moved = moved_lr(next((c for c in curves if c.width == proxy), None), lr)
    regrets = () if moved is None else tuple(_regret(c, moved, d) for c, d in zip(curves, drawn, strict=True))
    known = [i for i, fit in enumerate(fits) if math.isfinite(fit)]
    some = [optima[i] for i in known]
    drift = _drift(some, np.array(fits)[known], low[known], high[known]) if len(known) > 1 else None
    first = curves[0]
    return Arm(first.arm, first.weight_decay, noise, noise_from, optima, regrets, drift)


def _optimum(curve: Curve, noise: float, fit: float, lower: Array, upper: Array) -> Optimum:
    low, high = (math.nan, math.nan) if curve.edge == "no run ended" else 2.0 ** np.array(interval(lower, upper))
    return Optimum(
        curve.width,
        float(2.0**fit),
        float(low),
        float(high),
        curve.edge,
        float(curve.lr[curve.best]),
        float(curve.mean[curve.best]),
        int(curve.runs.sum()),
        curve.diverged,
        problem(curve, noise),
    )


def _regret(curve: Curve, lr: float, drawn: Array) -> Regret:
    loss, reached = curve.at(lr)
    best = float(curve.mean[curve.best])
    regret = loss - best if math.isfinite(best) else math.nan
    ends = interval(curve.losses_at(lr, drawn) - drawn.min(axis=1)) if math.isfinite(regret) else (math.nan, math.nan)
    return Regret(curve.width, lr, loss, regret, reached, *ends)


def _drift(optima: Sequence[Optimum], fits: Array, low: Array, high: Array) -> Drift:
    octaves = np.log2([o.width for o in optima])
    weights = slope_weights(octaves)
    at_edge = tuple(o.width for o in optima if o.edge)
    slope, total = float(weights @ fits), float(fits[-1] - fits[0])
    return Drift(
        slope,
        *interval(*combined(weights, low, high)),
        total,
        *interval(low[-1] - high[0], high[-1] - low[0]),
        at_edge,
    )


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
