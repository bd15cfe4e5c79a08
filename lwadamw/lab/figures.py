"""Every figure of the documentation, and the CSV file from which it is made."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from .outcomes import conditions, read
from .plots import save
from .plots_norms import Row, against_width, series, spectra
from .plots_runs import heatmap, transfer

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KOSSON: Final = "Kosson et al. 2510.19093, Figure 1: final validation loss of LLaMA, 20B tokens"


@dataclass(frozen=True, slots=True)
class Entry:
    """One figure of the documentation.

    Args:
        out: name of the figure's file.
        sources: names of CSV files that can give the figure. The first one that exists is used.
        draw: draws the figure from the path of the CSV file.
    """

    out: str
    sources: tuple[str, ...]
    draw: Callable[[Path], Figure]


def remake(data: Path, out: Path, entries: Sequence[Entry] | None = None) -> Iterator[str]:
    """Draw every figure whose CSV file exists.

    Args:
        data: folder with the CSV files.
        out: folder for the figures.
        entries: the figures; None: those of `FIGURES`.

    Yields:
        One line of text about each figure: from which file it was made, or that it was skipped.

    Raises:
        ValueError: a CSV file lacks something that its figure needs. The message names the file.
        RuntimeError: matplotlib is not installed.
    """
    for entry in FIGURES if entries is None else entries:
        source = next((data / name for name in entry.sources if (data / name).is_file()), None)
        if source is None:
            yield f"{entry.out}: skipped, there is no {data / entry.sources[0]}"
            continue
        save(entry.draw(source), out / entry.out)
        yield f"{out / entry.out}: from {source}"


def rows_of(path: Path, needed: Sequence[str]) -> list[Row]:
    """Read the lines of a CSV file, each as a mapping from column name to text.

    Args:
        path: path of the file.
        needed: names of the columns that must be there.

    Raises:
        ValueError: the file cannot be read, is empty, or lacks a column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows: list[Row] = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}. Give a CSV file with a header.") from error
    missing = [name for name in needed if not rows or name not in rows[0]]
    if missing:
        raise ValueError(f"{path}: no column {', '.join(map(repr, missing))}, or no line. Write the file again.")
    return rows


def _noise(variant: str, matrices: Sequence[str]) -> Callable[[Path], Figure]:
    layout = [
        [first, *(f"{statistic}_{name}" for name in matrices)]
        for first, statistic in (("gain_network", "gain"), ("rms_in", "top"), ("rms_out", "bulk"))
    ]

    def draw(path: Path) -> Figure:
        rows = rows_of(path, ["arm", "variant", "width", "seed", *(name for row in layout for name in row)])
        here = [row for row in rows if row["variant"] == variant]
        if not here:
            raise ValueError(f"{path}: no line has variant {variant!r}. Write the file again.")
        return against_width(here, layout, f"Two layers ({variant}), noise gradients", conditions(here))

    return draw


def _spectra(path: Path) -> Figure:
    rows = long_spectra(rows_of(path, ["arm", "width", "seed"]))
    rows = [row for row in rows if row["seed"] == rows[0]["seed"]]
    if not rows:
        raise ValueError(f"{path}: neither a column 'singular_value' nor one 'spectrum_...'. Write the file again.")
    return spectra(rows, "Singular values, noise gradients", conditions(rows))


def long_spectra(rows: Sequence[Row]) -> list[Row]:
    """Return one line per singular value.

    Args:
        rows: lines in either of two forms. Lines with a column singular_value are returned as they are. Otherwise a
            column spectrum_<matrix> holds pairs "rank:value rank:value", and each pair becomes a line.
    """
    if rows and "singular_value" in rows[0]:
        return list(rows)
    found: list[Row] = []
    for row in rows:
        shared = {key: row[key] for key in ("arm", "width", "seed")}
        prefix = f"{row['variant']} " if row.get("variant") else ""
        for column in (name for name in row if name.startswith("spectrum_") and row[name]):
            for pair in row[column].split():
                index, _, value = pair.partition(":")
                name = prefix + column.removeprefix("spectrum_")
                found.append({**shared, "name": name, "index": index, "singular_value": value})
    return found


def _series(statistic: str, title: str) -> Callable[[Path], Figure]:
    needed = ("arm", "width", "lr", "weight_decay", "seed", "step", "name", "statistic", "value")

    def draw(path: Path) -> Figure:
        rows = rows_of(path, needed)
        try:
            return series(rows, statistic, title, conditions(rows))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    return draw


FIGURES: Final = (
    Entry("kosson2025.svg", ("kosson2025_fig1.csv",), lambda path: transfer(read(path), KOSSON)),
    Entry("transfer.svg", ("transfer.csv",), lambda path: transfer(read(path))),
    Entry("transfer_low_wd.svg", ("transfer_low_wd.csv",), lambda path: transfer(read(path))),
    Entry("heatmap.svg", ("heatmap.csv",), lambda path: heatmap(read(path))),
    Entry("synthetic_relu.svg", ("synthetic.csv",), _noise("relu", ("in", "out"))),
    Entry("synthetic_swiglu.svg", ("synthetic.csv",), _noise("swiglu", ("in", "gate", "out"))),
    Entry("synthetic_spectra.svg", ("synthetic_spectra.csv", "synthetic.csv"), _spectra),
    Entry("gain.svg", ("series.csv",), _series("gain", "Gain: median over matrices")),
    Entry("alignment.svg", ("series.csv",), _series("alignment_ratio", "Alignment ratio: median over matrices")),
)
