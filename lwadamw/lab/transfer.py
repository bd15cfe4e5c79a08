"""Transfer: how far the best learning rate moves with width, and what the proxy's costs at the target."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Final, Literal

import numpy as np

from lwadamw.state.arrays import Array

from .curves import Curve, Edge, Reached, interval, lowest, noise_of, slope_weights
from .outcomes import Outcome
from .ridge import Ridge, ridge

NOISE: Final = 0.01
NoiseFrom = Literal["seeds", "given"]


@dataclass(frozen=True, slots=True)
class Optimum:
    """Best learning rate of one arm, weight decay and width. Learning rates are base values."""

    width: int
    lr: float  # lowest point of a parabola in log2 lr, through the best run and its neighbours
    low: float  # 95 % interval of it; 0 where it is at the lowest lr
    high: float  # inf where it is at the highest
    edge: Edge  # why `lr` is that of a run and no fit, if so
    best_lr: float  # of the runs
    best_loss: float  # mean over seeds at best_lr; inf: every run diverged
    runs: int
    diverged: int


@dataclass(frozen=True, slots=True)
class Regret:
    """What it costs to take a learning rate from elsewhere to one width."""

    width: int
    lr: float
    loss: float
    regret: float  # loss above that arm's best at that width; inf: diverged, NaN: not known
    reached: Reached


@dataclass(frozen=True, slots=True)
class Drift:
    """How the optimum moves with width; 95 % intervals."""

    slope: float  # octaves of lr per octave of width, least squares
    slope_low: float
    slope_high: float
    total: float  # octaves of lr from the first width to the last
    total_low: float
    total_high: float
    at_edge: tuple[int, ...]  # widths whose optimum is not inside the grid, so that their part in it is not known


@dataclass(frozen=True, slots=True)
class Arm:
    """One arm at one weight decay."""

    name: str
    weight_decay: float | None
    noise: float  # standard deviation of a run's loss that the intervals are from
    noise_from: NoiseFrom
    optima: tuple[Optimum, ...]  # by width
    regrets: tuple[Regret, ...]  # as the optima; () if the arm was not run at the proxy
    drift: Drift | None  # None with one width


@dataclass(frozen=True, slots=True)
class Transfer:
    """Optima, regrets and drift of every arm, and the ridges of those with several weight decays."""

    proxy: int
    given_lr: float | None  # of the regrets, in place of the proxy's optimum
    arms: tuple[Arm, ...]
    ridges: tuple[Ridge, ...]

    def best(self) -> dict[int, tuple[Arm, Optimum]]:
        """Of every width, the arm with the lowest loss."""
        found: dict[int, tuple[Arm, Optimum]] = {}
        for arm in self.arms:
            for optimum in arm.optima:
                if optimum.width not in found or optimum.best_loss < found[optimum.width][1].best_loss:
                    found[optimum.width] = (arm, optimum)
        return dict(sorted(found.items()))

    def as_dict(self) -> dict[str, Any]:
        """For JSON: the fields by name, None for what is not finite."""
        plain: dict[str, Any] = _finite(asdict(self))
        return plain


def analyse(
    rows: Sequence[Outcome], *, proxy: int | None = None, lr: float | None = None, noise: float = NOISE
) -> Transfer:
    """Optimum, regret and drift of every arm, at each weight decay by itself.

    Intervals hold 95 % of refits with every mean loss moved by chance, as much as the noise of that many runs would. The
    noise of a run is estimated from how seeds differ, per arm, and is `noise` where there are no two seeds.

    Args:
        proxy: width the learning rate is tuned at (default: the smallest).
        lr: learning rate of the regrets (default: the best run's at the proxy, of each arm).
        noise: standard deviation of a run's loss, for runs without seeds.

    Raises:
        ValueError: no rows, no run at the proxy, or an argument that is not positive.
    """
    if not rows:
        raise ValueError("transfer: no runs. Give at least one.")
    for name, value in (("lr", lr), ("noise", noise)):
        if value is not None and not (math.isfinite(value) and value > 0):
            raise ValueError(f"transfer: {name}={value} is not a positive number.")
    widths = sorted({row.width for row in rows})
    proxy = widths[0] if proxy is None else proxy
    if proxy not in widths:
        raise ValueError(f"transfer: no run has the proxy's width {proxy}. Widths are {', '.join(map(str, widths))}.")
    curves = curves_of(rows)
    arms, ridges = [], []
    for name in dict.fromkeys(curve.arm for curve in curves):
        of_arm = [curve for curve in curves if curve.arm == name]
        seen = noise_of(of_arm)
        level: tuple[float, NoiseFrom] = (noise, "given") if seen is None else (seen, "seeds")
        decays = dict.fromkeys(curve.weight_decay for curve in of_arm)
        arms += [_arm([c for c in of_arm if c.weight_decay == wd], proxy, lr, *level) for wd in decays]
        ridges += [found for width in widths if (found := ridge([c for c in of_arm if c.width == width], level[0]))]
    return Transfer(proxy, lr, tuple(arms), tuple(ridges))


def curves_of(rows: Iterable[Outcome]) -> list[Curve]:
    """One curve per arm, weight decay and width: arms in the order of the rows, the rest rising."""
    order = {name: i for i, name in enumerate(dict.fromkeys(row.arm for row in rows))}

    def key(row: Outcome) -> tuple[int, float, int]:
        return order[row.arm], -1.0 if row.weight_decay is None else row.weight_decay, row.width

    return [Curve.of(list(group)) for _, group in groupby(sorted(rows, key=key), key)]


def _arm(curves: Sequence[Curve], proxy: int, lr: float | None, noise: float, noise_from: NoiseFrom) -> Arm:
    generator = np.random.default_rng(0)
    fits = [lowest(c.log2_lr, c.mean)[0] for c in curves]
    draws = np.array([lowest(c.log2_lr, c.redraw(noise, generator)) for c in curves])
    optima = tuple(_optimum(c, fit, drawn) for c, fit, drawn in zip(curves, fits, draws, strict=True))
    at_proxy = next((o for o in optima if o.width == proxy and math.isfinite(o.best_loss)), None)
    moved = lr if lr is not None else at_proxy.best_lr if at_proxy else None
    regrets = () if moved is None else tuple(_regret(c, moved) for c in curves)
    known = [i for i, fit in enumerate(fits) if math.isfinite(fit)]
    drift = _drift([optima[i] for i in known], np.array(fits)[known], draws[known]) if len(known) > 1 else None
    first = curves[0]
    return Arm(first.arm, first.weight_decay, noise, noise_from, optima, regrets, drift)


def _optimum(curve: Curve, fit: float, draws: Array) -> Optimum:
    low, high = 2.0 ** np.array(interval(draws))
    if curve.edge == "next to a diverged run":
        around = curve.lr[max(0, curve.best - 1) : curve.best + 2]
        low, high = min(low, around[0]), max(high, around[-1])
    return Optimum(
        curve.width,
        float(2.0**fit),
        0.0 if curve.edge == "lowest lr" else float(low),
        math.inf if curve.edge == "highest lr" else float(high),
        curve.edge,
        float(curve.lr[curve.best]),
        float(curve.mean[curve.best]),
        int(curve.runs.sum()),
        int(np.isinf(curve.losses).sum()),
    )


def _regret(curve: Curve, lr: float) -> Regret:
    loss, reached = curve.at(lr)
    best = float(curve.mean[curve.best])
    return Regret(curve.width, lr, loss, loss - best if math.isfinite(best) else math.nan, reached)


def _drift(optima: Sequence[Optimum], fits: Array, draws: Array) -> Drift:
    octaves = np.log2([o.width for o in optima])
    weights = slope_weights(octaves)
    at_edge = tuple(o.width for o in optima if o.edge)
    slope, total = float(weights @ fits), float(fits[-1] - fits[0])
    return Drift(slope, *interval(weights @ draws), total, *interval(draws[-1] - draws[0]), at_edge)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
