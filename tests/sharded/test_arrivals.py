"""Gradients that are placed otherwise than their parameter, or still on their way, are those of the whole, in every storage."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import _functional_collectives as collectives
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

import lwadamw
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.members import local

from . import models
from .processes import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")
BACKENDS = ("torch", "triton")
# torch 2.13 has given it another name.
_SCATTER = getattr(collectives, "reduce_scatter_single", None) or collectives.reduce_scatter_tensor
SMALL, LARGE = (6, 8), (16, 256)  # moments of the large one, and of its halves, can be kept in 8 bits


def _given(p, grad, mesh, kind):
    """Return a gradient in one of the forms in which autograd and collectives leave it. Halves add up exactly."""
    world = mesh.size()
    if kind == "partial":
        return DTensor.from_local(grad / world, mesh, [Partial()])
    if kind == "on its way":
        if not isinstance(p, DTensor) or p.placements == (Replicate(),):
            held = collectives.all_reduce(grad / world, "sum", dist.group.WORLD)
        else:
            held = _SCATTER(grad / world, "sum", p.placements[0].dim, dist.group.WORLD)
        assert isinstance(held, collectives.AsyncCollectiveTensor)
        return DTensor(held, p._spec, requires_grad=False) if isinstance(p, DTensor) else held
    return distribute_tensor(grad, mesh, [kind])


def _alike(p):
    """Raise unless every process has the same bits."""
    held = local(p).detach().float().contiguous()
    others = [torch.empty_like(held) for _ in range(dist.get_world_size())]
    dist.all_gather(others, held)
    return all(torch.equal(other, held) for other in others)


def _stored(world, names):
    mesh = init_device_mesh("cpu", (world,))
    cases = [(None, "on its way")]
    cases += [
        (placement, kind)
        for placement in (Shard(0), Shard(1), Replicate())
        for kind in (Shard(0), Shard(1), Replicate(), "partial", "on its way")
    ]
    for name in names:
        kept = COMBINATIONS[name]
        torch.manual_seed(0)
        shape = LARGE if "8-bit" in name else SMALL
        weight = torch.randn(shape).to(kept.param)
        grads = [torch.randn(shape).to(kept.grad) for _ in range(2)]
        for backend in BACKENDS:
            params = [
                nn.Parameter(
                    weight.clone() if placement is None else distribute_tensor(weight.clone(), mesh, [placement])
                )
                for placement, _ in cases
            ]
            whole, plain = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
            ours = lwadamw.AdamW(params, backend=backend, **models.OPTIONS, **kept.options)
            theirs = lwadamw.AdamW([whole], backend=backend, **models.OPTIONS, **kept.options)
            torchs = torch.optim.AdamW([plain], **models.OPTIONS)
            for grad in grads:
                for p, (_, kind) in zip(params, cases, strict=True):
                    p.grad = _given(p, grad, mesh, kind)
                whole.grad, plain.grad = grad.clone(), grad.clone()
                for optimizer in (ours, theirs, torchs):
                    optimizer.step()
            for p, case in zip(params, cases, strict=True):
                found = models.whole(p)
                if (name, backend) == ("fp32", "torch"):  # another kernel of torch's takes whole tensors
                    torch.testing.assert_close(found, whole.detach(), rtol=1e-6, atol=1e-7)
                else:
                    assert torch.equal(found, whole.detach()), (name, backend, case)
                assert case[0] not in (None, Replicate()) or _alike(p), (name, backend, case)
                if name == "fp32":
                    torch.testing.assert_close(found, plain.detach(), rtol=1e-6, atol=1e-7)
            found, expected = ours.norms(), theirs.norms()
            for column in ("weight", "update", "grad"):
                wanted = np.repeat(getattr(expected, column), len(cases))
                np.testing.assert_allclose(getattr(found, column), wanted, rtol=1e-6)
    return True


def _of_another_optimizer(world):
    """A monitor reads gradients of an optimizer that does not bring them to the placement of their parameter."""
    mesh = init_device_mesh("cpu", (world,))
    grad = torch.arange(24.0).view(4, 6)
    for placement in (Replicate(), Shard(0)):
        w = nn.Parameter(distribute_tensor(torch.ones(4, 6), mesh, [placement]))
        v = nn.Parameter(torch.ones(3))
        ours, other = lwadamw.AdamW([("v", v)]), torch.optim.SGD([("w", w)], lr=0.1)
        monitor = lwadamw.Monitor(ours, every=1, spectrum_every=0, others=[other])
        for kind in ("partial", "on its way", Replicate(), Shard(1)):
            # The parts of a sum differ from process to process.
            given = _given(w, grad, mesh, kind)
            if kind == "partial":
                given = DTensor.from_local(grad / world + dist.get_rank() - (world - 1) / 2, mesh, [Partial()])
            w.grad, v.grad = given, torch.ones(3)
            other.step()
            ours.step()
            norms = monitor.latest.norms
            assert norms.grad[norms.names.index("w")] == pytest.approx(float(grad.norm()), rel=1e-6), (placement, kind)
            assert w.grad is given
    return True


def test_a_monitor_reads_gradients_of_another_optimizer_as_those_of_the_whole():
    assert run(2, _of_another_optimizer, 2) == [True] * 2


SOME = ["fp32", "bf16, stochastic"]


@pytest.mark.parametrize(
    "names", [SOME, pytest.param([n for n in COMBINATIONS if n not in SOME], marks=pytest.mark.matrix)], ids=len
)
def test_gradients_placed_otherwise_or_on_their_way_equal_those_of_the_whole(names):
    assert run(2, _stored, 2, names, seconds=400) == [True] * 2
