"""Each example runs. Those that need a framework run where it is installed."""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
SAID = {
    "drop_in": "'3.weight'",
    "hybrid_muon": "matrix",
    "fsdp2": "the resumed run has the same loss",
    "low_precision": "8-bit moments",
    "width_transfer": "never in this run",
}
BEFORE = {"fsdp2": ("-m", "tests.engines.to_the_end")}
FRAMEWORKS = {
    "huggingface_trainer": ("transformers", "(10, 0.0"),
    "lightning_fit": ("lightning", "matrix"),
}
ELSEWHERE = {
    "megatron_gpt": "tests/engines/megatron/test_example.py",
    "old_checkpoint": "tests/engines/huggingface/test_old_checkpoint.py",
    "torchtitan/width": "tests/engines/torchtitan/test_trainer.py",
}


@functools.cache
def run(name: str, *before: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *before, str(EXAMPLES / f"{name}.py")],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        env={**os.environ, "PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_every_example_is_run():
    found = {str(path.relative_to(EXAMPLES).with_suffix("")) for path in EXAMPLES.rglob("*.py")}
    assert found == {*SAID, *FRAMEWORKS, *ELSEWHERE}
    assert [path for path in ELSEWHERE.values() if not (EXAMPLES.parent / path).exists()] == []


@pytest.mark.engines
@pytest.mark.parametrize("name", SAID)
def test_an_example_runs_and_shows_norms(name):
    assert SAID[name] in run(name, *BEFORE.get(name, ()))


@pytest.mark.engines
@pytest.mark.parametrize("name", FRAMEWORKS)
def test_an_example_of_a_framework_runs_and_shows_norms(name):
    framework, said = FRAMEWORKS[name]
    pytest.importorskip(framework)
    assert said in run(name)


@pytest.mark.engines
def test_the_example_of_a_transfer_shows_a_learning_rate_that_transfers_with_the_rule_only():
    """At 8 times the width, the proxy's lr is within 0.03 of the best loss. Without a rule it is more than 0.08 above."""
    above = {rule: float(x) for rule, x in re.findall(r"256, (\w+): .* is ([\d.]+) above", run("width_transfer"))}
    assert above["fan2025"] < 0.03
    assert above["standard"] > 0.08


@pytest.mark.engines
def test_the_example_of_storages_shows_that_rounding_loses_updates_and_the_others_do_not():
    rows = [line.rsplit(maxsplit=2) for line in run("low_precision").splitlines()[1:]]
    size, distance = ({name.strip(): float(row[i]) for name, *row in rows} for i in (0, 1))
    assert (size["float32"], size["bfloat16, as in torch"], size["16-bit remainder"]) == (8, 4, 10)
    others = [name for name in distance if name not in ("float32", "bfloat16, as in torch")]
    assert len(others) == 4
    assert all(distance[name] < distance["bfloat16, as in torch"] / 3 for name in others)


@pytest.mark.engines
def test_the_example_of_fsdp2_runs_over_two_processes():
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2")
    assert run("fsdp2", *launcher, *BEFORE["fsdp2"]).count(SAID["fsdp2"]) == 2
