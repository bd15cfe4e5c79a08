"""Peak memory of a step in addition to parameters, gradients and state. The limit is 0.1 % of the parameters plus 1 MB.

    python -m bench.memory                                  # all workloads
    python -m bench.memory --workloads llama_1b --json memory.json

    first       peak over the constructor and the first step, without parameters, gradients and state
    a step      the same over a later step, with gradients at other addresses: bytes that stay allocated plus bytes that
                the step allocates
    of params   the larger of the two, divided by the bytes of the parameters

State is everything that the optimizer keeps per parameter: moments and step counts. In the rows with "norms read", all norms
are read after the step.

On a GPU the numbers come from the statistics of the allocator. They count the requested bytes, so the allocator's rounding of
small tensors does not count.

On a CPU the numbers are the sum of torch's allocations and releases, from its profiler, plus the NumPy arrays that are alive
after the step, from tracemalloc. The tables are made of NumPy arrays. The kernels of lwadamw are stubbed, because a kernel
allocates nothing. So the plan of every workload is made in full size, over parameters, gradients and moments that share one
buffer whose memory is never touched. Pinned host buffers do not count. lwadamw on the torch backend and the peers need real
tensors. They are measured only on the workloads for CPUs.
"""

from __future__ import annotations

import argparse
import gc
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from bench import harness, peers
from bench.stubs import nothing, stubbed_kernels
from bench.workloads import FOR_CPU, WORKLOADS, Workload, make_groups, make_params

LIMIT_SHARE, LIMIT_BYTES = 1e-3, 10**6
Optimizer = torch.optim.Optimizer
Step = Callable[[Any], object]


@dataclass
class Usage:
    """Bytes that were allocated in a context.

    Attributes:
        peak: largest number of allocated bytes, above the number at the start.
        left: bytes that are still allocated at the end.
    """

    peak: int = 0
    left: int = 0


@contextmanager
def cuda_usage(device: torch.device) -> Iterator[Usage]:
    """Count the bytes that torch allocates on a GPU in this context."""
    usage = Usage()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_stats(device)["requested_bytes.all.current"]
    yield usage
    torch.cuda.synchronize(device)
    stats = torch.cuda.memory_stats(device)
    usage.peak = stats["requested_bytes.all.peak"] - before
    usage.left = stats["requested_bytes.all.current"] - before


@contextmanager
def cpu_usage() -> Iterator[Usage]:
    """Count the bytes that torch and NumPy allocate on the CPU in this context."""
    usage = Usage()
    domain = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
    activities = [torch.profiler.ProfilerActivity.CPU]
    gc.collect()  # tensors of before that are freed in this context would count as released
    tracemalloc.start()
    try:
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            yield usage
        arrays = tracemalloc.take_snapshot().filter_traces([domain])
    finally:
        tracemalloc.stop()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    in_arrays = sum(trace.size for trace in arrays.traces)
    usage.left = sum(changes) + in_arrays
    usage.peak = max([0, *np.cumsum(changes).tolist()]) + in_arrays


def usage_on(device: torch.device) -> Any:
    """The context that counts bytes on a device."""
    return cuda_usage(device) if device.type == "cuda" else cpu_usage()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages of all tensors. A storage that several tensors share counts once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    """All tensors in the state of an optimizer."""
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


