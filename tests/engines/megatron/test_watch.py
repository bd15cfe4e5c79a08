"""attach: norms and readings of whole parameters by the model's names, in every wrapper and parallel layout."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import numpy as np
import pytest

from tests.sharded.processes import run

from . import training
from .training import Case

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
# The wrappers of one process that others are compared with.
WRAPPERS = ("fp32", "bf16", "distributed bf16", "aware", "aware remainder")
MONITORED = (TWO[0], TWO[3], TWO[4], TWO[5], TWO[7], TWO[8], TWO[9])
COLUMNS = ("weight", "update", "grad", "angle")
RESUMED = (TWO[0], TWO[7])
SPECTRA = ("top", "second", "bulk")
STEPS = 12


def work(
    cases: tuple[Case, ...], on_triton: tuple[Case, ...], monitored: tuple[Case, ...], folder: str
) -> dict[Any, Any]:
    """In each process: what the watch has of every case, and what follows from all that it is wrong to do."""
    out: dict[Any, Any] = {}
    for some, backend in ((cases, "torch"), (on_triton, "triton")):
        for case in sorted(some, key=_layout):
            with training.layout(case), training.optimizer_of("ours", case, backend=backend):
                out["norms", case, backend] = _measure(case)
    for case in sorted(monitored, key=_layout):
        with training.layout(case), training.optimizer_of("ours", case, backend="torch"):
            out["monitor", case] = _watch(case)
    if len(cases) == len(TWO):
        out["errors"] = _errors()
        for i, case in enumerate(RESUMED):
            with training.layout(case), training.optimizer_of("ours", case, backend="torch"):
                out["resumed", case] = _resume(case, f"{folder}/{i}")
    return out


def _layout(case: Case) -> tuple[int, int]:
    """Cases of one layout follow each other, so that process groups are made once."""
    return case.tp, case.ep


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


def _errors() -> dict[str, str]:
    """Wrong uses by name, and the error of each."""
    import torch
    import torch.distributed as dist

    from lwadamw.engines.megatron import attach, config_overrides

    out: dict[str, str] = {}

    def note(name: str, call: Any, *arguments: Any) -> None:
        try:
            call(*arguments)
        except (TypeError, ValueError, RuntimeError) as error:
            out[name] = f"{type(error).__name__}: {error}"

    case = Case("distributed bf16")
    with training.layout(case):
        with training.optimizer_of("torch", case):
            theirs = training.build(case, layers=1)
        with training.optimizer_of("ours", case, backend="torch"):
            made, other = training.build(case, layers=1), training.build(case, layers=1)

            def unused(config: Any, chunks: list[Any]) -> None:
                config_overrides(config, chunks, base_width=8)

            without = training.build(case, layers=1, overrides=unused)
        with training.optimizer_of("ours", case, norms=False):
            blind = training.build(case, layers=1)
        (wrapper,) = made.optimizer.chained_optimizers
        note("no optimizer yet", attach, None, [made.model])
        note("its config", attach, wrapper.config, [made.model])
        note("no list", attach, made.optimizer, made.model)
        note("torch's", attach, theirs.optimizer, [theirs.model])
        # Only one process makes these two mistakes.
        note("another model", attach, made.optimizer, [(other if dist.get_rank() else made).model])
        more = [torch.nn.Linear(3, 2)] if dist.get_rank() else []
        note("another chunk", attach, made.optimizer, [made.model, *more])
        note("unused overrides", attach, without.optimizer, [without.model])
        note("overrides too late", config_overrides, wrapper.config, [made.model], 8)
        note("no norms", attach(blind.optimizer, [blind.model]).norms)
        note("no monitor", attach(blind.optimizer, [blind.model]).monitor)
    case = Case("bf16", tp=2)
    with training.layout(case), training.optimizer_of("ours", case, backend="torch"):
        made = training.build(case, layers=1)
        watch = attach(made.optimizer, [made.model])
        (wrapper,) = getattr(made.optimizer, "chained_optimizers", [made.optimizer])
        replacement = wrapper.fp32_from_float16_groups[0][-1].clone()
        wrapper.fp32_from_float16_groups[0][-1] = wrapper.optimizer.param_groups[0]["params"][-1] = replacement
        training.step(made, 0)
        note("replaced", watch.norms)
        watch = attach(made.optimizer, [made.model])
        training.step(made, 1)
        note("attached again", watch.norms)
    return out


def _resume(case: Case, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last readings of a run, and of a run that went on from its checkpoint with another model, optimizer and monitor."""
    from lwadamw.engines.megatron import attach

    from . import checkpoints

    def monitored(made: Any) -> Any:
        return attach(made.optimizer, [made.model]).monitor(every=2, spectrum_every=0)

    made = training.build(case, layers=1)
    monitor = monitored(made)
    training.train(made, range(3))
    checkpoints.save(made, case, folder)
    state = monitor.state_dict()
    training.train(made, range(3, 6))
    again = training.build(case, seed=5, layers=1)
    checkpoints.load(again, case, folder)
    resumed = monitored(again)
    resumed.load_state_dict(state)
    training.train(again, range(3, 6))
    return tuple({"step": m.latest.step, **m.as_dict(), **m.verdicts} for m in (monitor, resumed))


