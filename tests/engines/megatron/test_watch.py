"""attach: norms and readings of whole parameters by the model's names, in every wrapper and parallel layout."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest

from tests.sharded.processes import run

from . import training
from .training import Case

pytestmark = pytest.mark.engines

BACKENDS = ("torch", "triton")
TWO = (
    Case("fp32", tp=2),
    Case("fp32"),
    Case("bf16", tp=2),
    Case("bf16"),
    Case("distributed fp32"),
    Case("distributed fp32", tp=2),
    Case("distributed bf16"),
    Case("distributed bf16", tp=2),
    Case("aware"),
    Case("aware remainder"),
    Case("aware remainder", tp=2),
    Case("distributed fp32", ep=2),
)
FOUR = (
    Case("fp32", tp=2),
    Case("distributed fp32", tp=2),
    Case("distributed bf16", tp=2),
    Case("aware remainder", tp=2),
)
COLUMNS = ("weight", "update", "grad", "angle")


def measure(cases: tuple[Case, ...], backends: tuple[str, ...]) -> dict[tuple[Case, str], Any]:
    """In each process: norms of the third step as the watch has them, and as float64 has them of gathered parameters."""
    out: dict[Any, Any] = {}
    for case in cases:
        for backend in backends:
            with training.layout(case), training.optimizer_of("ours", case, backend=backend):
                out[case, backend] = _measure(case)
    return out


def _measure(case: Case) -> dict[str, Any]:
    from lwadamw.engines.megatron import attach

    from . import gathering

    made = training.build(case, layers=1)
    watch = attach(made.optimizer, [made.model])
    training.train(made, range(2))
    expected = gathering.step_and_gather(made, 2)
    found = watch.norms()
    own = [name for inner in made.inner() for name in inner.norms().names]
    return {
        "names": (found.names, expected.names, own),
        "found": {column: getattr(found, column) for column in COLUMNS},
        "expected": {column: getattr(expected, column) for column in COLUMNS},
    }


@functools.cache
def measured(world: int, cases: tuple[Case, ...], backends: tuple[str, ...]) -> list[dict[tuple[Case, str], Any]]:
    return run(world, measure, cases, backends, seconds=500)


def check(results: list[dict[tuple[Case, str], Any]], case: Case, backend: str) -> None:
    for result in results:
        one = result[case, backend]
        found, expected, own = one["names"]
        assert found == expected
        assert sorted(own) == sorted(found)
        assert "output_layer.weight" in found
        for column in COLUMNS:
            # The kernels add in float32, and an angle is a difference of their sums.
            loose = 1e-3 if column == "angle" else 1e-5
            np.testing.assert_allclose(
                one["found"][column], one["expected"][column], rtol=loose, atol=1e-12, err_msg=column
            )
    shared = [i for i, name in enumerate(found) if "experts" not in name]
    first = results[0][case, backend]["found"]
    for result in results[1:]:
        for column in COLUMNS:
            assert result[case, backend]["found"][column][shared].tolist() == first[column][shared].tolist()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", TWO, ids=str)
def test_norms_over_two_processes_are_those_of_the_gathered_parameters(case, backend):
    check(measured(2, TWO, BACKENDS), case, backend)


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_norms_over_four_processes_are_those_of_the_gathered_parameters(case):
    check(measured(4, FOUR, ("torch",)), case, "torch")
