"""A few steps for users of pytest-benchmark: `pytest bench/ --benchmark-only`. The sizes are small without a GPU.

One call is one step. On a GPU the call ends when the device has finished the step. So it includes a wait that bench.step does
not have.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark")

import lwadamw
from bench import peers
from bench.workloads import PER_TENSOR, WORKLOADS, make_params

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
LISTS = (
    [("gpt2_124m", 1), ("vit_465", PER_TENSOR), ("many_small", 1)]
    if CUDA
    else [("cpu_30m", 1), ("cpu_30m", PER_TENSOR)]
)
OPTIMIZERS: dict[str, Callable[[peers.Field], Callable[[], object]]] = {
    "lwadamw": lambda field: peers.ours(field, lwadamw, None)["lwadamw"].step,
    "lwadamw_clipping": lambda field: peers.ours(field, lwadamw, None)["lwadamw, clipping"].step,
    "torch_fused": lambda field: peers.peers(field, ["fused"])[0][peers.FUSED].step,
    "torch_foreach": lambda field: peers.peers(field, ["foreach"])[0]["torch foreach"].step,
}


@pytest.fixture(scope="module", params=LISTS, ids=[f"{name}-{n or 'per_tensor'}" for name, n in LISTS])
def workload(request: pytest.FixtureRequest) -> Iterator[peers.Field]:
    """The parameters of one workload, with gradients."""
    name, groups = request.param
    chosen = WORKLOADS[name]
    if not CUDA:
        chosen = chosen.shrunk(tensors=40, length=256)
    yield peers.Field(make_params(chosen, DEVICE), chosen.counts(groups)[0])
    gc.collect()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_step(benchmark: Any, workload: peers.Field, optimizer: str) -> None:
    """Time the step of one optimizer."""
    take = OPTIMIZERS[optimizer](workload)

    def step() -> None:
        take()
        if CUDA:
            torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=30, iterations=1, warmup_rounds=3)
    benchmark.extra_info.update(tensors=len(workload.params), groups=workload.n_groups)
