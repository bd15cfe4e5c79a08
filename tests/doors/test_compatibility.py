"""The table of versions: rows are replaced by what was run, and others stay."""

import re

import pytest

from tests.compatibility import PAGE, QUICK, ROOT, TABLE, counts, merged


def test_a_row_is_replaced_and_the_others_stay():
    page = PAGE.read_text()
    once = merged(page, {("3.10.0", "2.6.0", "3.2.0"): {"passed": 5, "failed": 0, "error": 0}})
    twice = merged(once, {("3.10.0", "2.6.0", "3.2.0"): {"passed": 4, "failed": 1, "error": 2}})
    assert "| 3.10.0 | 2.6.0 | 3.2.0 | 5 | 0 | 0 |\n" in once
    assert "| 3.10.0 | 2.6.0 | 3.2.0 | 4 | 1 | 2 |\n" in twice
    assert [line for line in twice.splitlines() if "3.10.0 |" not in line] == page.splitlines()


def test_the_last_line_of_pytest_is_read():
    assert counts("....\n12 passed, 3 deselected in 4.5s") == {"passed": 12, "failed": 0, "error": 0}
    assert counts("F\n1 failed, 11 passed, 2 errors in 4.5s") == {"passed": 11, "failed": 1, "error": 2}
    with pytest.raises(ValueError, match="ran no test"):
        counts("3 deselected in 0.1s")


def test_the_package_names_the_versions_of_python_that_were_run():
    named = re.findall(r'"Programming Language :: Python :: (3\.\d+)"', (ROOT / "pyproject.toml").read_text())
    run = {".".join(row.strip("| ").split(".")[:2]) for row in TABLE.findall(PAGE.read_text())[0].splitlines()[2:]}
    assert set(named) == run


def test_the_quick_tests_exist():
    assert [path for path in QUICK if not (ROOT / path).is_file()] == []
    assert re.search(r"<!-- run:begin -->\n.*<!-- run:end -->", PAGE.read_text(), re.DOTALL)
