"""The tables of the report docs/width_transfer.md, made from the CSV files of the runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from lwadamw.monitor.text import aligned

from .exponents import Exponent, exponent
from .figures import rows_of
from .outcomes import read
from .paired import Difference, differences
from .transfer import Arm, Drift, Transfer, analyse, curves_of
from .transfer_table import regret_difference, regret_of, signed_span, span

# What all runs of an exponent have in common.
_SETTING: Final = ("base_width", "lr", "weight_decay", "batch", "run_taus")
Rows = Sequence[Mapping[str, str]]
Table = Callable[[Path], str]


def refresh(report: str, data: Path, tables: Mapping[str, tuple[str, Table]] | None = None) -> str:
    """Return the report with fresh tables.

    Args:
        report: text of the report. The table NAME of `TABLES` stands between the lines `<!-- NAME:begin -->` and
            `<!-- NAME:end -->`. A table without these lines is left out; all other text stays.
        data: folder with the CSV files.
        tables: name of each table, its CSV file, and how it is made; None: `TABLES`.

    Raises:
        ValueError: a CSV file is missing or lacks a column.
    """
    for name, (source, table) in (TABLES if tables is None else tables).items():
        block = re.compile(f"(<!-- {name}:begin -->\n).*?(<!-- {name}:end -->)", re.DOTALL)
        if block.search(report):
            text = table(data / source)
            report = block.sub(lambda found, text=text: f"{found[1]}{text}\n{found[2]}", report)  # type: ignore[misc]
    return report


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. The first column holds text; all other columns hold numbers and are aligned right.

    Args:
        header: names of the columns.
        rows: cells of every row, as many as the header has.
    """
    line = "| " + " | ".join(header) + " |"
    rule = "| --- |" + " ---: |" * (len(header) - 1)
    return "\n".join([line, rule, *("| " + " | ".join(row) + " |" for row in rows)])


def fit(rows: Rows, column: str) -> Exponent:
    """Return the width exponent of a column.

    Args:
        rows: lines with the columns width, seed and `column`. Seeds that lack a width are left out.
        column: name of the column.
    """
    known = {(row["seed"], int(row["width"])): float(row[column]) for row in rows if row[column]}
    widths = sorted({width for _, width in known})
    seeds = [seed for seed in sorted({s for s, _ in known}) if all((seed, width) in known for width in widths)]
    return exponent(widths, [[known[seed, width] for width in widths] for seed in seeds])


def _arms(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["arm"] for row in rows))


def _named_by_setting(rows: Rows) -> dict[str, list[Mapping[str, str]]]:
    """Return the rows of every arm. An arm whose runs differ in a base value or in their length is several arms."""
    found: dict[str, list[Mapping[str, str]]] = {}
    for arm in _arms(rows):
        own = [row for row in rows if row["arm"] == arm]
        differ = [name for name in _SETTING if len({row.get(name) for row in own}) > 1]
        for row in own:
            found.setdefault(", ".join([arm, *(f"{name} {row[name]}" for name in differ)]), []).append(row)
    return found


# The matrices of the synthetic network for each activation.
VARIANTS: Final[Mapping[str, tuple[str, ...]]] = {"relu": ("in", "out"), "swiglu": ("in", "gate", "out")}


def noise_exponents(path: Path, variant: str) -> list[list[str]]:
    """Return the width exponents of gain, singular values and weight RMS under every arm, as the cells of a table.

    Args:
        path: the file that `python -m lwadamw synthetic` wrote.
        variant: the activation.

    Returns:
        The header, then a row per quantity. An exponent that cannot be fitted is "-". Only the header if no run has this
        activation. Runs of an arm that differ in a base value or in their length have a column each.

    Raises:
        ValueError: the file cannot be read or lacks a column.
    """
    columns = [
        "gain_network",
        *(f"{what}_{name}" for what in ("gain", "top", "second", "bulk", "rms") for name in VARIANTS[variant]),
    ]
    rows = [row for row in rows_of(path, ["arm", "variant", *columns]) if row["variant"] == variant]
    arms = _named_by_setting(rows)
    lines = [[column.replace("_", " "), *(_exponent(own, column) for own in arms.values())] for column in columns]
    return [["width exponent of", *arms], *(lines if rows else [])]


