"""Runs a script in a process that is killed a few steps after its checkpoint, then in a new process that resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.engines.to_the_end import leave

STEPS, HALF = 20, 10
LAST = HALF + 3  # the step in which the process is killed
TOLERANCE = 5e-7


def run_twice(module: str, folder: Path) -> dict[str, Any]:
    """Return what a script has noted in a first process, which ends by SIGKILL, and in a second one.

    Args:
        module: the script. Its main block calls `main`.
        folder: an empty folder.
    """
    for part, code in (("first", -signal.SIGKILL), ("second", 0)):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-m", module, part, str(folder)],
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1"},
        )
        assert done.returncode == code, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((folder / "noted.json").read_text())


Part = Callable[[Path, dict[str, Any]], None]


def main(first: Part, doomed: Callable[[Path], None], second: Part) -> None:
    """Run one part of a script, and end its process.

    Args:
        first: trains and notes.
        doomed: in the first process too: trains, saves after HALF steps, and calls `kill_at` in every step.
        second: resumes and notes.
    """
    part, folder = sys.argv[1], Path(sys.argv[2])
    path = folder / "noted.json"
    noted = json.loads(path.read_text()) if path.exists() else {}
    {"first": first, "second": second}[part](folder, noted)
    path.write_text(json.dumps(noted))
    if part == "first":
        doomed(folder)
    leave()


def kill_at(step: int) -> None:
    """End this process as a machine that fails does, if the step is LAST."""
    if step == LAST:
        os.kill(os.getpid(), signal.SIGKILL)


def check(noted: dict[str, Any]) -> None:
    """Check losses: of torch's AdamW and ours, of a rule here and elsewhere, and of the resumed run.

    Args:
        noted: losses of `torch`, `ours`, `rule`, `resumed`, and of the rule in a `plain` loop.
    """
    for name in ("torch", "ours", "rule", "plain"):
        assert len(noted[name]) == STEPS
        assert noted[name][-1] < noted[name][0] - 0.05, name
    assert noted["ours"] == pytest.approx(noted["torch"], abs=TOLERANCE, rel=0)
    assert noted["rule"] == pytest.approx(noted["plain"], abs=TOLERANCE, rel=0)
    assert max(abs(a - b) for a, b in zip(noted["rule"], noted["ours"], strict=True)) > 1e-3
    assert noted["resumed"] == noted["rule"][HALF:]
