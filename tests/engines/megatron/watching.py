"""What `attach` has of a case, measured in each process: norms, readings, and the readings of a resumed monitor."""

from __future__ import annotations

import functools
import tempfile
from typing import Any, NamedTuple

import torch

from lwadamw.engines.megatron.overrides import unwrapped
from tests.sharded.processes import run

from . import checkpoints, gathering, training, wrong_uses
from .training import Case

COLUMNS = ("weight", "update", "grad", "angle")
STEPS = 12


class Job(NamedTuple):
    """What every process does with one case.

    Attributes:
        kind: "norms", "readings", "resumed" or "errors".
        case: wrapper and layout.
        backend: "torch" or "triton".
    """

    kind: str
    case: Case
    backend: str = "torch"

    def __str__(self) -> str:
        return f"{self.case}, {self.backend}"


@functools.cache
def worked(world: int, jobs: tuple[Job, ...]) -> list[dict[Job, Any]]:
    """Start processes, and return what each of them has found for every job."""
    with tempfile.TemporaryDirectory() as folder:
        return run(world, work, jobs, folder, seconds=500)


def work(jobs: tuple[Job, ...], folder: str) -> dict[Job, Any]:
    """In each process: do all jobs. Those of one layout follow each other, so that process groups are made once."""
    out: dict[Job, Any] = {}
    for job in sorted(jobs, key=lambda job: job.case.layout):
        if job.kind == "errors":
            out[job] = wrong_uses.errors()
            continue
        with training.layout(job.case), training.optimizer_of("ours", job.case, backend=job.backend):
            if job.kind == "norms":
                out[job] = measure(job.case)
            elif job.kind == "readings":
                out[job] = read(job.case)
            else:
                out[job] = resume(job.case, f"{folder}/{len(out)}")
    return out


def measure(case: Case) -> dict[str, Any]:
    """Norms of the third step as the watch has them, and as float64 has them of gathered parameters."""
    from lwadamw.engines.megatron import attach

    made = training.build(case, layers=1)
    watch = attach(made.optimizer, [made.model])
    training.train(made, range(2))
    expected = gathering.step_and_gather(made, 2)
    found = watch.norms()
    own = [name for inner in made.inner() for name in inner.norms().names]
    return {
        "on triton": {inner._engine._triton is not None for inner in made.inner()},
        "names": (found.names, expected.names, own),
        "found": {column: getattr(found, column) for column in COLUMNS},
        "expected": {column: getattr(expected, column) for column in COLUMNS},
    }


def read(case: Case) -> dict[str, Any]:
    """The last reading of a run in which matrices forget their initial weights in two or three steps, and its verdicts."""
    from lwadamw.engines.megatron import attach, config_overrides
    from lwadamw.monitor import profile_file

    def overrides(config: Any, chunks: list[Any]) -> Any:
        return config_overrides(config, chunks, base_width=8, rule="kosson2025")

    made = training.build(case, layers=1, overrides=overrides, experts_alike=True)
    key_gradients = clear_key_gradients(made.model)
    made.scheduler.start_wd = made.scheduler.end_wd = 40.0
    watch = attach(made.optimizer, [made.model])
    with watch.monitor(every=2, spectrum_every=4, steps=40) as monitor:
        training.train(made, range(STEPS))
    reading = monitor.latest
    with tempfile.TemporaryDirectory() as folder:
        profile = profile_file.save(monitor, f"{folder}/profile.json")
    return {
        "on triton": {inner._engine._triton is not None for inner in made.inner()},
        "key gradients": key_gradients,
        "step": reading.step,
        "names": reading.names,
        "roles": dict(zip(reading.names, reading.roles, strict=True)),
        "m": dict(zip(reading.names, reading.m, strict=True)),
        "columns": dict(reading.columns),
        "verdicts": monitor.verdicts,
        "report": monitor.report(),
        "writes": reading.writes,
        "shapes": {s.name: (s.shape, s.fan_in) for s in profile.segments},
    }


def clear_key_gradients(model: Any) -> list[float]:
    """Give the keys' bias the gradient that it has in exact arithmetic, which is 0.

    The bias adds one number to all scores of a query, and softmax does not change. What autograd returns is rounding: the
    norm of the keys' gradient, divided by that of the queries' gradient, is 3e-16 in float64, 1e-7 in float32 and 2e-3 in
    bfloat16. Adam divides a gradient by its own size, so the keys' bias would take steps as large as the queries' bias, with
    other signs in every layout.

    Returns:
        A list. Every backward pass adds the norm of the keys' gradient in the part that this process has, divided by that of
        the queries' gradient.
    """
    found: list[float] = []
    for name, p in unwrapped(model).named_parameters():
        if name.endswith("linear_qkv.bias"):

            def clear(grad: torch.Tensor) -> torch.Tensor:
                queries, keys, values = grad.view(-1, 3, training.HIDDEN // training.HEADS).unbind(1)
                found.append(float(keys.double().norm() / queries.double().norm()))
                return torch.stack([queries, torch.zeros_like(keys), values], 1).flatten()

            p.register_hook(clear)
    return found


def resume(case: Case, folder: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The last readings of a run, and of a run that went on from its checkpoint with another model, optimizer and monitor."""
    from lwadamw.engines.megatron import attach

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
