"""The package keeps to the rooms of docs/design.md: no import upwards, in a circle, or of another room's private names."""

import ast
import functools
import re
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "lwadamw"
DESIGN = (ROOT / "docs" / "design.md").read_text()

Sources = Mapping[str, str]  # module, dotted and without the leading "lwadamw." -> source


def _table(marker: str) -> list[list[str]]:
    """The cells of the rows of a Markdown table between two comments of docs/design.md."""
    body = re.search(rf"<!-- {marker}:begin -->\n(.*?)\n<!-- {marker}:end -->", DESIGN, re.DOTALL).group(1)
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body.splitlines()[2:]]


def _may_import() -> dict[str, set[str]]:
    """Room -> the rooms it may import, as docs/design.md says."""
    rows = {room.strip("`"): may for room, _, may in _table("rooms")}
    return {room: set(rows) if may == "all" else {room, *re.findall(r"`(\w+)`", may)} for room, may in rows.items()}


def _sources() -> dict[str, str]:
    files = [*PACKAGE.glob("*.py"), *PACKAGE.glob("*/*.py"), *PACKAGE.glob("*/*/*.py")]
    names = {f: f.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", ".") for f in files}
    # __main__ only starts the command line, which stands above the other doors.
    return {name.removesuffix(".__init__"): f.read_text() for f, name in names.items() if name != "__main__"}


@functools.cache
def _parsed(source: str) -> ast.Module:
    return ast.parse(source)


@functools.cache
def _nodes(source: str) -> tuple[ast.AST, ...]:
    """The imports, attributes and conditions of a source."""
    return tuple(
        node
        for node in ast.walk(_parsed(source))
        if isinstance(node, (ast.Import, ast.ImportFrom, ast.Attribute, ast.If))
    )


def _room(module: str, rooms: Mapping[str, object]) -> str:
    first = module.partition(".")[0]
    return first if first in rooms else "doors"


def _is_package(module: str, sources: Sources) -> bool:
    return module == "__init__" or any(other.startswith(f"{module}.") for other in sources)


def _imports(module: str, sources: Sources) -> Iterator[tuple[str, str, bool]]:
    """(module of this package, name taken from it or "", whether for type checking only) of every import."""
    nodes = _nodes(sources[module])
    for_types = {
        id(inner)
        for node in nodes
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    path = module.split(".") if module != "__init__" else []
    package = path if _is_package(module, sources) else path[:-1]
    for node in nodes:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("lwadamw."):
                    yield alias.name.removeprefix("lwadamw."), "", id(node) in for_types
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                base = package[: len(package) - node.level + 1]
            elif (node.module or "").partition(".")[0] == "lwadamw":
                base = []
            else:
                continue
            named = (node.module or "") if node.level else node.module.removeprefix("lwadamw").removeprefix(".")
            source = ".".join([*base, *filter(None, [named])])
            for alias in node.names:
                inner = ".".join(filter(None, [source, alias.name]))
                if inner in sources:
                    yield inner, "", id(node) in for_types
                else:
                    yield source or "__init__", alias.name, id(node) in for_types


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


@functools.cache
def _private_names(source: str) -> set[str]:
    """The private functions, classes, variables, methods and attributes that a module defines."""
    found = set()
    for node in ast.walk(_parsed(source)):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
    return {name for name in found if _is_private(name)}


def violations(sources: Sources, may_import: Mapping[str, set[str]]) -> list[str]:
    """What breaks the rules of the rooms, a sentence each."""
    found = []
    graph: dict[str, set[str]] = {}
    private: dict[str, set[str]] = {}  # room -> the private names its modules define
    for module, source in sources.items():
        private.setdefault(_room(module, may_import), set()).update(_private_names(source))
    for module, source in sources.items():
        room = _room(module, may_import)
        for target, name, for_types in _imports(module, sources):
            other = _room(target, may_import)
            if other not in may_import[room] and target != "version":
                found.append(f"{module} imports {target}: {room} may not import {other}")
            if other != room and _is_private(name):
                found.append(f"{module} imports the private name {name} of {target}")
            if not for_types and target != "__init__":
                graph.setdefault(module, set()).add(target)
        elsewhere = set().union(*(names for other, names in private.items() if other != room)) - private[room]
        watched = elsewhere | {"__dict__"}
        for node in _nodes(source):
            if not isinstance(node, ast.Attribute) or node.attr not in watched:
                continue
            if ast.unparse(node.value) not in ("self", "cls"):
                if node.attr in elsewhere:
                    found.append(f"{module} uses the private name {node.attr} of another room: {ast.unparse(node)}")
                if node.attr == "__dict__":
                    found.append(f"{module} reaches into {ast.unparse(node)}")
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"imports in a circle: {' -> '.join(error.args[1])}")
    return found


def test_every_module_keeps_to_its_room():
    assert violations(_sources(), _may_import()) == []


@pytest.mark.parametrize(
    ("module", "planted", "complaint"),
    [
        ("state.decay", "from ..step.norms import Norms", "state may not import step"),
        ("tables.plan", "def f():\n    from lwadamw.width.rules import RULES", "tables may not import width"),
        ("kernels.adamw", "import lwadamw.state.storage", "kernels may not import state"),
        ("lab.data", "from lwadamw.commands import main", "lab may not import commands"),
        ("state.storage", "from .packing import read_weight", "imports in a circle"),
        ("monitor.drift", "from ..step.optimizer import _disable_dynamo", "private name _disable_dynamo"),
        ("monitor.drift", "def f(optimizer):\n    return optimizer._engine", "private name _engine of another room"),
        (
            "monitor.drift",
            "def f(optimizer):\n    return optimizer.__dict__['state']",
            "reaches into optimizer.__dict__",
        ),
    ],
)
def test_a_planted_violation_is_found(module, planted, complaint):
    sources = _sources()
    sources[module] += f"\n{planted}\n"
    assert any(complaint in found for found in violations(sources, _may_import()))


def test_the_house_is_small_enough_to_remember():
    rooms = set(_may_import()) - {"doors", "commands", "lab"}
    assert len(rooms) + 1 <= 8  # the doors count as one room
    assert rooms | {"commands", "lab"} == {f.parent.name for f in PACKAGE.glob("*/__init__.py")}
    assert len(list(PACKAGE.glob("*.py"))) <= 8


def test_every_promise_names_tests_that_exist():
    promises = _table("promises")
    assert [int(number) for number, *_ in promises] == list(range(1, len(promises) + 1))
    for number, _, tests in promises:
        paths = re.findall(r"`([\w/]+\.py)`", tests)
        assert paths, number
        assert [path for path in paths if not (ROOT / path).is_file()] == []


def test_contributing_maps_every_room():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    for room, sentence, _ in _table("rooms"):
        assert f"| {room} | {sentence} |" in text
