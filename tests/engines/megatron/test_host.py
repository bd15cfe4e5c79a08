"""Under Megatron's scheduler only values of groups change: no plan is made after the third step, and no moment is verified."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from tests.sharded.processes import run

from . import training
from .training import Case

pytestmark = pytest.mark.engines

CASES = tuple(
    Case(wrapper, slim=True) for wrapper in ("fp32", "bf16", "distributed fp32", "distributed bf16", "aware remainder")
)
STEPS = 6
ROOT = Path(__file__).parents[3]
CONTESTANTS = (
    "torch, its choice",
    "torch, foreach",
    "torch, fused",
    "lwadamw, torch backend",
    "lwadamw, kernels stubbed",
    "lwadamw, torch backend, state read",
    "lwadamw, kernels stubbed, state read",
)


def counted(owner: Any, name: str, kind: str, counts: Counter[str]) -> Any:
    """A context in which calls of a function are counted."""
    real = getattr(owner, name)

    @functools.wraps(real)
    def counting(*args: Any, **kwargs: Any) -> Any:
        counts[kind] += 1
        return real(*args, **kwargs)

    return mock.patch.object(owner, name, counting)


def count(cases: tuple[Case, ...]) -> dict[tuple[Case, str], list[Counter[str]]]:
    """What had been made anew, and how often, after each step."""
    from lwadamw.engines.megatron import config_overrides
    from lwadamw.state.fingerprint import Fingerprint
    from lwadamw.step import torch_backend
    from lwadamw.step.engine import Engine
    from lwadamw.tables.group_table import GroupTable

    counts: Counter[str] = Counter()
    holds = Fingerprint.holds

    def looking(self: Any, groups: Any, state: Any, verify_state: bool) -> bool:
        counts["moments verified"] += verify_state
        return holds(self, groups, state, verify_state)

    def overrides(config: Any, chunks: list[Any]) -> Any:
        return config_overrides(config, chunks, base_width=8)

    out = {}
    with (
        counted(Engine, "_sort", "plans", counts),
        counted(torch_backend, "fill_buckets", "buckets", counts),
        counted(GroupTable, "_rewrite", "group tables", counts),
        mock.patch.object(Fingerprint, "holds", looking),
    ):
        for case in cases:
            for backend in ("torch", "triton"):
                with training.layout(case), training.optimizer_of("ours", case, backend=backend, norms=False):
                    made = training.build(case, layers=1, overrides=overrides)
                    counts.clear()
                    out[case, backend] = []
                    for index in range(STEPS):
                        training.step(made, index)
                        out[case, backend].append(Counter(counts))
    return out


@functools.cache
def counts() -> dict[tuple[Case, str], list[Counter[str]]]:
    return run(1, count, CASES, seconds=300)[0]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_nothing_is_made_anew_after_the_third_step_and_no_moment_is_verified(case, backend):
    found = counts()[case, backend]
    assert found[0]["plans"] == 1
    assert found[0]["buckets" if backend == "torch" else "group tables"] >= 1
    assert found[2:] == [found[2]] * (STEPS - 2)
    assert found[-1]["moments verified"] == 0


def test_the_benchmark_of_the_host_time_runs():
    command = [sys.executable, "-m", "bench.megatron", "--dry-run"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1].strip() for line in done.stdout.splitlines() if line.startswith("|")]
    assert rows[2:] == list(CONTESTANTS)
