"""The documentation: its code runs, its reference has every public name, and its navigation every page."""

import re
import textwrap
from pathlib import Path

import pytest
import torch.distributed as dist

import lwadamw

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```$|^<!-- python\n(.*?)^-->$", re.MULTILINE | re.DOTALL)
# Pages whose code other tests run, because it needs a GPU or a training framework.
ELSEWHERE = {
    "docs/examples.md": "tests/engines/test_examples.py",
    "docs/frameworks.md": "tests/engines/test_examples.py",
    "docs/graphs.md": "tests/driver/test_graphs.py",
    "docs/megatron.md": "tests/engines/megatron",
}
PAGES = sorted(
    str(path.relative_to(ROOT)) for path in (*DOCS.rglob("*.md"), ROOT / "README.md") if BLOCK.search(path.read_text())
)


@pytest.mark.filterwarnings("ignore:load_state_dict. the checkpoint was written without a width rule")
@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs(page, tmp_path, monkeypatch, request):
    """From top to bottom in one namespace. What a reader has already, a comment makes that the page does not show."""
    if page in ELSEWHERE:
        assert (ROOT / ELSEWHERE[page]).exists()
        pytest.skip(f"its code runs in {ELSEWHERE[page]}")
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    request.addfinalizer(lambda: dist.destroy_process_group() if dist.is_initialized() else None)
    text = (ROOT / page).read_text()
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        code = "\n" * line + textwrap.dedent(match.group(1) or match.group(2))
        exec(compile(code, str(ROOT / page), "exec"), namespace)


def test_the_reference_has_every_public_name():
    pages = "".join(path.read_text() for path in (DOCS / "reference").glob("*.md"))
    for name in (*lwadamw.__all__, "schedules", "loggers"):
        assert f"::: lwadamw.{name}\n" in pages or f"## {name}\n" in pages, name


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/]+\.md", (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]))
    assert listed == {str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md")} - {"data/README.md"}


def test_examples_in_docstrings_have_the_title_that_the_reference_shows_as_code():
    sources = [*(ROOT / "lwadamw").rglob("*.py"), *(ROOT / "csrc_triton").rglob("*.py")]
    assert [str(path) for path in sources if re.search(r"^ *Example:$", path.read_text(), re.MULTILINE)] == []
    prose = re.compile(r"^ *Examples:\n(?! *(>>>|```))", re.MULTILINE)
    assert [str(path) for path in sources if prose.search(path.read_text())] == []
