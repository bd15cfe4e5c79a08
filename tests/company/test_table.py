"""What others do between two steps is followed, refused or not seen, as docs/company.md says."""

import pytest

from tests.company.cell import cases, run
from tests.company.storages import COLUMNS
from tests.company.table import table, written


@pytest.mark.parametrize(("row", "backend", "column"), list(cases()))
def test_what_others_do(row, backend, column):
    run(row, backend, column)


def test_the_page_has_the_table_of_the_tests():
    assert written() == table(), "To write the table again: python -m tests.company.table"


def test_no_cell_is_empty():
    rows = [line.strip("|").split("|") for line in table().splitlines()]
    assert all(len(row) == 1 + 2 * len(COLUMNS) and all(cell.strip() for cell in row) for row in rows)
