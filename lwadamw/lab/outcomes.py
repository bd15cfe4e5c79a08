"""Outcomes: how runs ended, read from any CSV file with columns for arm, width, learning rate and loss."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# A column may have any of these names, in small letters or capitals. If a file has several of them, the first name counts.
COLUMNS: Final[Mapping[str, tuple[str, ...]]] = {
    "arm": ("arm", "rule"),
    "width": ("width",),
    "lr": ("base_lr", "lr", "learning_rate"),
    "weight_decay": ("base_weight_decay", "weight_decay", "wd"),
    "seed": ("seed",),
    "loss": ("validation_loss", "val_loss", "loss"),
    "status": ("status",),
}
OPTIONAL: Final = ("weight_decay", "seed", "status")
# Columns that say how the runs were made. A figure shows those that the file has.
CONDITIONS: Final = ("steps", "tokens", "seed", "batch", "context", "depth", "data", "commit", "version")
DIVERGED: Final = ("div", "diverged")
FINISHED: Final = ("", "ok", "done", "finished", "complete", "completed", "success")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one run ended.

    Args:
        arm: name of the arm.
        width: width of the model.
        lr: base value of the learning rate.
        weight_decay: base value of the weight decay. None: the file does not have it.
        seed: seed of the run. None: the file does not have it.
        loss: loss of the run. inf: the run diverged.
    """

    arm: str
    width: int
    lr: float
    weight_decay: float | None
    seed: str | None
    loss: float


@dataclass(frozen=True)
class Outcomes:
    """The runs of one file, in the order of the file.

    Args:
        source: name of the file.
        loss: name of the column that holds the losses.
        rows: the runs.
        caption: how the runs were made, in one line, like '600 steps, 2 seeds, version 0.1.0+1a2b3c4'.
    """

    source: str
    loss: str
    rows: tuple[Outcome, ...]
    caption: str = ""


def read(path: Path, loss: str | None = None) -> Outcomes:
    """Read the runs of a CSV file with a header and one run per line.

    The columns are found by name: arm, width, lr and loss are needed; weight_decay, seed and status are optional.
    `COLUMNS` lists the other names that a column may have. Further columns are ignored.

    A run has diverged if its status is "diverged" or "div", or if its loss is empty, nan, inf or one of these words. A run
    that diverged is kept, with loss inf.

    Args:
        path: path of the file.
        loss: name of the column with the losses. By default the first name of `COLUMNS` that the file has.

    Raises:
        ValueError: the file cannot be read or lacks a column, a cell holds neither a number nor a known status, or the same
            run is there twice. The message names the file, the line and the column.
    """
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            (_, header), *lines = [(reader.line_num, row) for row in reader if any(map(str.strip, row))] or [(0, [])]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}. Give a CSV file with a header.") from error
    if not lines:
        raise ValueError(f"{path}: no runs. Give a CSV file with a header and one run per line.")
    names = [name.strip().lower() for name in header]
    places = _places(path, names, loss)
    rows, seen = [], dict[tuple[object, ...], int]()
    for number, cells in lines:
        if len(cells) != len(names):
            raise ValueError(
                f"{path}, line {number}: {len(cells)} cells, the header has {len(names)}. Correct the line."
            )
        row = _Line(path, number, {kind: (header[i], cells[i].strip()) for kind, i in places.items()}).outcome()
        setting = (row.arm, row.width, row.lr, row.weight_decay, row.seed)
        if row.seed is not None and seen.setdefault(setting, number) != number:
            raise ValueError(
                f"{path}, lines {seen[setting]} and {number}: the same arm, width, lr, weight decay and seed twice. Delete one "
                "of the lines; or if the runs differ in something else, give them different arms."
            )
        rows.append(row)
    ended = [cells for (_, cells), row in zip(lines, rows, strict=True) if math.isfinite(row.loss)]
    caption = conditions([dict(zip(names, cells, strict=True)) for cells in ended])
    return Outcomes(path.name, header[places["loss"]].strip(), tuple(rows), caption)


