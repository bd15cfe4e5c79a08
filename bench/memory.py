"""Peak memory of a step beyond parameters, gradients and state, against the limit: 0.1 % of the parameters plus 1 MB.

    python -m bench.memory                                  # all workloads
    python -m bench.memory --workloads llama_1b --json memory.json

    first       peak over constructor and first step, less parameters, gradients and state
    a step      the same over a later step, with gradients elsewhere: what stays allocated, and what the step adds
    of params   the larger of both over the bytes of the parameters

State is whatever the optimizer keeps per parameter: moments and step counts. "norms read" reads all norms after the step.

On a GPU the allocator's statistics are read, in bytes as requested, so that its rounding of small tensors does not count.

On a CPU, torch's allocations and releases are summed from its profiler; to them come the NumPy arrays that are alive after
the step, which the tables are made of, by tracemalloc. lwadamw's kernels are stubbed, since a kernel allocates nothing;
so every workload's plan is made in full size over parameters, gradients and moments that share one buffer nobody touches.
Pinned host buffers do not count. Where tensors have to be real, lwadamw on the torch backend and the peers, only
workloads for CPUs are measured.
"""

from __future__ import annotations

import argparse
import gc
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from bench import harness, peers
from bench.host import stubbed_kernels
from bench.workloads import FOR_CPU, WORKLOADS, Workload, make_groups, make_params

LIMIT_SHARE, LIMIT_BYTES = 1e-3, 10**6
Optimizer = torch.optim.Optimizer
Step = Callable[[Any], object]


@dataclass
class Usage:
    """Bytes allocated while something ran."""

    peak: int = 0
    left: int = 0


@contextmanager
def cuda_usage(device: torch.device) -> Iterator[Usage]:
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
    usage = Usage()
    domain = tracemalloc.DomainFilter(inclusive=True, domain=np.lib.tracemalloc_domain)
    activities = [torch.profiler.ProfilerActivity.CPU]
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
    return cuda_usage(device) if device.type == "cuda" else cpu_usage()


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of all storages that tensors live in, each counted once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if t.numel()}
    return sum(storages.values())


def state_tensors(optimizer: Optimizer) -> list[Tensor]:
    return [t for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor)]


def measure_optimizer(
    params: Sequence[Tensor],
    make: Callable[[], Optimizer],
    step: Step,
    *,
    moments: Sequence[dict[str, Tensor]] | None = None,
    move: Callable[[], None] = lambda: None,
) -> dict[str, int]:
    """Bytes beyond parameters, gradients and state over the first step and over a later one.

    Args:
        moments: state that is there already, so that it is not allocated while this looks; one dict per parameter.
        move: puts every gradient elsewhere.
    """
    device = params[0].device
    with usage_on(device) as first:
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


def plain(optimizer: Any) -> None:
    optimizer.step()


def with_norms(optimizer: Any) -> None:
    optimizer.step()
    optimizer.norm_sums()


def ours(backend: str | None) -> dict[str, tuple[Callable[..., Optimizer], Step]]:
    """By name: what makes the optimizer out of groups, and its step."""
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
    fused, foreach = (partial(torch.optim.AdamW, **{how: True}) for how in ("fused", "foreach"))
    return {
        peers.FUSED: (fused, plain),
        "torch foreach": (foreach, plain),
        "usual way: clip_grad_norm_, fused, norms": (fused, lambda optimizer: peers.usual_way(params, optimizer)),
    }


def untouched(workload: Workload) -> tuple[list[Parameter], list[dict[str, Tensor]], Callable[[], None]]:
    """Parameters with gradients, their moments, and what moves the gradients: all of one buffer nobody has touched."""
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
    """Bytes of every contestant on one workload, in as many groups as it is ever measured in."""
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
    # What imports and first calls allocate is not any optimizer's; and imports are slow while tracemalloc watches.
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
    parser = harness.parser_for(__doc__)
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    return parser.parse_args()


def main() -> None:
    arguments = parse()
    device = harness.choose_device(arguments.device)
    results = run(arguments.workloads, device, dry=arguments.dry_run)
    print(table(results))
    harness.finish(arguments.json, "bench.memory", device, {"results": results})


if __name__ == "__main__":
    main()
