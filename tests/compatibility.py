"""Run the quick tests under several interpreters, and write what passed into docs/compatibility.md.

    python -m tests.compatibility .venv/bin/python other/bin/python

Each interpreter belongs to an environment with torch, triton, numpy, pytest, expecttest and hypothesis. The interpreter of
Triton before 3.7 needs numpy < 2.4. lwadamw itself does not have to be installed. The table has one row for each combination of
versions. Rows of other combinations stay.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "compatibility.md"
QUICK = (
    "tests/step/test_torch_parity.py",
    "tests/step/test_norms.py",
    "tests/step/test_clipping.py",
    "tests/step/test_torch_behaviours.py",
    "tests/state/test_checkpoint.py",
    "tests/state/test_fixtures.py",
    "tests/width/test_roles.py",
)
VERSIONS = """
import json, platform, torch
try:
    import triton
    version = triton.__version__
except ImportError:
    version = "none"
print(json.dumps([platform.python_version(), torch.__version__.partition("+")[0], version]))
"""
HEAD = "| Python | torch | triton | passed | failed | errors |\n| --- | --- | --- | ---: | ---: | ---: |"
TABLE = re.compile(r"(?<=<!-- run:begin -->\n).*?(?=\n<!-- run:end -->)", re.DOTALL)


def run(python: str) -> tuple[tuple[str, ...], dict[str, int]]:
    """Return the versions of an interpreter's environment, and how many of the quick tests passed, failed and had errors."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    found = subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True, env=environment)
    done = subprocess.run(
        [
            python,
            "-m",
            "pytest",
            *QUICK,
            "-p",
            "no:cacheprovider",
            "-o",
            "addopts=",
            "-m",
            "not gpu and not slow and not matrix",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    print(done.stdout[-3000:])
    return tuple(json.loads(found.stdout)), counts(done.stdout)


def counts(output: str) -> dict[str, int]:
    """Read the last line of pytest.

    Raises:
        ValueError: pytest ran no test.
    """
    last = (output.strip().splitlines() or [""])[-1]
    found = {word.rstrip("s"): int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?)", last)}
    if not found:
        raise ValueError(f"pytest ran no test. Its last line is {last!r}.")
    return {word: found.get(word, 0) for word in ("passed", "failed", "error")}


def merged(page: str, rows: Mapping[tuple[str, ...], Mapping[str, int]]) -> str:
    """Return a page whose table has these rows, and the rows of all other combinations of versions that it had."""
    cells = {
        tuple(line.strip("| ").split(" | ")[:3]): line
        for line in TABLE.findall(page)[0].splitlines()[2:]
        if line.strip()
    }
    for versions, found in rows.items():
        cells[versions] = "| " + " | ".join([*versions, *map(str, found.values())]) + " |"
    return TABLE.sub(lambda _: "\n".join([HEAD, *(cells[key] for key in sorted(cells))]), page)


def main() -> None:
    """Read the command line, run, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("python", nargs="+", help="an interpreter")
    for python in parser.parse_args().python:
        versions, found = run(python)
        PAGE.write_text(merged(PAGE.read_text(), {versions: found}))


if __name__ == "__main__":
    main()
