"""Host time of step(): lwadamw compared with torch fused, for several numbers of parameter groups.

    python -m bench.host                            # 500 tensors in 1, 28 and 500 groups
    python -m bench.host --tensors 400 --groups 1 28 --json host.json
    python -m bench.host --base HEAD~1              # also the package of another revision
    python -m bench.host --cold                     # writes 128 MB before every step, like a forward and backward pass

Each tensor has 4 elements, so the device has almost nothing to do. Every step gets other gradient tensors. The contestants
take turns of 10 steps each, in another order in every round. The clock times each step. The results are quantiles over all
steps of a contestant.

With stubbed launches, both optimizers run all of their Python code and launch nothing. For torch fused, the operator
`_fused_adamw_` is stubbed. A second row also stubs the operator that advances the step counters. On a GPU this operator is a
launch too. On a CPU it adds to the tensors one by one.

The variants of lwadamw are: a plain loop, norms off, clipping, every learning rate assigned before every step, and
`optimizer.state` read once before. After such a read, lwadamw verifies every moment at every step.

Rows with "DTensors" have parameters and gradients as fully_shard makes them, on a device mesh of one process. torch's "fake"
process group pretends to be it.

On a GPU there are also rows with real launches and rows for the replay of a CUDA graph that holds the step. There the device
is idle before every step, so that no queue is full.

    x       median of torch fused / median of this row. Stubbed rows are compared with "torch fused", launched rows with
            "torch fused, launched".
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any

import torch

from bench import harness, revision
from bench.scale import pretended
from bench.stubs import stubbed_fused, stubbed_kernels
from bench.workloads import make_groups

FUSED = "torch fused"
LAUNCHED = f"{FUSED}, launched"
STEPS = 10
NUMEL = 4
COLD_BYTES = 2**27
# Variants of lwadamw: the ending of the row's name, and the options of the optimizer.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    ", norms off": {"norms": False},
    ", clipping": {"max_grad_norm": 1.0},
    ", lr scheduled": {},
    ", state shared": {},
}


@dataclass
class Contestant:
    """An optimizer whose step is timed.

    Attributes:
        optimizer: the optimizer.
        call: the function that is timed.
        stubs: makes the context that is active during the turns of this contestant.
        schedules: whether every learning rate is assigned before every step.
        moves: whether every step gets other gradient tensors.
        wrap: makes the gradient of a parameter from a tensor.
    """

    optimizer: torch.optim.Optimizer
    call: Callable[[], object]
    stubs: Callable[[], AbstractContextManager[object]] = nullcontext
    schedules: bool = False
    moves: bool = True
    wrap: Callable[[Any, torch.Tensor], torch.Tensor] | None = None


def _step(make: Callable[..., torch.optim.Optimizer], tensors: int, n_groups: int, device: torch.device) -> Contestant:
    params = [torch.nn.Parameter(torch.zeros(NUMEL, device=device)) for _ in range(tensors)]
    optimizer = make(make_groups(params, n_groups, lr=1e-3))
    return Contestant(optimizer, optimizer.step)


def _sharded_step(
    make: Callable[..., torch.optim.Optimizer], tensors: int, n_groups: int, device: torch.device
) -> Contestant:
    """A contestant whose parameters are DTensors. The default process group has to exist."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh(device.type, (1,))
    held = [torch.zeros(NUMEL, device=device) for _ in range(tensors)]
    params = [torch.nn.Parameter(DTensor.from_local(t, mesh, [Shard(0)])) for t in held]
    optimizer = make(make_groups(params, n_groups, lr=1e-3))
    # fully_shard gives every gradient the spec of its parameter.
    return Contestant(optimizer, optimizer.step, wrap=lambda p, t: DTensor(t, p._spec, requires_grad=False))


def stubbed(package: ModuleType, label: str, build: Callable[..., Contestant]) -> dict[str, Contestant]:
    """The variants of lwadamw, with kernels that do nothing.

    Args:
        package: the package to measure.
        label: name of the package in the table.
        build: makes a contestant from a function that makes an optimizer.
    """
    out = {}
    for name, options in VARIANTS.items():
        contestant = build(partial(package.AdamW, backend="triton", **options))
        contestant.stubs = partial(stubbed_kernels, package.__name__)
        contestant.schedules = "scheduled" in name
        out[label + name] = contestant
    return out


