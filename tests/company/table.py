"""Writes the table of docs/company.md from the rows of tests/company/rows.py: `python -m tests.company.table`."""

import re
from pathlib import Path

from tests.company.rows import ROWS
from tests.company.storages import BACKENDS, COLUMNS

PAGE = Path(__file__).parents[2] / "docs" / "company.md"
_TABLE = re.compile(r"(<!-- table:begin -->\n)(.*)(\n<!-- table:end -->)", re.DOTALL)
# Acts that only a GPU has, and what tests/company/test_streams.py asserts about them.
ON_A_GPU = {"step on another stream": "followed"}
_TITLES = {"torch": "torch", "triton": "kernels"}


def table():
    """Return the table in Markdown: a row for each act, a column for each backend and storage."""
    columns = [f"{_TITLES[backend]}, {column}" for backend in BACKENDS for column in COLUMNS]
    lines = [f"| what others do | {' | '.join(columns)} |", "| --- |" + " --- |" * len(columns)]
    for row in ROWS:
        cells = [row.outcome(backend, column) for backend in BACKENDS for column in COLUMNS]
        lines.append(f"| {row.name} | {' | '.join(cells)} |")
    return "\n".join([*lines, *(f"| {name} |" + f" {outcome} |" * len(columns) for name, outcome in ON_A_GPU.items())])


def written():
    """Return the table that stands in the page."""
    return _TABLE.search(PAGE.read_text()).group(2)


def main():
    """Write the table into the page."""
    PAGE.write_text(_TABLE.sub(lambda found: found[1] + table() + found[3], PAGE.read_text()))


if __name__ == "__main__":
    main()
