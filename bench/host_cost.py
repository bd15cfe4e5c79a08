"""What step() costs the host, kernel launches stubbed: lwadamw against torch fused, by number of parameter groups.

    python -m bench.host_cost                       # 400 tensors
    python -m bench.host_cost --tensors 500 --json results.json

Both optimizers run the whole of their Python with gradients that are new tensors at every step. Of torch fused the
operator `_fused_adamw_` is stubbed, and in a second column also the operator that advances the steps, which on a GPU
is a launch too (here it adds to CPU tensors one by one). lwadamw is timed as a plain loop leaves it, with every learning
rate assigned before every step, and after somebody has read `optimizer.state`, from when on it verifies every moment at
every step.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_INTERPRET", "1")

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton

import lwadamw.plan
from lwadamw import AdamW

FUSED = "torch fused"


class _NoLaunch:
    def __getitem__(self, grid: object) -> Callable[..., None]:
        return lambda *args, **kwargs: None


def stubbed_kernels() -> Any:
    names = ("coefficients_kernel", "adamw_kernel", "grad_norm_kernel", "total_kernel")
    return mock.patch.multiple(lwadamw.plan.kernels, **{name: _NoLaunch() for name in names})


def nothing(*args: object, **kwargs: object) -> None:
    return None


def make_groups(params: Sequence[torch.Tensor], n_groups: int) -> list[dict[str, Any]]:
    """28 distinct learning rates at most, as layerwise decay gives."""
    return [{"params": list(params[i::n_groups]), "lr": 1e-3 * (1 + i % 28)} for i in range(n_groups)]


def median_us(optimizers: dict[str, torch.optim.Optimizer], rounds: int) -> dict[str, float]:
    """Median time of each optimizer's step in microseconds: 10 steps at a time in turn, so that all see the same machine."""
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    params = {name: [p for g in o.param_groups for p in g["params"]] for name, o in optimizers.items()}
    moving = [[torch.zeros(4) for _ in next(iter(params.values()))] for _ in range(3)]
    gc.disable()
    for _ in range(rounds):
        for name, optimizer in optimizers.items():
            for i in range(10):
                for p, grad in zip(params[name], moving[i % 3], strict=True):
                    p.grad = grad
                if name == "lr scheduled":
                    for group in optimizer.param_groups:
                        group["lr"] *= 0.999
                start = time.perf_counter()
                optimizer.step()
                times[name].append(time.perf_counter() - start)
    gc.enable()
    return {name: statistics.median(t) * 1e6 for name, t in times.items()}


def measure(tensors: int, n_groups: int, rounds: int) -> dict[str, float]:
    def build(make: Callable[[list[dict[str, Any]]], torch.optim.Optimizer]) -> torch.optim.Optimizer:
        return make(make_groups([torch.nn.Parameter(torch.zeros(4)) for _ in range(tensors)], n_groups))

    def fused(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, fused=True)

    ours = {
        "lwadamw": build(lambda g: AdamW(g, backend="triton")),
        "norms off": build(lambda g: AdamW(g, backend="triton", norms=False)),
        "clipping": build(lambda g: AdamW(g, backend="triton", max_grad_norm=1.0)),
        "lr scheduled": build(lambda g: AdamW(g, backend="triton")),
        "state shared": build(lambda g: AdamW(g, backend="triton")),
    }
    theirs, stubbed_twice = {FUSED: build(fused)}, {"torch fused, steps too": build(fused)}
    with stubbed_kernels(), mock.patch("torch._fused_adamw_", nothing):
        median_us({**theirs, **ours}, 1)
        ours["state shared"].state_dict()
        results = median_us({**theirs, **ours}, rounds)
        with mock.patch("torch._foreach_add_", nothing):
            return results | median_us(stubbed_twice, rounds)


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)

    columns = {n: measure(arguments.tensors, n, arguments.rounds) for n in (1, 28, arguments.tensors)}
    versions = f"torch {torch.__version__}, triton {triton.__version__}, Python {platform.python_version()}"
    print(f"host time of step() in microseconds, launches stubbed, {arguments.tensors} tensors; {versions}")
    print(f"{'':28}" + "".join(f"{n:>9} groups" for n in columns))
    for name in columns[1]:
        cells = [f"{us[name]:.0f} {us[FUSED] / us[name]:6.1f}x" for us in columns.values()]
        print(f"{name:28}" + "".join(f"{cell:>16}" for cell in cells))
    if arguments.json:
        machine = {"versions": versions, "cpu": cpu_name()}
        figures = {str(n): us for n, us in columns.items()}
        record = {"tensors": arguments.tensors, "rounds": arguments.rounds, **machine, "us_by_groups": figures}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
