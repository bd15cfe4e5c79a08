"""attach: norms and readings of whole parameters by the model's names, in every wrapper and parallel layout."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from . import training
from .cases import EVERY
from .training import Case
from .watching import COLUMNS, Job, worked

pytestmark = pytest.mark.engines

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
# On the torch backend every case, on the Triton backend one case of each wrapper.
ON_TRITON = (TWO[0], TWO[2], TWO[4], TWO[7], TWO[8], TWO[10])
MONITORED = (TWO[0], TWO[3], TWO[4], TWO[5], TWO[7], TWO[8], TWO[9], TWO[11])
RESUMED = (TWO[0], TWO[7])
WRONG = Job("errors", Case("bf16", tp=2))


def jobs(kind: str, cases: tuple[Case, ...], backend: str = "torch") -> tuple[Job, ...]:
    return tuple(Job(kind, case, backend) for case in cases)


# By number of processes: what always runs, and by layout what runs only if it is asked for.
CORE = {
    2: (
        *jobs("norms", TWO),
        *jobs("norms", ON_TRITON, "triton"),
        *jobs("readings", MONITORED),
        Job("readings", Case("distributed bf16", tp=2, slim=True), "triton"),
        *jobs("resumed", RESUMED),
        WRONG,
    ),
    4: (
        *jobs("norms", FOUR),
        Job("norms", Case("aware remainder", tp=2, slim=True), "triton"),
        *jobs("readings", FOUR[1:]),
        Job("readings", Case("distributed fp32", tp=2, slim=True), "triton"),
    ),
}
WHOLE = {
    layout: tuple(
        Job(kind, case, backend)
        for kind in ("norms", "readings")
        for backend in ("torch", "triton")
        for case in cases
        # The interpreter has fewer tensors in a slim model.
        for case in [dataclasses.replace(case, slim=backend == "triton")]
    )
    for layout, cases in EVERY.items()
}


def of_kind(kind: str, some: tuple[Job, ...]) -> list[Job]:
    return [job for job in some if job.kind == kind]


def whole(kind: str) -> list[Any]:
    """World, jobs of one start of processes, and each job, of all that runs only if it is asked for."""
    return [
        pytest.param(world, some, job, id=f"{world} processes: {job}")
        for (world, _), some in WHOLE.items()
        for job in of_kind(kind, some)
    ]


def reference_of(job: Job) -> Job:
    """The same on one process. Every wrapper in fp32 is compared with FP32Optimizer."""
    case = job.case
    wrapper = case.wrapper if case.half else "fp32"
    return Job("readings", Case(wrapper, ep=min(1, case.ep), slim=case.slim), job.backend)


def check_norms(world: int, some: tuple[Job, ...], job: Job) -> None:
    results = [result[job] for result in worked(world, some)]
    for result in results:
        assert result["on triton"] == {job.backend == "triton"}
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


def check_readings(world: int, some: tuple[Job, ...], job: Job) -> None:
    case, references = job.case, tuple(sorted({reference_of(job) for job in of_kind("readings", some)}, key=str))
    expected = worked(1, references)[0][reference_of(job)]
    results = [result[job] for result in worked(world, some)]
    fc1 = "decoder.layers.0.mlp" + (".experts.local_experts.1" if case.ep else "") + ".linear_fc1.weight"
    assert "steady from step" in expected["verdicts"][fc1]
    matrices = [name for name, role in expected["roles"].items() if role == "matrix"]
    assert len(matrices) == (2 + 2 * training.EXPERTS if case.ep else 4)
    assert all(expected["m"][name] == training.HIDDEN / 8 for name in matrices)
    shape = (training.HIDDEN, 4 * training.HIDDEN)
    assert expected["shapes"][fc1.replace("fc1", "fc2")] == (shape, shape[1])
    at = [expected["names"].index(name) for name in matrices]
    assert all(np.isfinite(expected["columns"][column][at]).all() for column in ("top", "second", "bulk"))
    for rank, result in enumerate(results):
        assert result["on triton"] == {job.backend == "triton"}
        assert result["step"] == expected["step"]
        there = [name_on_one_process(name, case, rank) for name in result["names"]]
        assert there == [name for name in expected["names"] if name in there]
        if not case.ep:
            assert there == list(expected["names"])
        for key in ("roles", "verdicts", "shapes"):
            assert result[key] == {
                a: expected[key][b] for a, b in zip(result["names"], there, strict=True) if b in expected[key]
            }
        np.testing.assert_array_equal(
            [result["m"][name] for name in result["names"]], [expected["m"][name] for name in there]
        )
        loose = 5e-2 if case.half else 1e-3
        alike = [expected["names"].index(name) for name in there]
        for column, values in expected["columns"].items():
            np.testing.assert_allclose(result["columns"][column], values[alike], rtol=loose, err_msg=column)
        for i, name in enumerate(result["names"]):
            if name.endswith("linear_qkv.bias"):
                # Found: below 6e-3. With the rounding in the gradient of the keys' bias, it was 2.5e-2 to 6.5e-2.
                for column, values in expected["columns"].items():
                    np.testing.assert_allclose(
                        result["columns"][column][i], values[alike[i]], rtol=1.5e-2, err_msg=column
                    )
        shared = [i for i, name in enumerate(result["names"]) if "experts" not in name]
        assert {name: values[shared].tobytes() for name, values in result["columns"].items()} == {
            name: values[shared].tobytes() for name, values in results[0]["columns"].items()
        }
        if not case.ep:
            assert result["report"] == results[0]["report"]
    assert [result["writes"] for result in results] == [True] + [False] * (world - 1)


def name_on_one_process(name: str, case: Case, rank: int) -> str:
    """The name that a parameter of a process has where one process has all experts."""
    index = training.expert_index(name, case, rank)
    if index is None:
        return name
    before, after = name.split(".local_experts.")
    return f"{before}.local_experts.{index}.{after.partition('.')[2]}"


@pytest.mark.parametrize("job", of_kind("norms", CORE[2]), ids=str)
def test_norms_over_two_processes_are_those_of_the_gathered_parameters(job):
    check_norms(2, CORE[2], job)


@pytest.mark.parametrize("job", of_kind("norms", CORE[4]), ids=str)
def test_norms_over_four_processes_are_those_of_the_gathered_parameters(job):
    check_norms(4, CORE[4], job)


@pytest.mark.whole
@pytest.mark.parametrize(("world", "some", "job"), whole("norms"))
def test_norms_in_every_layout_are_those_of_the_gathered_parameters(world, some, job):
    check_norms(world, some, job)


@pytest.mark.parametrize("job", of_kind("readings", CORE[2]), ids=str)
def test_readings_over_two_processes_are_those_of_one(job):
    check_readings(2, CORE[2], job)


@pytest.mark.parametrize("job", of_kind("readings", CORE[4]), ids=str)
def test_readings_over_four_processes_are_those_of_one(job):
    check_readings(4, CORE[4], job)


@pytest.mark.whole
@pytest.mark.parametrize(("world", "some", "job"), whole("readings"))
def test_readings_in_every_layout_are_those_of_one_process(world, some, job):
    check_readings(world, some, job)


@pytest.mark.parametrize(
    "job", [job for job in of_kind("readings", CORE[2]) if not job.case.slim and not job.case.ep], ids=str
)
def test_the_gradient_of_the_keys_bias_is_rounding(job):
    for result in worked(2, CORE[2]):
        assert len(result[job]["key gradients"]) > 0
        assert max(result[job]["key gradients"]) < (2e-2 if job.case.half else 1e-5)


@pytest.mark.parametrize("job", of_kind("resumed", CORE[2]), ids=str)
def test_a_monitor_goes_on_after_a_resume(job):
    for result in worked(2, CORE[2]):
        went_on, resumed = result[job]
        assert went_on["step"] == 6
        assert resumed == went_on


def test_wrong_uses_have_the_same_error_on_every_process():
    first, second = (result[WRONG] for result in worked(2, CORE[2]))
    assert first == second
    told = "Give what get_megatron_optimizer returned, after megatron.use()."
    assert first["no optimizer yet"] == f"TypeError: attach: the optimizer is NoneType. {told}"
    assert first["its config"].startswith("TypeError: attach: the optimizer is ")
    assert first["its config"].endswith(f"OptimizerConfig. {told}")
    assert first["torch's"] == f"TypeError: attach: the optimizer is torch's AdamW. {told}"
    assert "TypeError: attach: model_chunks is not a list of models. Give" in first["no list"]
    assert (
        "ValueError: attach: the optimizer updates 17 parameters that are not in model_chunks" in first["another model"]
    )
    assert "model_chunks has 'chunk 1: weight' (2, 3), which the optimizer does not update" in first["another chunk"]
    assert "config_overrides was called for this model, and the groups" in first["unused overrides"]
    assert "Call config_overrides before get_megatron_optimizer" in first["overrides too late"]
    assert "built with norms=False" in first["no norms"]
    assert "built with norms=False" in first["no monitor"]
    assert "has been replaced since its name was told" in first["replaced"]
    assert "attached again" not in first