def measure_optimizer(
    params: Sequence[Tensor],
    make: Callable[[], Optimizer],
    step: Step,
    *,
    moments: Sequence[dict[str, Tensor]] | None = None,
    move: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Measure the memory of the first step and of a later step, in addition to parameters, gradients and state.

    Args:
        params: the parameters of the optimizer.
        make: makes the optimizer.
        step: takes one step.
        moments: state that exists already, one dict per parameter, so that the step does not allocate it. None: the step
            creates the state.
        move: puts every gradient at another address.

    Returns:
        Bytes of the first and of the later step, under "first" and "step".
    """
    device = params[0].device
    with _tensors_that_share(moments is not None), usage_on(device) as first:
        optimizer = make()
        if moments is not None:
            vars(optimizer)["state"].update(zip(params, moments, strict=True))
        step(optimizer)
    move()
    with usage_on(device) as later:
        step(optimizer)
    given = {id(t) for state in moments or () for t in state.values()}
    state = storage_bytes(t for t in state_tensors(optimizer) if id(t) not in given)
    return {"first": first.peak - state, "step": first.left - state + later.peak}


def _tensors_that_share(given: bool) -> AbstractContextManager[object]:
    """A context in which the kernels' tensors may share memory, as those of `untouched` do."""
    if not given:
        return nullcontext()
    from lwadamw.tables import triton_backend

    return mock.patch.object(triton_backend, "check_apart", nothing)


def plain(optimizer: Any) -> None:
    """Take a step."""
    optimizer.step()


def with_norms(optimizer: Any) -> None:
    """Take a step and read all norms."""
    optimizer.step()
    optimizer.norm_sums()


def ours(backend: str | None) -> dict[str, tuple[Callable[..., Optimizer], Step]]:
    """The variants of lwadamw.

    Args:
        backend: the backend of lwadamw; None: the default.

    Returns:
        By name, a function that makes the optimizer from groups, and a function that takes its step.
    """
    import lwadamw

    make = partial(lwadamw.AdamW, backend=backend)
    clipping = partial(make, max_grad_norm=1.0)
    label = "lwadamw" + (f", {backend} backend" if backend == "torch" else "")
    return {
        label: (make, plain),
        f"{label}, norms read": (make, with_norms),
        f"{label}, clipping": (clipping, plain),
        f"{label}, clipping, norms read": (clipping, with_norms),
    }


def torch_peers(params: Sequence[Tensor]) -> dict[str, tuple[Callable[..., Optimizer], Step]]:
    """The optimizers of torch, in the form that `ours` returns."""
    fused, foreach = (partial(torch.optim.AdamW, **{how: True}) for how in ("fused", "foreach"))
    return {
        peers.FUSED: (fused, plain),
        "torch foreach": (foreach, plain),
        "usual way: clip_grad_norm_, fused, norms": (fused, lambda optimizer: peers.usual_way(params, optimizer)),
    }


def untouched(workload: Workload) -> tuple[list[Parameter], list[dict[str, Tensor]], Callable[[], None]]:
    """Make parameters of a workload that need almost no real memory.

    All tensors are views of one buffer that nobody has written, so the operating system provides no pages for it.

    Returns:
        Parameters with gradients, their moments (one dict per parameter), and a function that moves the gradients.
    """
    longest = max(torch.Size(shape).numel() for shape in workload.shapes)
    buffer = torch.empty(longest + 16)

    def views(offset: int = 0) -> list[Tensor]:
        return [buffer[offset : offset + torch.Size(shape).numel()].view(shape) for shape in workload.shapes]

    params = [Parameter(view) for view in views()]
    elsewhere = views(16)

    def place(grads: Sequence[Tensor]) -> None:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad

    place(views())
    moments = [{"exp_avg": m, "exp_avg_sq": v} for m, v in zip(views(), views(), strict=True)]
    return params, moments, lambda: place(elsewhere)


def measure(workload: Workload, device: torch.device) -> dict[str, Any]:
    """Measure every contestant on one workload, with the last number of groups of the workload."""
    n_groups = workload.counts()[-1]
    rows: dict[str, dict[str, int]] = {}
    if device.type == "cpu":
        params, moments, move = untouched(workload)
        for name, (make, step) in ours("triton").items():
            with stubbed_kernels():
                build = partial(make, make_groups(params, n_groups))
                given = [dict(m) for m in moments]
                rows[name] = measure_optimizer(params, build, step, moments=given, move=move)
    if device.type == "cuda" or workload.name in FOR_CPU:
        params = make_params(workload, device)
        contestants = {**ours("torch" if device.type == "cpu" else None), **torch_peers(params)}
        for name, (make, step) in contestants.items():
            rows[name] = measure_optimizer(params, partial(make, make_groups(params, n_groups)), step)
            gc.collect()
    size = 4 * workload.elements
    limit = int(LIMIT_SHARE * size + LIMIT_BYTES)
    judged = {
        name: {**row, "of_params": max(row.values()) / size, "within": max(row.values()) <= limit}
        for name, row in rows.items()
    }
    facts = {"workload": workload.name, "tensors": len(workload.shapes), "groups": n_groups, "params_bytes": size}
    return {**facts, "limit": limit, "rows": judged}


def run(names: Sequence[str], device: torch.device, *, dry: bool = False) -> list[dict[str, Any]]:
    """Run `measure` on workloads by name, in small sizes if `dry` is set."""
    # The first calls import modules. Their memory must not count, and imports are slow while tracemalloc is active.
    warm_up = WORKLOADS[FOR_CPU[0]].shrunk(2, 4)
    torch.optim.AdamW(make_params(warm_up, device)).step()
    measure(warm_up, device)
    results = []
    for name in names:
        results.append(measure(WORKLOADS[name].shrunk() if dry else WORKLOADS[name], device))
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return results


def table(results: Sequence[dict[str, Any]]) -> str:
    """A table with a row for each workload and contestant."""
    rows = []
    for result in results:
        groups = f"{result['groups']} group{'s' * (result['groups'] != 1)}"
        title = f"{result['workload']}, {result['params_bytes'] / 1e6:,.1f} MB, {groups}"
        for name, row in result["rows"].items():
            figures = [f"{row['first']:,}", f"{row['step']:,}", f"{row['of_params']:.3%}", f"{result['limit']:,}"]
            rows.append([title, name, *figures, "within" if row["within"] else "OVER"])
            title = ""
    header = ["bytes beyond parameters, gradients, state", "", "first", "a step", "of params", "limit", ""]
    return harness.table(header, rows, left=2)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = harness.parser_for(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    return parser.parse_args()


def main() -> None:
    """Measure, print the table and write the JSON file."""
    arguments = parse()
    device = harness.choose_device(arguments.device)
    results = run(arguments.workloads, device, dry=arguments.dry_run)
    print(table(results))
    harness.finish(arguments.json, "bench.memory", device, {"results": results})


if __name__ == "__main__":
    main()
