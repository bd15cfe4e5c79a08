"""attach: norms of whole parameters by the model's names, in every wrapper and parallel layout."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.sharded.processes import run

from . import training
from .training import Case

pytestmark = pytest.mark.engines

CASES = (
    Case("fp32", tp=2),
    Case("bf16", tp=2),
    Case("distributed fp32"),
    Case("distributed fp32", tp=2),
    Case("distributed bf16"),
    Case("aware remainder"),
    Case("distributed fp32", ep=2),
)


def measure(cases: tuple[Case, ...]) -> dict[tuple[Case, str], Any]:
    out: dict[Any, Any] = {}
    for case in cases:
        for backend in ("torch", "triton"):
            with training.layout(case), training.optimizer_of("ours", case, backend=backend):
                out[case, backend] = _measure(case)
    return out


def _measure(case: Case) -> dict[str, tuple[float, float, float, float]]:
    """By name: weight and update norms as the watch has them, and as float64 has them of the gathered parameters."""
    from lwadamw.engines.megatron import attach
    from lwadamw.engines.megatron.overrides import unwrapped

    made = training.build(case, layers=1)
    watch = attach(made.optimizer, [made.model])
    training.train(made, range(2))
    params = dict(unwrapped(made.model).named_parameters())
    before = {name: p.detach().double() for name, p in params.items()}
    training.step(made, 2)
    norms = watch.norms()
    assert norms.names == tuple(params)
    out = {}
    for i, (name, p) in enumerate(params.items()):
        squares = torch.stack([p.detach().double().square().sum(), (p.detach() - before[name]).double().square().sum()])
        if getattr(p, "tensor_model_parallel", False) and case.tp > 1:
            dist.all_reduce(squares)
        out[name] = (norms.weight[i], norms.update[i], *squares.sqrt().tolist())
    return out


@functools.cache
def measured() -> list[dict[tuple[Case, str], Any]]:
    return run(2, measure, CASES, seconds=400)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_norms_are_those_of_the_gathered_parameters_on_every_process(case, backend):
    first, second = (result[case, backend] for result in measured())
    for result in (first, second):
        assert "output_layer.weight" in result
        for weight, update, whole_weight, whole_update in result.values():
            # The float32 main weight of a bfloat16 parameter is up to half a digit of bfloat16 away from it.
            assert weight == pytest.approx(whole_weight, rel=2**-8 if case.half else 1e-5, abs=1e-12)
            if not case.half:
                assert update == pytest.approx(whole_update, rel=1e-5, abs=1e-12)
    shared = [name for name in first if "experts" not in name]
    assert [first[name][:2] for name in shared] == [second[name][:2] for name in shared]
