"""The tables and figures of docs/scaling.md: width with depth, and batch size with horizon.

The analysis is that of `transfer`. What changes from one curve to the next is the depth, the steps, or the batch size in place
of the width. What is swept is the learning rate, or the weight decay.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .curves import Curve
from .figures import Entry, rows_of
from .findings import markdown
from .outcomes import Outcome, Outcomes, conditions
from .paired import differences
from .plots_runs import transfer
from .transfer import analyse, curves_of
from .transfer_table import regret_of, signed_span, span

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Rows = Sequence[Mapping[str, str]]
_NEEDED: Final = ("arm", "width", "depth", "lr", "weight_decay", "seed", "batch", "steps", "context", "status", "loss")


def by_depth(path: Path) -> Outcomes:
    """Read runs of width and depth, with the depth in the place of the width, and an arm for each rule at each width.

    Args:
        path: the file that `python -m lwadamw scaling` wrote.

    Raises:
        ValueError: the file cannot be read or lacks a column.
    """
    rows = sorted(rows_of(path, _NEEDED), key=lambda row: (int(row["width"]), row["arm"]))
    found = [
        Outcome(
            f"{row['arm']}, width {row['width']}", int(row["depth"]), float(row["lr"]), None, row["seed"], _loss(row)
        )
        for row in rows
    ]
    return Outcomes(path.name, "loss", tuple(found), conditions([{**row, "depth": ""} for row in rows]))


def by_horizon(path: Path, what: str) -> Outcomes:
    """Read runs of batch size and horizon, with the weight decay in the place of the learning rate.

    Args:
        path: the file that `python -m lwadamw scaling` wrote.
        what: "steps" for the runs of one batch size at several lengths, "batch" for the runs of one number of tokens at several
            batch sizes. It is in the place of the width.

    Raises:
        ValueError: the file cannot be read or lacks a column.
    """
    rows = [{**row, "tokens": str(_tokens(row))} for row in rows_of(path, _NEEDED)]
    same = "batch" if what == "steps" else "tokens"
    groups: dict[str, Rows] = {value: [row for row in rows if row[same] == value] for value in _values(rows, same)}
    here = [row for group in groups.values() if len(_values(group, what)) > 1 for row in group]
    arm = "windows per step" if what == "steps" else "tokens"
    found = [
        Outcome(f"{row[same]} {arm}", int(row[what]), float(row["weight_decay"]), None, row["seed"], _loss(row))
        for row in here
    ]
    return Outcomes(path.name, "loss", tuple(found), conditions([{**row, what: "", "tokens": ""} for row in here]))


def _values(rows: Rows, name: str) -> list[str]:
    return sorted({row[name] for row in rows}, key=int)


def _tokens(row: Mapping[str, str]) -> int:
    return int(row["steps"]) * int(row["batch"]) * int(row["context"])


def _loss(row: Mapping[str, str]) -> float:
    return float("inf") if row["status"] == "diverged" or not row["loss"] else float(row["loss"])


def _best(outcomes: Outcomes, swept: str, scaled: str) -> str:
    """Table of the best value of what was swept, its power of what was scaled, and the regret of the proxy's value."""
    found = analyse(outcomes.rows)
    widths = sorted({optimum.width for arm in found.arms for optimum in arm.optima})
    header = ["arm", *(f"best {swept}, {scaled} {width}" for width in widths), f"power of the {scaled}"]
    header += [f"regret, {width}" for width in widths[1:]] + [f"best loss, {width}" for width in widths]
    lines = []
    for arm in found.arms:
        optima = {o.width: o for o in arm.optima}
        regrets = {r.width: r for r in arm.regrets}
        best = [f"{o.lr:.2g} ({span(o.low, o.high)})" if (o := optima.get(w)) else "" for w in widths]
        power = (
            "-"
            if arm.drift is None
            else f"{arm.drift.slope:+.2f} ({signed_span(arm.drift.slope_low, arm.drift.slope_high, 2)})"
        )
        costs = [regret_of(r) if (r := regrets.get(w)) else "" for w in widths[1:]]
        lines.append(
            [arm.name, *best, power, *costs, *(f"{optima[w].best_loss:.3f}" if w in optima else "" for w in widths)]
        )
    return markdown(header, lines)


def _paired_depth(path: Path) -> str:
    """Table of the drift with depth of the arm with depth exponents minus that of the arm without, at each width."""
    lines = []
    for d in differences(_curves(by_depth(path))):
        one, other = (name.rpartition(", width ") for name in (d.arm, d.other))
        if one[2] == other[2]:
            slope = f"{d.slope:+.2f} ({signed_span(d.slope_low, d.slope_high, 2)})"
            lines.append([one[0], other[0], one[2], slope])
    return markdown(["drift of", "minus drift of", "width", "difference, octaves of lr per octave of depth"], lines)


def loss_differences(path: Path) -> dict[tuple[int, int], list[float]]:
    """Return the losses with depth exponents minus those without, at the same lr and seed, by width and depth.

    Depths at which both arms have the same runs are left out, and so are pairs of which a run diverged.

    Args:
        path: the file that `python -m lwadamw scaling` wrote.

    Raises:
        ValueError: the file cannot be read or lacks a column.
    """
    rows = rows_of(path, (*_NEEDED, "base_depth"))
    losses = {(row["arm"], *(row[name] for name in ("width", "depth", "lr", "seed"))): _loss(row) for row in rows}
    found: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        arm, plus, _ = row["arm"].partition("+")
        without = losses.get((arm, *(row[name] for name in ("width", "depth", "lr", "seed"))))
        if plus and without is not None and row["depth"] != row["base_depth"]:
            difference = _loss(row) - without
            if math.isfinite(difference):
                found.setdefault((int(row["width"]), int(row["depth"])), []).append(difference)
    return dict(sorted(found.items()))


def _depth_losses(path: Path) -> str:
    lines = []
    for (width, depth), values in loss_differences(path).items():
        lower = sum(value < 0 for value in values)
        spread = f"{min(values):+.3f} to {max(values):+.3f}"
        lines.append([str(width), str(depth), f"{lower} of {len(values)}", f"{sum(values) / len(values):+.3f}", spread])
    return markdown(["width", "depth", "pairs in which it is lower", "mean difference", "smallest to largest"], lines)


def _curves(outcomes: Outcomes) -> Sequence[Curve]:
    return curves_of(outcomes.rows)


Table = Callable[[Path], str]
# Name of a table in docs/scaling.md, the file that it is made from, and how.
TABLES: Final[Mapping[str, tuple[str, Table]]] = {
    "depth": ("depth.csv", lambda path: _best(by_depth(path), "lr", "depth")),
    "depth_paired": ("depth.csv", _paired_depth),
    "depth_losses": ("depth.csv", _depth_losses),
    "horizon": ("horizon.csv", lambda path: _best(by_horizon(path, "steps"), "wd", "steps")),
    "batch": ("horizon.csv", lambda path: _best(by_horizon(path, "batch"), "wd", "batch")),
}


def draw_depth(path: Path) -> Figure:
    """Draw loss against learning rate, with a line per depth and a panel per arm and width."""
    return transfer(by_depth(path), "Loss against base learning rate, by depth", scaled="depth")


def draw_horizon(path: Path) -> Figure:
    """Draw loss against weight decay, with a line per length of the run."""
    title = "Loss against weight decay, by length of the run"
    return transfer(by_horizon(path, "steps"), title, scaled="steps", swept="weight decay")


FIGURES: Final = (
    Entry("depth.svg", ("depth.csv",), draw_depth),
    Entry("horizon.svg", ("horizon.csv",), draw_horizon),
)