def conditions(rows: Sequence[Mapping[str, str]]) -> str:
    """Describe in one line how the runs were made.

    Args:
        rows: lines of the file by column. The columns of `CONDITIONS` that exist are used.

    Examples:
        >>> conditions([{"steps": "600", "seed": "0"}, {"steps": "600", "seed": "1"}])
        '600 steps, 2 seeds'
    """
    parts = []
    for name in CONDITIONS:
        known = sorted({row[name].strip() for row in rows if row.get(name)}, key=lambda text: (len(text), text))
        if len(known) > 3:
            known = [f"{known[0]} to {known[-1]}"] if all(map(str.isdigit, known)) else [f"{len(known)} kinds"]
        if name == "seed":
            seeds = len({row["seed"] for row in rows if row.get("seed")})
            parts += [f"{seeds} seed{'s' * (seeds != 1)}"] if seeds else []
        elif known:
            text = ", ".join(known)
            parts.append(f"{text} {name}" if name in ("steps", "tokens") else f"{name} {text}")
    return ", ".join(parts)


def _places(path: Path, names: Sequence[str], loss: str | None) -> dict[str, int]:
    """Map each kind of column to its position in a line."""
    places = {}
    for kind, aliases in COLUMNS.items():
        if kind == "loss" and loss is not None:
            aliases = (loss.strip().lower(),)
        found = next((names.index(alias) for alias in aliases if alias in names), None)
        if found is not None:
            places[kind] = found
        elif kind not in OPTIONAL:
            remedy = "Name the column with --loss" if kind == "loss" else "Rename the column that holds these values"
            raise ValueError(
                f"{path}: no column {' or '.join(map(repr, aliases))}; there are {', '.join(map(repr, names))}. {remedy}."
            )
    return places


@dataclass(frozen=True)
class _Line:
    """The cells of one line that are used. `cells` maps each kind of column to its name and the text of the cell."""

    path: Path
    number: int
    cells: Mapping[str, tuple[str, str]]

    def outcome(self) -> Outcome:
        width = self._number("width", minimum=1)
        if width != int(width):
            raise self._error("width", "is not a whole number", "Give the model's width, 256 for instance")
        if not self.cells["arm"][1]:
            raise self._error("arm", "names no arm", "Give every run an arm")
        lr = self._number("lr")
        if lr == 0:
            raise self._error("lr", "has no logarithm", "Leave out runs with a learning rate of 0")
        weight_decay = self._number("weight_decay") if "weight_decay" in self.cells else None
        seed = self.cells.get("seed", ("", ""))[1] or None
        return Outcome(self.cells["arm"][1], int(width), lr, weight_decay, seed, self._loss())

    def _loss(self) -> float:
        status = self.cells.get("status", ("", ""))[1].lower()
        if status not in (*DIVERGED, *FINISHED):
            remedy = f"Write {', '.join(DIVERGED + FINISHED[1:])} or leave the cell empty; and leave out runs that did not end"
            raise self._error("status", "says neither that the run ended nor that it diverged", remedy)
        text = self.cells["loss"][1].lower()
        if status in DIVERGED or text in ("", *DIVERGED):
            return math.inf
        try:
            loss = float(text)
        except ValueError:
            remedy = "Give a loss; or nan or an empty cell if the run diverged"
            raise self._error("loss", "is no number", remedy) from None
        return loss if math.isfinite(loss) else math.inf

    def _number(self, kind: str, minimum: float = 0.0) -> float:
        try:
            value = float(self.cells[kind][1])
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= minimum):
            raise self._error(kind, "is not a number that this column can hold", "Correct the cell, or delete the line")
        return value

    def _error(self, kind: str, problem: str, remedy: str) -> ValueError:
        name, text = self.cells[kind]
        return ValueError(f"{self.path}, line {self.number}, column {name!r}: {text!r} {problem}. {remedy}.")
