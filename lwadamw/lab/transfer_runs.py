"""Runs that a table holds twice, that did not end, or that differ in more than what is analysed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Final

from .transfer_columns import ALIASES, CONDITION, Place, Table

# States of trackers and schedulers for runs whose last loss is no result.
UNFINISHED: Final = (
    *("running", "crashed", "failed", "killed", "preempted", "preempting", "pending", "queued", "stopped"),
    *("cancelled", "canceled", "interrupted", "timeout"),
)
_PROXY: Final = re.compile(r"(^|[./])base_width$")
Line = tuple[int, tuple[str, ...]]


def ended(table: Table, places: Mapping[str, Place]) -> tuple[list[Line], list[str]]:
    """Return the lines of runs that ended, each once, and notes about what was left out.

    Args:
        table: the table.
        places: where its values are.

    Raises:
        ValueError: no run ended.
    """
    status = places.get("status")
    states = Counter(state for _, cells in table.lines if (state := _state(status, cells)) in UNFINISHED)
    lines = [(number, cells) for number, cells in table.lines if _state(status, cells) not in UNFINISHED]
    if not lines:
        listed = ", ".join(f"{count} {state}" for state, count in states.items())
        raise ValueError(f"{table.path}: no run ended: {listed}. Give a table with finished runs.")
    once = list({cells: (number, cells) for number, cells in reversed(lines)}.values())[::-1]
    notes = []
    if states:
        listed = ", ".join(f"{count} {state}" for state, count in states.items())
        notes.append(
            f"left out: {_runs(states.total())} that did not end ({listed}). If the loss of one of them grew without bound, "
            "write diverged as its state."
        )
    if len(once) < len(lines):
        notes.append(f"left out: {_lines(len(lines) - len(once))} that repeat another line in every cell.")
    return once, notes


def lowest_over(
    lines: Sequence[Line], settings: Sequence[tuple[object, ...]], losses: Sequence[float]
) -> list[tuple[int, Line]]:
    """Return, for every setting, the line with the lowest loss and its position.

    Args:
        lines: lines of the table.
        settings: the setting of every line.
        losses: the loss of every line.
    """
    best: dict[tuple[object, ...], int] = {}
    for i, (setting, loss) in enumerate(zip(settings, losses, strict=True)):
        if setting not in best or loss < losses[best[setting]]:
            best[setting] = i
    return [(i, lines[i]) for i in sorted(best.values())]


def check_conditions(
    table: Table, lines: Sequence[Line], settings: Sequence[tuple[object, ...]], places: Mapping[str, Place]
) -> None:
    """Refuse runs that have equal settings and differ in a column that says how they were made.

    The mean over such runs would be the mean of different experiments.

    Args:
        table: the table.
        lines: its lines.
        settings: arm, width, lr, weight decay and seed of every line.
        places: where these values are.

    Raises:
        ValueError: two runs with equal settings differ in a column that `CONDITION` matches.
    """
    used = {i for place in places.values() for i in place.columns}
    others = [
        i
        for i, name in enumerate(table.names)
        if i not in used and CONDITION.search(name) and "loss" not in name and name not in ALIASES["loss"]
    ]
    first: dict[tuple[object, ...], Line] = {}
    differ: dict[int, tuple[int, int]] = {}
    for setting, (number, cells) in zip(settings, lines, strict=True):
        before, known = first.setdefault(setting, (number, cells))
        for i in others:
            if cells[i] != known[i]:
                differ.setdefault(i, (before, number))
    if not differ:
        return
    names = [table.header[i].strip() for i in differ]
    arm = places["arm"]
    wanted = ",".join([*(table.header[i].strip() for i in arm.columns), *names])
    one, two = next(iter(differ.values()))
    raise ValueError(
        f"{table.path}, lines {one} and {two}: runs with the same arm, width, lr and weight decay differ in "
        f"{', '.join(map(repr, names))}. Make them different arms: --column arm={wanted}. Or take the best run over a column: "
        f"--over {names[0]}."
    )


def proxies(table: Table, lines: Sequence[Line], arms: Sequence[str], places: Mapping[str, Place]) -> list[str]:
    """Say which arms have runs with base values of several proxies, if the table has the width of the proxy. One note at most.

    Args:
        table: the table.
        lines: its lines.
        arms: the arm of every line.
        places: where the values are.
    """
    arm = places["arm"].columns
    column = next((i for i, name in enumerate(table.names) if _PROXY.search(name) and i not in arm), None)
    if column is None:
        return []
    found: dict[str, set[str]] = {}
    for name, (_, cells) in zip(arms, lines, strict=True):
        found.setdefault(name, set()).add(cells[column].strip())
    several = [name for name, values in found.items() if len(values) > 1]
    if not several:
        return []
    called = table.header[column].strip()
    wanted = ",".join([*(table.header[i].strip() for i in arm), called])
    return [
        f"the runs of {', '.join(several)} have several values of {called}. Base values of one proxy are not those of another, "
        f"unless nothing scales with the width. To keep the runs apart: --column arm={wanted}."
    ]


def _state(status: Place | None, cells: Sequence[str]) -> str:
    return "" if status is None else status.of(cells).lower()


def _runs(count: int) -> str:
    return f"{count} run{'s' * (count != 1)}"


def _lines(count: int) -> str:
    return f"{count} line{'s' * (count != 1)}"
