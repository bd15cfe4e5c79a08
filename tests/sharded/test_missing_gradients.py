"""A parameter may have a gradient on some of the processes that hold it, as an expert that got no token on the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import lwadamw

from . import models
from .processes import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")
BACKENDS = ("torch", "triton")
CLIP = 0.3
# For each step, the parameters that have a gradient on the first process and on the second.
STEPS = [("ab", ""), ("abw", "bw"), ("bw", "abw"), ("", "")]


def _some_gradients(world):
    mesh, rank, said = init_device_mesh("cpu", (world,)), dist.get_rank(), []
    for backend in BACKENDS:
        torch.manual_seed(0)
        shapes = {"a": (4, 6), "never": (3, 2), "b": (5, 3)}
        params = {n: nn.Parameter(distribute_tensor(torch.randn(s), mesh, [Shard(0)])) for n, s in shapes.items()}
        params["w"] = nn.Parameter(torch.randn(7))
        params["a"].data.mul_(3.0)
        optimizer = lwadamw.AdamW(params.items(), backend=backend, max_grad_norm=CLIP, **models.OPTIONS)
        monitor = lwadamw.Monitor(optimizer, every=1, spectrum_every=1)
        stepped: set[str] = set()
        for step, given in enumerate(STEPS):
            before = {n: models.whole(p) for n, p in params.items()}
            squares = dict.fromkeys(params, 0.0)
            for n, p in params.items():
                p.grad = torch.full_like(p, 1.0 + step) if n in given[rank] else None
                for process in range(world):
                    rows = before[n].chunk(world)[process] if n != "w" else before[n]
                    squares[n] += rows.numel() * (1.0 + step) ** 2 * (n in given[process]) / (world if n == "w" else 1)
            stepped |= set("".join(given))
            optimizer.step()
            total = sum(squares.values()) ** 0.5
            assert float(optimizer.grad_norm) == pytest.approx(total, rel=1e-6), (backend, step)
            norms = optimizer.norms()
            assert norms.names == tuple(n for n in params if n in stepped) == monitor.latest.names
            for n, weight, update, grad in zip(norms.names, norms.weight, norms.update, norms.grad, strict=True):
                after = models.whole(params[n])
                assert weight == pytest.approx(float(after.double().norm()), rel=1e-6), (backend, step, n)
                assert update == pytest.approx(float((after - before[n]).double().norm()), rel=1e-4), (backend, step, n)
                assert grad == pytest.approx(squares[n] ** 0.5 * min(1.0, CLIP / (total + 1e-6)), rel=1e-5), (step, n)
            said.append((float(optimizer.grad_norm), [c.tolist() for c in (norms.weight, norms.update, norms.grad)]))
            top = dict(zip(monitor.latest.names, monitor.latest.columns["top"], strict=True))
            for n in stepped - {"w"}:
                assert top[n] == pytest.approx(float(torch.linalg.svdvals(models.whole(params[n]))[0]), rel=1e-2)
        params["a"].grad = torch.full_like(params["a"], float("inf")) if rank == 0 else None
        optimizer.step()
        assert int(optimizer.skipped_steps) == 1
        assert models.whole(params["a"]).isfinite().all()
    return said


def test_norms_and_clipping_are_those_of_the_whole_if_a_gradient_is_on_some_processes_only():
    first, second = run(2, _some_gradients, 2)
    assert len(first) == len(STEPS) * len(BACKENDS)
    np.testing.assert_equal(first, second)