def launched(package: ModuleType, label: str, build: Callable[..., Contestant]) -> dict[str, Contestant]:
    """The variants of lwadamw with real launches; arguments as in `stubbed`."""
    variants = {", launched": {}, ", clipping, launched": {"max_grad_norm": 1.0}}
    return {label + name: build(partial(package.AdamW, **options)) for name, options in variants.items()}


def captured(make: Callable[..., torch.optim.Optimizer], build: Callable[..., Contestant]) -> Contestant:
    """A contestant that replays a CUDA graph of one step. The gradients stay in place."""
    contestant = build(partial(make, capturable=True))
    for group in contestant.optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        contestant.optimizer.step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        contestant.optimizer.step()
    contestant.call, contestant.moves = graph.replay, False
    return contestant


def take_turns(
    contestants: dict[str, Contestant], rounds: int, device: torch.device, cold: bool = False
) -> dict[str, list[float]]:
    """Time every single step of all contestants.

    Args:
        contestants: the contestants, by name.
        rounds: number of rounds of STEPS steps each.
        device: the device of the parameters.
        cold: write 128 MB before every step, so that the caches of the CPU hold no data of the optimizer.

    Returns:
        Seconds of every step, by name.
    """
    elsewhere = torch.zeros(COLD_BYTES // 8 if cold else 0, dtype=torch.float64)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    params = {name: [p for g in c.optimizer.param_groups for p in g["params"]] for name, c in contestants.items()}
    moving = {name: [_gradients(c, params[name], device) for _ in range(3)] for name, c in contestants.items()}
    gc.collect()
    gc.disable()
    try:
        for round_ in range(rounds):
            for name in harness.shuffled(contestants, round_):
                contestant = contestants[name]
                with contestant.stubs():
                    for i in range(STEPS):
                        _prepare(contestant, params[name], moving[name][i % 3])
                        if device.type == "cuda":
                            torch.cuda.synchronize()
                        elsewhere += 1
                        start = time.perf_counter()
                        contestant.call()
                        times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times


def _gradients(contestant: Contestant, params: Sequence[Any], device: torch.device) -> list[torch.Tensor]:
    # A backward pass makes the gradients in the order of the model, which is not the order of the groups.
    grads = {}
    for p in sorted(params, key=id):
        plain = torch.zeros(NUMEL, device=device)
        grads[p] = plain if contestant.wrap is None else contestant.wrap(p, plain)
    return [grads[p] for p in params]


def _prepare(contestant: Contestant, params: Sequence[torch.Tensor], grads: Sequence[torch.Tensor]) -> None:
    if contestant.moves:
        for p, grad in zip(params, grads, strict=True):
            p.grad = grad
    if contestant.schedules:
        for group in contestant.optimizer.param_groups:
            group["lr"] *= 0.999


def measure(
    tensors: int,
    n_groups: int,
    rounds: int,
    device: torch.device,
    base: tuple[str, ModuleType] | None = None,
    cold: bool = False,
) -> dict[str, Any]:
    """Measure one number of groups. The default process group has to exist.

    Args:
        tensors: number of tensors.
        n_groups: number of parameter groups.
        rounds: number of rounds.
        device: the device of the parameters.
        base: name and package of another revision to measure too.
        cold: see `take_turns`.

    Returns:
        The number of groups, quantiles in microseconds by contestant, and the reason for each contestant that is missing.
    """
    import lwadamw

    build = partial(_step, tensors=tensors, n_groups=n_groups, device=device)
    fused = partial(torch.optim.AdamW, fused=True)
    ours = [(lwadamw, "lwadamw"), *([(base[1], f"lwadamw at {base[0]}")] if base else [])]
    contestants, missing = {}, {}
    for name, steps_too in ((FUSED, False), (f"{FUSED}, steps too", True)):
        contestants[name] = build(fused)
        contestants[name].stubs = partial(stubbed_fused, steps_too)
    for package, label in ours:
        contestants |= stubbed(package, label, build)
    sharded = partial(_sharded_step, tensors=tensors, n_groups=n_groups, device=device)
    contestants[f"{FUSED}, DTensors"] = sharded(fused)
    contestants[f"{FUSED}, DTensors"].stubs = partial(stubbed_fused, False)
    contestants["lwadamw, DTensors"] = sharded(partial(lwadamw.AdamW, backend="triton"))
    contestants["lwadamw, DTensors"].stubs = stubbed_kernels
    if device.type == "cuda":
        contestants[LAUNCHED] = build(fused)
        for package, label in ours:
            contestants |= launched(package, label, build)
        graphs = [(fused, FUSED), *((partial(package.AdamW, backend="triton"), label) for package, label in ours)]
        for make, label in graphs:
            try:
                contestants[f"{label}, graph replay"] = captured(make, build)
            except Exception as error:  # If a graph cannot be captured, report it and go on.
                missing[f"{label}, graph replay"] = f"{type(error).__name__}: {error}"
                torch.cuda.synchronize()
    take_turns(contestants, 1, device)
    for name, contestant in contestants.items():
        if "state shared" in name:
            contestant.optimizer.state_dict()
    times = take_turns(contestants, rounds, device, cold)
    return {
        "groups": n_groups,
        "us": {name: {k: v * 1e6 for k, v in harness.quantiles(t).items()} for name, t in times.items()},
        "missing": missing,
    }


def reference(name: str, rows: dict[str, Any]) -> str:
    """Name of the row that a row is compared with."""
    return LAUNCHED if LAUNCHED in rows and ("launched" in name or "graph" in name) else FUSED


def table(tensors: int, columns: Sequence[dict[str, Any]]) -> str:
    """A table of median microseconds and ratios, with a column for each number of groups."""
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column["us"]):
        cells = []
        for us in (column["us"] for column in columns):
            if name in us:
                cells.append(f"{us[name]['p50']:.0f} ({us[reference(name, us)]['p50'] / us[name]['p50']:.1f}x)")
            else:
                cells.append("-")
        rows.append([name, *cells])
    header = [f"host time of step(), us, {tensors} tensors"]
    header += [f"{c['groups']} group{'s' * (c['groups'] != 1)}" for c in columns]
    notes = [
        f"without {name} in {c['groups']} groups: {reason}" for c in columns for name, reason in c["missing"].items()
    ]
    return "\n".join([harness.table(header, rows), *notes])


