"""Each example runs. Those that need a framework run where it is installed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAID = {"drop_in": "'3.weight'", "hybrid_muon": "matrix"}
FRAMEWORKS = {"huggingface_trainer": ("transformers", "(10, 0.0"), "lightning_fit": ("lightning", "matrix")}


def run(name: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.engines
@pytest.mark.parametrize("name", SAID)
def test_an_example_runs_and_shows_norms(name):
    assert SAID[name] in run(name)


@pytest.mark.engines
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_example_of_a_framework_runs_and_shows_norms(name):
    framework, said = FRAMEWORKS[name]
    pytest.importorskip(framework)
    assert said in run(name)
