"""Columns: which column of a table of runs holds what, in the export of a tracker or in a table of any program."""

from __future__ import annotations

import csv
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

# A column may have any of these names; capitals, spaces and hyphens do not matter. Of several, the first one counts. Trackers
# put a path in front of a name, like config.optimizer.lr; see `_match`.
ALIASES: Final[Mapping[str, tuple[str, ...]]] = {
    "arm": ("arm", "rule"),
    "width": ("width", "d_model", "n_embd", "hidden_size", "model_dim", "dim_model", "embed_dim"),
    "lr": ("base_lr", "lr", "learning_rate", "peak_lr", "max_lr"),
    "weight_decay": ("base_weight_decay", "weight_decay", "wd"),
    "seed": ("seed", "random_seed"),
    "loss": (
        *("validation_loss", "val_loss", "valid_loss", "eval_loss"),
        *("validation/loss", "val/loss", "valid/loss", "eval/loss", "loss/validation", "loss/val", "loss/eval", "loss"),
    ),
    "status": ("status", "state"),
}
NEEDED: Final = ("width", "lr", "loss")
ONE_ARM: Final = "all runs"  # the arm of a table without arms
DELIMITERS: Final = (",", ";", "\t")
_LOGS: Final = {"wall_time", "step", "value"}  # the columns of a curve that TensorBoard exports
_LOSS_PATHS: Final = ("summary", "metrics", "metric", "results")
# Two runs that differ in such a column are not two seeds of one setting.
CONDITION: Final = re.compile(
    r"tokens|batch|layer|depth|heads|expert|top_?k|context|seq|param|ffn|data|schedul|warmup|beta|optimizer"
)


@dataclass(frozen=True)
class Table:
    """The cells of a file.

    Args:
        path: path of the file.
        header: names of the columns, as the file has them.
        lines: number of every line, and its cells.
        decimal_comma: whether a number may be written with a comma, because another character separates the cells.
    """

    path: Path
    header: tuple[str, ...]
    lines: tuple[tuple[int, tuple[str, ...]], ...]
    decimal_comma: bool

    @property
    def names(self) -> list[str]:
        """The names of the columns in small letters, with `_` for spaces and hyphens."""
        return [re.sub(r"[\s-]+", "_", name.strip().lower()) for name in self.header]


@dataclass(frozen=True)
class Place:
    """Where the values of one kind are.

    Args:
        name: name of the column, for messages.
        columns: positions of the columns. An arm may be several columns together.
        constant: the value of all runs, if no column holds it.
        labels: names of the columns, if the value is to carry them.
    """

    name: str
    columns: tuple[int, ...]
    constant: str = ""
    labels: tuple[str, ...] = ()

    def of(self, cells: Sequence[str]) -> str:
        """Return the text of a line's value."""
        values = [cells[i].strip() for i in self.columns]
        if self.labels:
            return ", ".join(f"{label} {value}" for label, value in zip(self.labels, values, strict=True))
        return values[0] if values else self.constant