def run(
    tensors: int,
    groups: Sequence[int],
    rounds: int,
    device: torch.device,
    base: tuple[str, ModuleType] | None = None,
    cold: bool = False,
) -> dict[str, Any]:
    """Run `measure` for every number of groups, on one thread. The arguments are those of `measure`."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        counts = dict.fromkeys(min(n, tensors) for n in groups)
        with pretended(1, 0):
            columns = [measure(tensors, n, rounds, device, base, cold) for n in counts]
    finally:
        torch.set_num_threads(threads)
    return {"tensors": tensors, "rounds": rounds, "steps": STEPS, "columns": columns}


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = harness.parser_for(__doc__)
    parser.add_argument("--tensors", type=int, default=500)
    parser.add_argument(
        "--groups", type=int, nargs="+", help="numbers of groups; default: 1, 28 and one group per tensor"
    )
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--base", metavar="REV", help="also measure this git revision of lwadamw")
    parser.add_argument("--cold", action="store_true", help="empty the caches of the CPU before every step")
    return parser.parse_args()


def main() -> None:
    """Measure, print the table and write the JSON file."""
    arguments = parse()
    device = harness.choose_device(arguments.device)
    base = revision.load_or_exit(arguments.base)
    tensors, rounds = (30, 1) if arguments.dry_run else (arguments.tensors, arguments.rounds)
    groups = arguments.groups or (1, 28, tensors)
    record = run(tensors, groups, rounds, device, None if base is None else (arguments.base, base), arguments.cold)
    print(table(tensors, record["columns"]))
    harness.finish(arguments.json, "bench.host", device, record, threads=1)


if __name__ == "__main__":
    main()
