"""Under Megatron, lwadamw takes the steps of torch's AdamW: in every wrapper and parallel layout, on both backends."""

from __future__ import annotations

import functools
from typing import Any

import pytest

from tests.sharded.processes import run

from . import training
from .cases import CORE, FOUR, TWO, WRAPPERS
from .training import Case

pytestmark = pytest.mark.engines

STEPS = 20
BACKENDS = ("torch", "triton")


def train_all(cases: tuple[Case, ...]) -> dict[tuple[Case, str], dict[str, Any]]:
    """In each process: train every case with the reference, and with each of our backends."""
    out = {}
    for case in sorted(cases, key=lambda case: case.layout):
        with training.layout(case):
            out[case, "reference"] = _train(case, "stand-in" if case.aware else "torch")
            for backend in BACKENDS:
                # Norms would double what the interpreter has to do. `test_watch.py` measures them.
                out[case, backend] = _train(case, "ours", backend=backend, norms=False)
    return out


def _train(case: Case, how: str, **options: Any) -> dict[str, Any]:
    with training.optimizer_of(how, case, **options):
        made = training.build(case, layers=1)
        losses = training.train(made, range(STEPS))
    inner = made.inner()
    return {
        "losses": losses,
        "wrappers": made.wrappers(),
        "inner": {type(o).__module__ for o in inner},
        "steps": {group.get("step") for o in inner for group in o.param_groups},
        "on triton": [o._engine._triton is not None for o in inner] if how == "ours" else [],
    }


@functools.cache
def trained(world: int, cases: tuple[Case, ...]) -> list[dict[tuple[Case, str], dict[str, Any]]]:
    return run(world, train_all, cases, seconds=500)


def check(results: list[dict[tuple[Case, str], dict[str, Any]]], case: Case, backend: str) -> None:
    for result in results:
        found, expected = result[case, backend], result[case, "reference"]
        assert found["wrappers"] == expected["wrappers"] == {WRAPPERS[case.wrapper]}
        assert found["inner"] == {"lwadamw.engines.megatron.fused_adam"}
        assert found["steps"] == {STEPS}
        assert set(found["on triton"]) == {backend == "triton"}
        assert found["losses"][-1] < found["losses"][0] - 0.1
        assert max(abs(a - b) for a, b in zip(found["losses"], expected["losses"], strict=True)) <= case.bound


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CORE, ids=str)
def test_losses_are_those_of_torch_in_the_same_engine(case, backend):
    check(trained(2, CORE), case, backend)


@pytest.mark.wide
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", TWO, ids=str)
def test_losses_over_two_processes_are_those_of_torch_in_the_same_engine(case, backend):
    check(trained(2, TWO), case, backend)


@pytest.mark.four
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", FOUR, ids=str)
def test_losses_over_four_processes_are_those_of_torch_in_the_same_engine(case, backend):
    check(trained(4, FOUR), case, backend)