def cells(path: Path) -> Table:
    """Read the cells of a file with a header. Commas, semicolons or tabs separate them.

    Args:
        path: path of the file.

    Raises:
        ValueError: the file cannot be read, holds no runs, or a line has another number of cells than the header.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = next((line for line in text.splitlines() if line.strip()), "")
        delimiter = max(DELIMITERS, key=first.count)
        reader = csv.reader(text.splitlines(keepends=True), delimiter=delimiter)
        (_, header), *lines = [(reader.line_num, row) for row in reader if any(map(str.strip, row))] or [(0, [])]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"cannot read {str(path)!r}: {error}. Give a CSV file with a header.") from error
    if not lines:
        raise ValueError(f"{path}: no runs. Give a CSV file with a header and one run per line.")
    for number, row in lines:
        if len(row) != len(header):
            raise ValueError(
                f"{path}, line {number}: {len(row)} cells, the header has {len(header)}. Correct the line."
            )
    return Table(path, tuple(header), tuple((number, tuple(row)) for number, row in lines), delimiter != ",")


def places(table: Table, given: Mapping[str, str]) -> dict[str, Place]:
    """Find the columns of a table. A table without arms has one arm.

    Args:
        table: the table.
        given: kind -> name of the column that the user has named. For the arm, several names, with commas between them. For
            the width, a whole number instead of a name is the width of all runs.

    Raises:
        ValueError: a column is missing, two columns could be meant, or the table is a curve of one run.
    """
    names = table.names
    found = {kind: _named(table, kind, text) for kind, text in given.items()}
    for kind, aliases in ALIASES.items():
        if kind in found:
            continue
        index = _match(table, kind, aliases)
        if index is not None:
            found[kind] = Place(table.header[index].strip(), (index,))
        elif kind in NEEDED:
            raise ValueError(_missing(table, kind, aliases, set(names)))
    found.setdefault("arm", Place("arm", (), ONE_ARM))
    return found


def _match(table: Table, kind: str, aliases: Sequence[str]) -> int | None:
    """Return the position of the column for a kind: one with such a name, else one whose path ends in such a name."""
    names = table.names
    for alias in aliases:
        if alias in names:
            return _position(table, alias)
    for alias in aliases:
        ends = [i for i, name in enumerate(names) if name.endswith((f".{alias}", f"/{alias}"))]
        if kind == "loss":  # train/loss is another loss than the one that is asked for
            ends = [i for i in ends if names[i][: -len(alias) - 1] in _LOSS_PATHS]
        if len(ends) > 1:
            some = " and ".join(repr(table.header[i].strip()) for i in ends)
            remedy = f"--column {kind}={table.header[ends[0]].strip()}"
            raise ValueError(f"{table.path}: columns {some} could both be the {kind}. Name one, like {remedy}.")
        if ends:
            return ends[0]
    return None


def _position(table: Table, name: str) -> int:
    """Return the position of the column with a name. Several columns with this name have to hold the same."""
    first, *others = (i for i, known in enumerate(table.names) if known == name)
    for other in others:
        if any(cells[first].strip() != cells[other].strip() for _, cells in table.lines):
            raise ValueError(
                f"{table.path}: columns {first + 1} and {other + 1}, {table.header[first].strip()!r} and "
                f"{table.header[other].strip()!r}, have the same name and hold different values. Rename one of them."
            )
    return first


def _named(table: Table, kind: str, text: str) -> Place:
    names = table.names
    if kind == "width" and text.strip().isdigit() and text.strip() not in names:
        return Place("width", (), text.strip())
    wanted = [part.strip() for part in (text.split(",") if kind == "arm" else [text])]
    plain = [re.sub(r"[\s-]+", "_", part.lower()) for part in wanted]
    for part, name in zip(wanted, plain, strict=True):
        if name not in names:
            close = difflib.get_close_matches(name, names, n=1)
            hint = f"Closest: {close[0]!r}" if close else "Name one of them"
            raise ValueError(
                f"{table.path}: no column {part!r}, which is to hold the {kind}; there are "
                f"{', '.join(repr(name.strip()) for name in table.header)}. {hint}."
            )
    columns = tuple(_position(table, name) for name in plain)
    texts = [table.header[i].strip() for i in columns]
    numeric = all(_is_number(cells[columns[0]]) for _, cells in table.lines)
    labelled = kind == "arm" and (len(columns) > 1 or (numeric and plain[0] not in ALIASES["arm"]))
    return Place(", ".join(texts), columns, labels=tuple(texts) if labelled else ())


def _missing(table: Table, kind: str, aliases: Sequence[str], names: set[str]) -> str:
    if names >= _LOGS:
        return (
            f"{table.path} is the curve of one run: it has the columns 'Wall time', 'Step' and 'Value'. Give a table with one "
            "run per line: the hyperparameters and the last loss of every run."
        )
    remedy = "--loss NAME" if kind == "loss" else f"--column {kind}=NAME"
    alone = ". If all runs have the same width, give it: --column width=256" if kind == "width" else ""
    return (
        f"{table.path}: no column {' or '.join(map(repr, aliases))}; there are "
        f"{', '.join(repr(name.strip().lower()) for name in table.header)}. Name the column that holds the {kind} with "
        f"{remedy}{alone}."
    )


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