@functools.cache
def worked(world: int) -> list[dict[Any, Any]]:
    chosen: dict[int, Any] = {
        1: ((), (), tuple(map(Case, WRAPPERS))),
        2: (TWO, ON_TRITON, MONITORED),
        4: (FOUR, (), FOUR[1:]),
    }
    with tempfile.TemporaryDirectory() as folder:
        return run(world, work, *chosen[world], folder, seconds=500)


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
    expected = worked(1)[0]["monitor", Case(case.wrapper if case.half else "fp32")]
    results = [result["monitor", case] for result in worked(world)]
    assert "steady from step" in expected["verdicts"]["decoder.layers.0.mlp.linear_fc1.weight"]
    matrices = [i for i, role in enumerate(expected["roles"]) if role == "matrix"]
    assert len(matrices) == 4
    assert (expected["m"][matrices] == training.HIDDEN / 8).all()
    assert expected["shapes"]["decoder.layers.0.mlp.linear_fc2.weight"] == (
        (training.HIDDEN, 4 * training.HIDDEN),
        4 * training.HIDDEN,
    )
    assert np.isfinite([expected["columns"][column][matrices] for column in SPECTRA]).all()
    for result in results:
        for key in ("step", "names", "roles", "verdicts", "shapes"):
            assert result[key] == expected[key]
        np.testing.assert_array_equal(result["m"], expected["m"])
        # The gradient of the keys' bias is 0 but for rounding, which Adam blows up: its steps depend on the layout.
        alike = [i for i, name in enumerate(expected["names"]) if not name.endswith("linear_qkv.bias")]
        loose = 5e-2 if case.half else 1e-3
        for column, values in expected["columns"].items():
            np.testing.assert_allclose(result["columns"][column][alike], values[alike], rtol=loose, err_msg=column)
        assert {name: values.tobytes() for name, values in result["columns"].items()} == {
            name: values.tobytes() for name, values in results[0]["columns"].items()
        }
        assert result["report"] == results[0]["report"]
    assert [result["writes"] for result in results] == [True] + [False] * (world - 1)


@pytest.mark.parametrize(
    ("case", "backend"), [*((case, "torch") for case in TWO), *((case, "triton") for case in ON_TRITON)], ids=str
)
def test_norms_over_two_processes_are_those_of_the_gathered_parameters(case, backend):
    check_norms(2, case, backend)


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_norms_over_four_processes_are_those_of_the_gathered_parameters(case):
    check_norms(4, case, "torch")


@pytest.mark.parametrize("case", MONITORED, ids=str)
def test_readings_over_two_processes_are_those_of_one(case):
    check_readings(2, case)


@pytest.mark.parametrize("case", FOUR[1:], ids=str)
def test_readings_over_four_processes_are_those_of_one(case):
    check_readings(4, case)


@pytest.mark.parametrize("case", RESUMED, ids=str)
def test_a_monitor_goes_on_after_a_resume(case):
    for result in worked(2):
        went_on, resumed = result["resumed", case]
        assert went_on["step"] == 6
        assert resumed == went_on


def test_wrong_uses_have_the_same_error_on_every_process():
    first, second = (result["errors"] for result in worked(2))
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
