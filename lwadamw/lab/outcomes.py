"""Outcomes: how runs ended, read from any CSV file with columns for arm, width, learning rate and loss."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from .transfer_columns import Place, cells, places
from .transfer_runs import check_conditions, ended, lowest_over, proxies

# Columns that say how the runs were made. A figure shows those that the file has.
CONDITIONS: Final = ("steps", "tokens", "seed", "batch", "context", "depth", "data", "commit", "version")
SAME: Final = 1e-6  # values that differ by a smaller share were rounded differently
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
        width: name of the column that holds the widths.
        notes: what was left out of the file, one sentence each.
        lr: name of the column that holds the learning rates.
        swept: what `Outcome.lr` holds, in words.
    """

    source: str
    loss: str
    rows: tuple[Outcome, ...]
    caption: str = ""
    width: str = "width"
    notes: tuple[str, ...] = ()
    lr: str = "lr"
    swept: str = "lr"


def read(
    path: Path, loss: str | None = None, columns: Mapping[str, str] | None = None, over: str | None = None
) -> Outcomes:
    """Read the runs of a file with a header and one run per line. Commas, semicolons or tabs separate the cells.

    The columns are found by name: width, lr and loss are needed; arm, weight_decay, seed and status are optional.
    `transfer_columns.ALIASES` lists the other names that a column may have. Names with a path in front, like
    config.optimizer.lr, are found too. Further columns are ignored, unless runs with equal settings differ in them.

    Learning rates that differ by less than a millionth are the same, and so are weight decays: programs and trackers round
    them differently.

    A run has diverged if its status is "diverged" or "div", or if its loss is empty, nan, inf or one of these words. A run
    that diverged is kept, with loss inf. A run that did not end (running, crashed, killed) is left out, and so is a line that
    repeats another one. `Outcomes.notes` says so.

    Args:
        path: path of the file, or a folder with event files of TensorBoard.
        loss: name of the column with the losses. By default the first name of `ALIASES` that the file has.
        columns: kind -> name of the column, where the names are others; see `transfer_columns.places`.
        over: name of a column. Of the runs that differ in it alone, only the one with the lowest loss counts.

    Raises:
        ValueError: the file cannot be read or lacks a column, a cell holds neither a number nor a known status, the same run is
            there twice, or runs with equal settings differ in how they were made. The message names file, line and column.
    """
    if path.is_dir():
        from .trackers import table as events  # It imports torch, which a CSV file does not need.

        table = events(path)
    else:
        table = cells(path)
    found = places(table, {**(columns or {}), **({} if loss is None else {"loss": loss})})
    lines, notes = ended(table, found)
    rows = _with_equal_values([_Line(path, n, row, found, table.decimal_comma).outcome() for n, row in lines])
    settings = [(row.arm, row.width, row.lr, row.weight_decay, row.seed) for row in rows]
    if over is not None:
        name = over.strip().lower()
        if name not in table.names:
            known = ", ".join(repr(column.strip()) for column in table.header)
            raise ValueError(f"{path}: --over: no column {over!r}; there are {known}. Name one of them.")
        kinds = len({row[table.names.index(name)] for _, row in lines})
        kept = lowest_over(lines, settings, [row.loss for row in rows])
        lines, rows, settings = [x for _, x in kept], [rows[i] for i, _ in kept], [settings[i] for i, _ in kept]
        notes.append(f"each loss is the lowest over {kinds} values of {over}, so it is a little too low.")
    check_conditions(table, lines, settings, found)
    notes += proxies(table, lines, [row.arm for row in rows], found)
    seen = dict[tuple[object, ...], int]()
    for setting, (number, _), row in zip(settings, lines, rows, strict=True):
        if row.seed is not None and seen.setdefault(setting, number) != number:
            raise ValueError(
                f"{path}, lines {seen[setting]} and {number}: the same arm, width, lr, weight decay and seed twice. Delete one "
                "of the lines; or if the runs differ in something else, give them different arms."
            )
    finite = [row for (_, row), outcome in zip(lines, rows, strict=True) if math.isfinite(outcome.loss)]
    caption = conditions([dict(zip(table.names, row, strict=True)) for row in finite])
    return Outcomes(
        path.name, found["loss"].name, tuple(rows), caption, found["width"].name, tuple(notes), found["lr"].name
    )


def _with_equal_values(rows: Sequence[Outcome]) -> list[Outcome]:
    """Return the runs. Learning rates and weight decays that differ by rounding alone are made equal."""
    lr = _smallest_like(row.lr for row in rows)
    decay = _smallest_like(row.weight_decay for row in rows if row.weight_decay)
    return [replace(x, lr=lr[x.lr], weight_decay=x.weight_decay and decay[x.weight_decay]) for x in rows]


def _smallest_like(values: Iterable[float]) -> dict[float, float]:
    """Return for each positive value the smallest one that is the same up to rounding."""
    found: dict[float, float] = {}
    first = 0.0
    for value in sorted({*values}):
        first = first if value <= first * (1 + SAME) else value
        found[value] = first
    return found


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


@dataclass(frozen=True)
class _Line:
    """The cells of one line, and where the values are."""

    path: Path
    number: int
    row: Sequence[str]
    places: Mapping[str, Place]
    decimal_comma: bool

    def outcome(self) -> Outcome:
        width = self._number("width", minimum=1)
        if width != int(width):
            raise self._error("width", "is not a whole number", "Give the model's width, 256 for instance")
        if not self._text("arm"):
            raise self._error("arm", "names no arm", "Give every run an arm")
        lr = self._number("lr")
        if lr == 0:
            raise self._error("lr", "has no logarithm", "Leave out runs with a learning rate of 0")
        weight_decay = self._number("weight_decay") if "weight_decay" in self.places else None
        return Outcome(self._text("arm"), int(width), lr, weight_decay, self._text("seed") or None, self._loss())

    def _text(self, kind: str) -> str:
        return self.places[kind].of(self.row) if kind in self.places else ""

    def _loss(self) -> float:
        status = self._text("status").lower()
        if status not in (*DIVERGED, *FINISHED):
            remedy = f"Write {', '.join(DIVERGED + FINISHED[1:])} or leave the cell empty; and leave out runs that did not end"
            raise self._error("status", "says neither that the run ended nor that it diverged", remedy)
        text = self._text("loss").lower()
        if status in DIVERGED or text in ("", *DIVERGED):
            return math.inf
        try:
            loss = self._float(text)
        except ValueError:
            remedy = "Give a loss; or nan or an empty cell if the run diverged"
            raise self._error("loss", "is no number", remedy) from None
        return loss if math.isfinite(loss) else math.inf

    def _float(self, text: str) -> float:
        return float(text.replace(",", ".") if self.decimal_comma else text)

    def _number(self, kind: str, minimum: float = 0.0) -> float:
        try:
            value = self._float(self._text(kind))
        except ValueError:
            value = math.nan
        if not (math.isfinite(value) and value >= minimum):
            raise self._error(kind, "is not a number that this column can hold", "Correct the cell, or delete the line")
        return value

    def _error(self, kind: str, problem: str, remedy: str) -> ValueError:
        name, text = self.places[kind].name, self._text(kind)
        return ValueError(f"{self.path}, line {self.number}, column {name!r}: {text!r} {problem}. {remedy}.")
