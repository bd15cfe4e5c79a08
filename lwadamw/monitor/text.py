"""Tables as plain text, and how wide they may be."""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from typing import Final

NO_TERMINAL: Final = 120  # the width of a table, in characters, if nobody says how wide the terminal is
LEAST_NAME: Final = 16  # names are not made shorter than this


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """Return the rows of a table as lines of text. In all lines a column has the same width.

    Args:
        rows: the cells of each row. All rows have the same number of cells.
        right: indices of the columns that are aligned on the right. The others are aligned on the left.

    Examples:
        >>> aligned([["a", "1"], ["bc", "23"]], right=[1])
        ['a    1', 'bc  23']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def terminal_width() -> int:
    """Return how many characters a line may have: COLUMNS if it is set, or the terminal's width, or NO_TERMINAL."""
    return shutil.get_terminal_size((NO_TERMINAL, 24)).columns


def shortened(name: str, most: int) -> str:
    """Return a name of at most `most` characters, with dots in place of what is left out. The end of the name stays.

    Args:
        name: the name.
        most: the largest number of characters, at least 5.

    Examples:
        >>> shortened("model.layers.*.self_attn.q_proj.weight x12", 24)
        'mode...q_proj.weight x12'
        >>> shortened("head.weight", 24)
        'head.weight'
    """
    if len(name) <= most:
        return name
    first = max((most - 3) // 5, 1)
    return f"{name[:first]}...{name[len(name) - (most - 3 - first) :]}"


def with_short_names(rows: Sequence[Sequence[str]], width: int) -> list[str]:
    """Return the rows of a table as lines. The names in the first column are shortened as far as the width asks for it.

    Args:
        rows: the cells of each row.
        width: the largest length of a line. Lines stay longer if names of LEAST_NAME characters are too long for it.
    """
    longest = max(len(row[0]) for row in rows)
    excess = max(map(len, aligned(rows))) - width
    most = max(longest - max(excess, 0), min(longest, LEAST_NAME))
    return aligned([[shortened(row[0], most), *row[1:]] for row in rows])
