"""The tables in the documentation are the tables that the code prints."""

import re
from pathlib import Path

from lwadamw.commands import main
from lwadamw.state.combinations import COMBINATIONS, table

DOCS = Path(__file__).parents[2] / "docs"


def test_the_storage_table_in_the_docs_is_the_one_of_the_code(capsys):
    written = re.search(r"<!-- table:begin -->\n(.*)\n<!-- table:end -->", (DOCS / "storage.md").read_text(), re.DOTALL)
    assert written.group(1) == table()
    assert main(["storage"]) == 0
    assert capsys.readouterr().out == table() + "\n"


def test_the_bytes_in_the_readme_are_the_bytes_of_the_code():
    text = (DOCS.parent / "README.md").read_text().partition("## Low precision")[2].partition("<!-- performance")[0]
    names = [
        "bf16",
        "bf16, stochastic",
        "bf16, remainder",
        "bf16, remainder, bf16 moments",
        "bf16, remainder, 8-bit moments",
    ]
    rows = [line.split(" | ")[1:3] for line in text.splitlines() if line.startswith("|")][2:]
    for (state, moved), name in zip(rows, names, strict=True):
        stored = COMBINATIONS[name].storage
        assert (float(state), float(moved)) == (stored.state_bytes(), stored.moved_bytes())


def test_the_page_on_company_explains_every_act_that_is_refused_or_not_seen():
    page = (DOCS / "company.md").read_text()
    table_of_acts, _, text = page.partition("<!-- table:end -->")
    rows = [line.strip("|").split(" | ") for line in table_of_acts.splitlines() if line.startswith("| ")][2:]
    assert {cell.strip() for row in rows for cell in row[1:]} == {"followed", "refused", "not seen"}
    for act, *cells in rows:
        if {cell.strip() for cell in cells} - {"followed"}:
            assert f"**{act.strip()}" in text, act
    assert re.findall(r"`(tests/company/\w+\.py)`", page)
    for path in re.findall(r"`(tests/company/\w+\.py)`", page):
        assert (DOCS.parent / path).exists(), path
