"""Tables as plain text."""

from __future__ import annotations

from collections.abc import Collection, Sequence


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
