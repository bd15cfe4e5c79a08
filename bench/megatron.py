"""Host time of the inner optimizer's step() in Megatron's training loop.

    PYTHONPATH=.venv-engines/megatron-core-0.19.2 .venv-engines/bin/python -m bench.megatron --json megatron.json

Real megatron-core trains a tiny GPT of two layers and 29 tensors in one process on the CPU, through the shim of
`tests/engines/megatron`. `make test-engines` makes the environment. Megatron's scheduler assigns learning rate and weight decay
before every step. The clock runs only while Megatron's wrapper calls `step()` of the optimizer inside it, and the shim is
off meanwhile. Contestants take turns of five steps, in another order in every round.

"torch, its choice" is torch.optim.AdamW as Megatron builds it when neither Transformer Engine nor apex is installed: it leaves
`foreach` and `fused` open. For tensors on a CPU torch then takes its loop, and for tensors on a GPU "foreach". Kernels of the
Triton backend are stubbed: all of its Python code runs, and nothing is launched. "State read": somebody has read
`optimizer.state`, as Megatron does when it saves a checkpoint. From then on every step verifies the moments.

The table has 20th percentiles, which other programs on the machine disturb less than medians.

    x       "torch, its choice" / this row
"""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from bench import harness
from bench.stubs import stubbed_kernels
from tests.engines.megatron import shim, training
from tests.engines.megatron.training import Case

TORCH = "torch, its choice"
STEPS = 5
LAYERS = 2
WRAPPERS = ("fp32", "bf16", "distributed fp32", "distributed bf16")
# The flags that the groups of torch's AdamW get, or the options of `use`.
CONTESTANTS: dict[str, dict[str, Any]] = {
    TORCH: {},
    "torch, foreach": {"foreach": True},
    "torch, fused": {"fused": True},
    "lwadamw, torch backend": {"backend": "torch"},
    "lwadamw, kernels stubbed": {"backend": "triton"},
    "lwadamw, torch backend, state read": {"backend": "torch"},
    "lwadamw, kernels stubbed, state read": {"backend": "triton"},
}


class Contestant:
    """A model with an optimizer whose step is timed.

    Args:
        case: Megatron's wrapper.
        name: one of `CONTESTANTS`.
    """

    def __init__(self, case: Case, name: str) -> None:
        options, ours = CONTESTANTS[name], name.startswith("lwadamw")
        self.times: list[float] = []
        self.taken = 0
        self._reads = name.endswith("state read")
        self._stubs: Callable[[], Any] = stubbed_kernels if "stubbed" in name else contextlib.nullcontext
        with training.optimizer_of("ours" if ours else "torch", case, **(options if ours else {})):
            self.run = training.build(case, layers=LAYERS)
        for inner in self.run.inner():
            for group in inner.param_groups if not ours else ():
                group.update(options)
            inner.step = self._timed(inner.step)

    def _timed(self, step: Callable[[], Any]) -> Callable[[], None]:
        def timed() -> None:
            with shim.suspended():
                start = time.perf_counter()
                step()
                self.times.append(time.perf_counter() - start)

        return timed

    def take_turn(self) -> None:
        """Train for a few steps."""
        if self._reads:
            for inner in self.run.inner():
                assert inner.state is not None
        with self._stubs():
            for _ in range(STEPS):
                training.step(self.run, self.taken)
                self.taken += 1

    @property
    def tensors(self) -> int:
        """How many tensors the optimizer updates."""
        return sum(len(group["params"]) for inner in self.run.inner() for group in inner.param_groups)


def measure(wrapper: str, rounds: int) -> dict[str, Any]:
    """Measure one wrapper. The default process group has to exist.

    Args:
        wrapper: as in `Case`.
        rounds: number of rounds; the first one is not counted.

    Returns:
        The wrapper, the number of tensors, and quantiles in microseconds by contestant.
    """
    case = Case(wrapper)
    with training.layout(case):
        contestants = {name: Contestant(case, name) for name in CONTESTANTS}
        for round_ in range(rounds):
            for name in harness.shuffled(contestants, round_):
                contestants[name].take_turn()
    (tensors,) = {contestant.tensors for contestant in contestants.values()}
    us = {
        name: {k: v * 1e6 for k, v in harness.quantiles(contestant.times[STEPS:]).items()}
        for name, contestant in contestants.items()
    }
    return {"wrapper": wrapper, "tensors": tensors, "us": us}


def table(columns: list[dict[str, Any]]) -> str:
    """A table of microseconds and ratios, with a column for each wrapper."""
    rows = []
    for name in CONTESTANTS:
        cells = [
            f"{us[name]['p20']:.0f} ({us[TORCH]['p20'] / us[name]['p20']:.1f}x)" for us in (c["us"] for c in columns)
        ]
        rows.append([name, *cells])
    return harness.table(
        ["host time of step(), us", *(f"{c['wrapper']}, {c['tensors']} tensors" for c in columns)], rows
    )


def main() -> None:
    """Measure, print the table and write the JSON file."""
    arguments = harness.parser_for(__doc__)
    arguments.add_argument("--rounds", type=int, default=20)
    given = arguments.parse_args()
    device = harness.choose_device("cpu")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        shim.install()
        wrappers, rounds = (WRAPPERS[:1], 2) if given.dry_run else (WRAPPERS, given.rounds)
        columns = [measure(wrapper, rounds) for wrapper in wrappers]
        dist.destroy_process_group()
    with shim.suspended():
        print(table(columns))
        version = harness.version_of("megatron.core").partition("+")[0]  # without the commit of this repository
        harness.finish(given.json, "bench.megatron", device, {"megatron-core": version, "columns": columns}, threads=1)


if __name__ == "__main__":
    main()
