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
WRAPPERS = tuple(dict.fromkeys(case.wrapper for case in TWO))
COLUMNS = ("weight", "update", "grad", "angle")
SPECTRA = ("top", "second", "bulk")
STEPS = 12


def work(cases: tuple[Case, ...], backends: tuple[str, ...], monitored: tuple[Case, ...]) -> dict[Any, Any]:
    """In each process: what the watch has of every case, and what follows from all that it is wrong to do."""
    out: dict[Any, Any] = {}
    for case in cases:
        for backend in backends:
            with training.layout(case), training.optimizer_of("ours", case, backend=backend):
                out["norms", case, backend] = _measure(case)
    for case in monitored:
        with training.layout(case), training.optimizer_of("ours", case, backend="torch"):
            out["monitor", case] = _watch(case)
    return out


def _measure(case: Case) -> dict[str, Any]:
    """Norms of the third step as the watch has them, and as float64 has them of gathered parameters."""
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


def _watch(case: Case) -> dict[str, Any]:
    """The last reading of a run in which matrices forget their initial weights in two or three steps, and its verdicts."""
    import tempfile

    from lwadamw.engines.megatron import attach, config_overrides
    from lwadamw.monitor import profile_file

    def overrides(config: Any, chunks: list[Any]) -> Any:
        return config_overrides(config, chunks, base_width=8, rule="kosson2025")

    made = training.build(case, layers=1, overrides=overrides)
    made.scheduler.start_wd = made.scheduler.end_wd = 40.0
    watch = attach(made.optimizer, [made.model])
    with watch.monitor(every=2, spectrum_every=4, steps=40) as monitor:
        training.train(made, range(STEPS))
    reading = monitor.latest
    with tempfile.TemporaryDirectory() as folder:
        profile = profile_file.save(monitor, f"{folder}/profile.json")
    return {
        "step": reading.step,
        "names": reading.names,
        "roles": reading.roles,
        "m": reading.m,
        "columns": dict(reading.columns),
        "verdicts": monitor.verdicts,
        "report": monitor.report(),
        "writes": reading.writes,
        "shapes": {s.name: (s.shape, s.fan_in) for s in profile.segments},
    }


@functools.cache
def worked(world: int) -> list[dict[Any, Any]]:
    if world == 1:
        return run(1, work, (), (), tuple(map(Case, WRAPPERS)), seconds=500)
    dense = tuple(case for case in (TWO if world == 2 else FOUR) if not case.ep)
    return run(world, work, TWO if world == 2 else FOUR, BACKENDS if world == 2 else ("torch",), dense, seconds=500)


def check_norms(world: int, case: Case, backend: str) -> None:
    results = [result["norms", case, backend] for result in worked(world)]
    for result in results:
        found, expected, own = result["names"]
        assert found == expected
        assert sorted(own) == sorted(found)
        assert "output_layer.weight" in found
        for column in COLUMNS:
            # The kernels add in float32, and an angle is a difference of their sums.
            loose = 1e-3 if column == "angle" else 1e-5
            np.testing.assert_allclose(
                result["found"][column], result["expected"][column], rtol=loose, atol=1e-12, err_msg=column
            )
    shared = [i for i, name in enumerate(found) if "experts" not in name]
    for result in results[1:]:
        for column in COLUMNS:
            assert result["found"][column][shared].tolist() == results[0]["found"][column][shared].tolist()


def check_readings(world: int, case: Case) -> None:
    expected = worked(1)[0]["monitor", Case(case.wrapper)]
    results = [result["monitor", case] for result in worked(world)]
    assert "steady from step" in expected["verdicts"]["decoder.layers.0.mlp.linear_fc1.weight"]
    matrices = [i for i, role in enumerate(expected["roles"]) if role == "matrix"]
    assert len(matrices) == 4
    assert np.isfinite([expected["columns"][column][matrices] for column in SPECTRA]).all()
    for result in results:
        for key in ("step", "names", "roles", "verdicts", "shapes"):
            assert result[key] == expected[key]
        np.testing.assert_array_equal(result["m"], expected["m"])
        for column, values in expected["columns"].items():
            # Gradients of another layout differ in their last bits, and Adam divides by what may be almost 0.
            loose = 5e-2 if case.half else 1e-3
            np.testing.assert_allclose(result["columns"][column], values, rtol=loose, atol=1e-7, err_msg=column)
        assert {name: values.tobytes() for name, values in result["columns"].items()} == {
            name: values.tobytes() for name, values in results[0]["columns"].items()
        }
        assert result["report"] == results[0]["report"]
    assert [result["writes"] for result in results] == [True] + [False] * (world - 1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", TWO, ids=str)
def test_norms_over_two_processes_are_those_of_the_gathered_parameters(case, backend):
    check_norms(2, case, backend)


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_norms_over_four_processes_are_those_of_the_gathered_parameters(case):
    check_norms(4, case, "torch")


@pytest.mark.parametrize("case", [case for case in TWO if not case.ep], ids=str)
def test_readings_over_two_processes_are_those_of_one(case):
    check_readings(2, case)


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_readings_over_four_processes_are_those_of_one(case):
    check_readings(4, case)
