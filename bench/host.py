"""What step() costs the host: lwadamw against torch fused, by number of parameter groups.

    python -m bench.host                            # 500 tensors in 1, 28 and 500 groups
    python -m bench.host --tensors 400 --groups 1 28 --json host.json
    python -m bench.host --base HEAD~1              # and the package as it was then
    python -m bench.host --cold                     # 128 MB written before every step, as forward and backward would

Tensors have 4 elements, so that the device has next to nothing to do. Gradients are other tensors at every step. Every
contestant takes 10 steps at a time in turn, in another order each round, each step timed by the clock; figures are quantiles
over all its steps.

With launches stubbed, both optimizers run the whole of their Python and launch nothing. Of torch fused the operator
`_fused_adamw_` is stubbed; in a second row also the operator that advances the steps, which on a GPU is a launch too (on
the CPU it adds to tensors one by one). lwadamw is timed as a plain loop leaves it, with norms off, with clipping, with every
learning rate assigned before every step, and after somebody has read `optimizer.state`, from when on it verifies every
moment at every step.

On a GPU also with real launches, the device idle before every step so that no queue is full, and as the replay of a CUDA
graph that holds the step.

    x       torch fused's median over this one's: stubbed rows over "torch fused", launched rows over "torch fused, launched"
"""

from __future__ import annotations

import argparse
import gc
import importlib
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from bench import harness, revision
from bench.workloads import make_groups

FUSED = "torch fused"
LAUNCHED = f"{FUSED}, launched"
STEPS = 10
NUMEL = 4
COLD_BYTES = 2**27
# Variants of lwadamw: what is added to its name, and its options.
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    ", norms off": {"norms": False},
    ", clipping": {"max_grad_norm": 1.0},
    ", lr scheduled": {},
    ", state shared": {},
}


class _Stub:
    """Stands for a kernel, and for what launching one returns."""

    def __init__(self, kernel: Any) -> None:
        self.arg_names = kernel.arg_names

    def __getitem__(self, grid: object) -> Callable[..., _Stub]:
        return lambda *args, **kwargs: self


def stubbed_kernels(package: str = "lwadamw") -> Any:
    """While this lasts, plans of the package are made with kernels that do nothing."""
    kernels = importlib.import_module(f"{package}.kernels")
    names = [name for name in vars(kernels) if name.endswith("_kernel")]
    return mock.patch.multiple(kernels, **{name: _Stub(getattr(kernels, name)) for name in names})


def nothing(*args: object, **kwargs: object) -> None:
    return None


@dataclass
class Contestant:
    optimizer: torch.optim.Optimizer
    call: Callable[[], object]
    stubs: Callable[[], AbstractContextManager[object]] = nullcontext  # entered around its turns
    schedules: bool = False
    moves: bool = True  # gets other gradients before every step


def _step(make: Callable[..., torch.optim.Optimizer], tensors: int, n_groups: int, device: torch.device) -> Contestant:
    params = [torch.nn.Parameter(torch.zeros(NUMEL, device=device)) for _ in range(tensors)]
    optimizer = make(make_groups(params, n_groups, lr=1e-3))
    return Contestant(optimizer, optimizer.step)


def stubbed(package: ModuleType, label: str, build: Callable[..., Contestant]) -> dict[str, Contestant]:
    """Variants of lwadamw whose kernels do nothing."""
    out = {}
    for name, options in VARIANTS.items():
        contestant = build(partial(package.AdamW, backend="triton", **options))
        contestant.stubs = partial(stubbed_kernels, package.__name__)
        contestant.schedules = "scheduled" in name
        out[label + name] = contestant
    return out


def _stub_fused(steps_too: bool) -> AbstractContextManager[object]:
    stack = ExitStack()
    stack.enter_context(mock.patch("torch._fused_adamw_", nothing))
    if steps_too:
        stack.enter_context(mock.patch("torch._foreach_add_", nothing))
    return stack


def launched(package: ModuleType, label: str, build: Callable[..., Contestant]) -> dict[str, Contestant]:
    """Variants of lwadamw that launch for real."""
    variants = {", launched": {}, ", clipping, launched": {"max_grad_norm": 1.0}}
    return {label + name: build(partial(package.AdamW, **options)) for name, options in variants.items()}


def captured(make: Callable[..., torch.optim.Optimizer], build: Callable[..., Contestant]) -> Contestant:
    """The replay of a CUDA graph of one step, gradients where they are."""
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
    """Seconds of every single step by name; `cold`: with nothing of it left in the CPU's caches."""
    elsewhere = torch.zeros(COLD_BYTES // 8 if cold else 0, dtype=torch.float64)
    times: dict[str, list[float]] = {name: [] for name in contestants}
    params = {name: [p for g in c.optimizer.param_groups for p in g["params"]] for name, c in contestants.items()}
    moving = [[torch.zeros(NUMEL, device=device) for _ in next(iter(params.values()))] for _ in range(3)]
    gc.collect()
    gc.disable()
    try:
        for round_ in range(rounds):
            for name in harness.shuffled(contestants, round_):
                contestant = contestants[name]
                with contestant.stubs():
                    for i in range(STEPS):
                        _prepare(contestant, params[name], moving[i % 3])
                        if device.type == "cuda":
                            torch.cuda.synchronize()
                        elsewhere += 1
                        start = time.perf_counter()
                        contestant.call()
                        times[name].append(time.perf_counter() - start)
    finally:
        gc.enable()
    return times


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
    """Rows of one number of groups: microseconds by contestant, and the reason of each that is missing."""
    import lwadamw

    build = partial(_step, tensors=tensors, n_groups=n_groups, device=device)
    fused = partial(torch.optim.AdamW, fused=True)
    ours = [(lwadamw, "lwadamw"), *([(base[1], f"lwadamw at {base[0]}")] if base else [])]
    contestants, missing = {}, {}
    for name, steps_too in ((FUSED, False), (f"{FUSED}, steps too", True)):
        contestants[name] = build(fused)
        contestants[name].stubs = partial(_stub_fused, steps_too)
    for package, label in ours:
        contestants |= stubbed(package, label, build)
    if device.type == "cuda":
        contestants[LAUNCHED] = build(fused)
        for package, label in ours:
            contestants |= launched(package, label, build)
        graphs = [(fused, FUSED), *((partial(package.AdamW, backend="triton"), label) for package, label in ours)]
        for make, label in graphs:
            try:
                contestants[f"{label}, graph replay"] = captured(make, build)
            except Exception as error:  # a graph that cannot be captured is a finding, not the end of the measurement
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
    return LAUNCHED if LAUNCHED in rows and ("launched" in name or "graph" in name) else FUSED


def table(tensors: int, columns: Sequence[dict[str, Any]]) -> str:
    """Median microseconds and ratio, a column per number of groups."""
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
    """`measure` in every number of groups, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        columns = [
            measure(tensors, n, rounds, device, base, cold) for n in dict.fromkeys(min(n, tensors) for n in groups)
        ]
    finally:
        torch.set_num_threads(threads)
    return {"tensors": tensors, "rounds": rounds, "steps": STEPS, "columns": columns}


def parse() -> argparse.Namespace:
    parser = harness.parser_for(__doc__)
    parser.add_argument("--tensors", type=int, default=500)
    parser.add_argument("--groups", type=int, nargs="+", help="numbers of groups; default: 1, 28 and one per tensor")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--base", metavar="REV", help="also measure this git revision of lwadamw")
    parser.add_argument("--cold", action="store_true", help="empty the caches before every step")
    return parser.parse_args()


def main() -> None:
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
