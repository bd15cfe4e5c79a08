"""The text file of an architecture: its modules and parameters at two widths, with the role of each parameter.

A file has four sections. `header` has the source, the widths and the configs. `classes` has the module path in which each class
is defined. `modules` has the path of each module that holds parameters, its class, the classes that it derives from, and
attributes. `parameters` has the name, the shapes, the role, the fan_ins and the width ratio of each parameter. A value that
differs between the widths is written as `256|512`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

TABLES: Final = Path(__file__).parent / "tables"
ROOT: Final = "(model)"


@dataclass(frozen=True)
class ModuleRow:
    """One module: `bases` are its own class and those it derives from, down to the first class of torch."""

    path: str
    bases: tuple[str, ...]
    attributes: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ParameterRow:
    """One name of a parameter.

    Attributes:
        name: full name.
        shapes: shape at each of the two widths.
        role: "matrix", "vector", "output", or "undecided".
        fan_in: fan_in at each width; None for a vector and where the role is undecided.
        tied: the first name of the same parameter; None if this is the first one.
        exempt: whether it has the attribute `_no_weight_decay`.
        frozen: whether it requires no gradient.
    """

    name: str
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    role: str
    fan_in: tuple[int, int] | None
    tied: str | None = None
    exempt: bool = False
    frozen: bool = False

    @property
    def m(self) -> float | None:
        """The width ratio of the second width to the first."""
        return None if self.fan_in is None else self.fan_in[1] / self.fan_in[0]


@dataclass(frozen=True)
class Table:
    """One architecture. `configs` has the fields of each config by its label, `classes` the module path of each class name."""

    source: str
    widths: tuple[int, int]
    configs: dict[str, dict[str, str]]
    classes: dict[str, str]
    modules: list[ModuleRow]
    parameters: list[ParameterRow]


def read(name: str) -> Table:
    """Return the recorded table of an architecture."""
    return parse((TABLES / f"{name}.txt").read_text())


def names() -> list[str]:
    """Return the names of all architectures that have a table."""
    return sorted(path.stem for path in TABLES.glob("*.txt"))


def at(value: str, which: int) -> str:
    """Return the value at one of the two widths from text such as `256|512`."""
    parts = value.split("|")
    return parts[which] if len(parts) == 2 else value


def stretched(table: Table, width: int) -> Table:
    """Return a table whose second width is another one. Every size either follows the width or stays.

    Args:
        table: the recorded table.
        width: the other width.
    """
    low, high = table.widths

    def size(first: int, second: int) -> int:
        return round(first + (second - first) * (width - low) / (high - low))

    def fields(values: dict[str, str]) -> dict[str, str]:
        split = {name: text.split("|") for name, text in values.items()}
        return {
            name: f"{parts[0]}|{size(*map(int, parts))}" if len(parts) == 2 else parts[0]
            for name, parts in split.items()
        }

    def parameter(p: ParameterRow) -> ParameterRow:
        shapes = p.shapes[0], tuple(size(*pair) for pair in zip(*p.shapes, strict=True))
        return replace(p, shapes=shapes, fan_in=p.fan_in and (p.fan_in[0], size(*p.fan_in)))

    return replace(
        table,
        widths=(low, width),
        configs={label: fields(config) for label, config in table.configs.items()},
        modules=[replace(row, attributes=fields(row.attributes)) for row in table.modules],
        parameters=[parameter(p) for p in table.parameters],
    )


def parse(text: str) -> Table:
    """Return the table that a file holds."""
    sections: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        if line.startswith("["):
            rows = sections.setdefault(line.strip("[]"), [])
        elif line.strip():
            rows.append([cell.strip() for cell in line.split("  ") if cell.strip()])
    header, configs = {}, {}
    for cells in sections["header"]:
        if cells[0].startswith("config "):
            configs[cells[0].removeprefix("config ")] = _pairs(cells[1:])
        else:
            header[cells[0]] = cells[1]
    first, second = header["widths"].split("|")
    modules = [ModuleRow(path, tuple(bases.split(" < ")), _pairs(rest)) for path, bases, *rest in sections["modules"]]
    classes = {name: path for name, path in sections.get("classes", [])}
    parameters = [_parameter(cells) for cells in sections["parameters"]]
    return Table(header["source"], (int(first), int(second)), configs, classes, modules, parameters)


def render(table: Table) -> str:
    """Return the file of a table."""
    header = [["source", table.source], ["widths", "|".join(map(str, table.widths))]]
    header += [[f"config {label}", *_cells(fields)] for label, fields in table.configs.items()]
    modules = [[row.path, " < ".join(row.bases), *_cells(row.attributes)] for row in table.modules]
    parameters = [_cells_of(row) for row in table.parameters]
    classes = [list(item) for item in table.classes.items()]
    sections = {"header": header, "classes": classes, "modules": modules, "parameters": parameters}
    return "\n".join(f"[{title}]\n{_aligned(rows)}" for title, rows in sections.items() if rows)


def _parameter(cells: list[str]) -> ParameterRow:
    name, first, second, role, low, high, _, *flags = cells
    tied = next((flag.removeprefix("tied with ") for flag in flags if flag.startswith("tied with ")), None)
    fan_in = None if low == "-" else (int(low), int(high))
    shapes = _shape(first), _shape(second)
    return ParameterRow(name, shapes, role, fan_in, tied, "_no_weight_decay" in flags, "frozen" in flags)


def _cells_of(row: ParameterRow) -> list[str]:
    shapes = ["x".join(map(str, shape)) or "scalar" for shape in row.shapes]
    width = ["-"] * 3 if row.fan_in is None else [str(row.fan_in[0]), str(row.fan_in[1]), f"{row.m:g}"]
    flags = {f"tied with {row.tied}": row.tied, "_no_weight_decay": row.exempt, "frozen": row.frozen}
    return [row.name, *shapes, row.role, *width, *(flag for flag, is_set in flags.items() if is_set)]


def _shape(text: str) -> tuple[int, ...]:
    return () if text == "scalar" else tuple(map(int, text.split("x")))


def _pairs(cells: list[str]) -> dict[str, str]:
    return dict(cell.split("=", 1) for cell in cells)


def _cells(fields: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in fields.items()]


def _aligned(rows: list[list[str]]) -> str:
    columns = max(map(len, rows))
    widths = [max((len(row[i]) for row in rows if len(row) > i), default=0) for i in range(columns)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows)
    return "".join(f"{line}\n" for line in lines)