def noise_report(path: Path) -> str:
    """Return the tables of `noise_exponents` for all activations of a file, as text.

    Args:
        path: the file that `python -m lwadamw synthetic` wrote.

    Raises:
        ValueError: the file cannot be read or lacks a column.
    """
    tables = {variant: noise_exponents(path, variant) for variant in VARIANTS}
    return "\n\n".join("\n".join([variant, *aligned(rows)]) for variant, rows in tables.items() if len(rows) > 1)


def _exponent(rows: Rows, column: str) -> str:
    # One width, or no seed that has every width, gives no slope.
    known = {(row["seed"], row["width"]) for row in rows if row[column]}
    widths, seeds = {width for _, width in known}, {seed for seed, _ in known}
    whole = any(all((seed, width) in known for width in widths) for seed in seeds)
    return str(fit(rows, column)) if len(widths) > 1 and whole else "-"


def _noise(variant: str) -> Table:
    def table(path: Path) -> str:
        header, *rows = noise_exponents(path, variant)
        return markdown(header, rows)

    return table


def _steady(path: Path) -> str:
    """Table of measured over predicted weight RMS at every width: mean, and range over arms, matrices and seeds."""
    rows = rows_of(path, ["arm", "variant", "width", "steady_rms", "rms_in", "rms_out"])
    widths = sorted({int(row["width"]) for row in rows})
    lines = []
    for variant in dict.fromkeys(row["variant"] for row in rows):
        cells = []
        for width in widths:
            here = [row for row in rows if row["variant"] == variant and int(row["width"]) == width]
            names = [name for name in here[0] if name.startswith("rms_") and here[0][name]]
            ratios = [float(row[name]) / float(row["steady_rms"]) for row in here for name in names]
            cells.append(f"{np.mean(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
        lines.append([variant, *cells])
    return markdown(["weight RMS / sqrt(lr/2wd)", *(f"width {width}" for width in widths)], lines)


def _transfer(path: Path) -> str:
    rows = read(path).rows
    found = analyse(rows)
    widths = sorted({optimum.width for arm in found.arms for optimum in arm.optima})
    header = ["arm", *(f"best lr, {width}" for width in widths), "drift per octave of width"]
    header += [f"regret, {width}" for width in widths[1:]] + [f"best loss, {width}" for width in widths]
    return markdown(header, [_line(arm) for arm in found.arms])


def _slope(drift: Drift | Difference) -> str:
    return f"{drift.slope:+.2f} ({signed_span(drift.slope_low, drift.slope_high, 2)})"


def _line(arm: Arm) -> list[str]:
    best = [f"{o.lr:.2g} ({span(o.low, o.high)})" for o in arm.optima]
    drift = "-" if arm.drift is None else _slope(arm.drift)
    regrets = [regret_of(r) for r in arm.regrets[1:]]
    return [arm.name, *best, drift, *regrets, *(f"{o.best_loss:.3f}" for o in arm.optima)]


def _differences(path: Path) -> str:
    """Table of the drift of every arm in a row minus that of the arm in the column."""
    return _pairs(path, "drift of, minus drift of", _slope)


def _regret_differences(path: Path) -> str:
    """Table of the regret of every arm in a row minus that of the arm in the column, at the largest width."""
    return _pairs(path, "regret of, minus regret of", lambda d: regret_difference(d.regrets[-1]))


def _pairs(path: Path, corner: str, cell: Callable[[Difference], str]) -> str:
    found = differences(curves_of(read(path).rows))
    arms = list(dict.fromkeys(d.arm for d in found))
    others = list(dict.fromkeys(d.other for d in found))
    cells = {(d.arm, d.other): cell(d) for d in found}
    return markdown(
        [corner, *others],
        [[arm, *(cells.get((arm, other), "") for other in others)] for arm in arms],
    )


def _regret(value: float) -> str:
    return "diverged" if math.isinf(value) else f"{value:.3f}"


def _weights(path: Path) -> str:
    """Table of width exponents of the weights when the lr begins to fall, for the lr that is best at the proxy."""
    columns = ("effective_lr", "effective_wd", "relative_update", "top", "second", "median_singular")
    rows = [row for row in rows_of(path, ["arm", "width", "lr", "seed", "taus", "rms_ratio", *columns]) if row["loss"]]
    found = analyse(read(path).rows)
    lines = []
    for arm in found.arms:
        lr = next(o for o in arm.optima if o.width == found.proxy).best_lr
        here = [row for row in rows if row["arm"] == arm.name and float(row["lr"]) == lr]
        a, b = (fit(here, column).slope for column in columns[:2])
        widest = max(int(row["width"]) for row in here)
        taus = [float(row["taus"]) for row in here if int(row["width"]) == widest]
        ratio = [float(row["rms_ratio"]) for row in here if int(row["width"]) == widest]
        # Rounding first, and then adding 0.0, turns -0.0 into 0.0, so that no cell says -0.00.
        predicted = [f"{round(x, 2) + 0.0:+.2f}" for x in ((a + b) / 2, (a - b) / 2 + 0.75, (a - b) / 2 + 0.5)]
        update, top, second, median = (str(fit(here, column)) for column in columns[2:])
        lines.append([
            arm.name, f"{lr:g}", f"{np.mean(taus):.1f}", f"{np.mean(ratio):.2f}", predicted[0], update, predicted[1], top,
            second, predicted[2], median,
        ])  # fmt: skip
    header = [
        "arm", "lr", "tau passed at the widest", "its RMS / steady RMS", "relative update: predicted", "seen",
        "top singular value: predicted", "seen", "second: seen", "median: predicted", "seen",
    ]  # fmt: skip
    return markdown(header, lines)


def _ridge(path: Path) -> str:
    found: Transfer = analyse(read(path).rows)
    lines = [
        [f"{wd:g}", f"{lr:.2g}", f"{lr * wd:.2g}", f"{lr / wd:.2g}"]
        for ridge in found.ridges
        for wd, lr in zip(ridge.weight_decay, ridge.lr, strict=True)
    ]
    slopes = [f"{r.slope:+.2f} ({r.slope_low:+.2f} to {r.slope_high:+.2f})" for r in found.ridges]
    axes = ["not fitted" if r.axis is None else f"{r.axis:+.2f}" for r in found.ridges]
    table = markdown(["weight decay", "best lr", "lr·wd", "lr/wd"], lines)
    return (
        f"{table}\n\nSlope of log best lr against log weight decay: {', '.join(slopes)}. Flattest direction of a quadratic "
        f"form around the lowest runs: {', '.join(axes)}."
    )


def _published(path: Path) -> str:
    found = analyse(read(path).rows, lr=0.008)
    widths = [o.width for o in found.arms[0].optima]
    lines = [[arm.name, *(f"{o.best_lr:g}" for o in arm.optima), _regret(arm.regrets[-1].regret)] for arm in found.arms]
    return markdown(["arm", *(f"best lr, {width}" for width in widths), f"regret of lr 0.008 at {widths[-1]}"], lines)


def _series(path: Path) -> str:
    """Table of means over the second half of the steps before the lr falls, at every width, with their width exponent."""
    rows = rows_of(path, ["arm", "width", "steps", "cooldown", "step", "statistic", "value"])
    values: dict[tuple[str, str], dict[int, list[float]]] = {}
    for row in rows:
        end = float(row["steps"]) * (1 - float(row["cooldown"]))
        if end / 2 < int(row["step"]) <= end:
            by_width = values.setdefault((row["statistic"], row["arm"]), {})
            by_width.setdefault(int(row["width"]), []).append(float(row["value"]))
    arms = _arms(rows)

    def cell(statistic: str, arm: str) -> str:
        means = {width: float(np.mean(found)) for width, found in sorted(values[statistic, arm].items())}
        slope = exponent(list(means), list(means.values())).slope
        return f"{', '.join(f'{mean:.2g}' for mean in means.values())} ({slope:+.2f})"

    statistics = dict.fromkeys(statistic for statistic, _ in values)
    lines = [[name.replace("_", " "), *(cell(name, arm) for arm in arms)] for name in statistics]
    widths = sorted({int(row["width"]) for row in rows})
    return markdown([f"at widths {', '.join(map(str, widths))} (exponent)", *arms], lines)


TABLES: Final[Mapping[str, tuple[str, Table]]] = {
    "published": ("kosson2025_fig1.csv", _published),
    "steady": ("synthetic.csv", _steady),
    "relu": ("synthetic.csv", _noise("relu")),
    "swiglu": ("synthetic.csv", _noise("swiglu")),
    "transfer": ("transfer.csv", _transfer),
    "weights": ("transfer.csv", _weights),
    "paired": ("transfer.csv", _differences),
    "paired_regret": ("transfer.csv", _regret_differences),
    "transfer_low": ("transfer_low_wd.csv", _transfer),
    "paired_low": ("transfer_low_wd.csv", _differences),
    "paired_regret_low": ("transfer_low_wd.csv", _regret_differences),
    "series": ("series.csv", _series),
    "ridge": ("heatmap.csv", _ridge),
}
