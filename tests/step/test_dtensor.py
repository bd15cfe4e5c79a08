"""DTensor parameters: every process updates its shard, moments are DTensors, and norms are those of the whole."""

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

import lwadamw
from tests.cases import clone_params, make_params, set_grads
from tests.sharded.processes import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")
SHAPES = [(13, 6), (7,), (4, 10), (2,)]


def _check(world):
    """Check both backends in one process group, because starting processes takes most of the time."""
    for backend in ("torch", "triton"):
        _train_and_check(world, backend)
    return "checked"


def _train_and_check(world, backend):
    mesh = init_device_mesh("cpu", (world,))
    placements = [[Shard(0)], [Shard(0)], [Shard(1)], [Replicate()]]
    torch.manual_seed(0)
    plain = make_params([*SHAPES, (5,)])
    params = [
        torch.nn.Parameter(distribute_tensor(p.detach(), mesh, pl)) for p, pl in zip(plain, placements, strict=False)
    ]
    mixed = [*params, torch.nn.Parameter(plain[-1].detach().clone())]
    reference = clone_params(plain)
    ours = lwadamw.AdamW(mixed, lr=1e-2, weight_decay=0.1, backend=backend)
    theirs = torch.optim.AdamW(reference, lr=1e-2, weight_decay=0.1, foreach=False)
    for _ in range(3):
        set_grads(reference)
        for p, q in zip(mixed, reference, strict=True):
            p.grad = distribute_tensor(q.grad, mesh, p.placements) if isinstance(p, DTensor) else q.grad
        ours.step()
        theirs.step()
    for p, q in zip(mixed, reference, strict=True):
        full = p.full_tensor() if isinstance(p, DTensor) else p
        torch.testing.assert_close(full, q, rtol=1.3e-6, atol=1e-5)
    moment = ours.state[params[0]]["exp_avg"]
    assert isinstance(moment, DTensor)
    assert moment.placements == (Shard(0),)
    expected = [q.detach().double().norm().item() for q in reference]
    assert ours.norms().weight == pytest.approx(expected, rel=1e-5)


@pytest.mark.matrix
def test_the_step_of_shards_equals_the_whole_step():
    assert run(2, _check, 2) == ["checked"] * 2
