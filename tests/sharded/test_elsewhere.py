"""A process may hold a DTensor over a device mesh that it is not in."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

import lwadamw

from . import models
from .processes import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")


def _steps(inside, backend):
    """Two steps of a parameter on the processes `inside` alone, and of one that every process holds."""
    torch.manual_seed(0)
    mesh = DeviceMesh("cpu", inside)
    params = {
        "there": nn.Parameter(distribute_tensor(torch.randn(4, 6), mesh, [Shard(0)])),
        "everywhere": nn.Parameter(torch.randn(7)),
    }
    optimizer = lwadamw.AdamW(params.items(), backend=backend, **models.OPTIONS)
    monitor = lwadamw.Monitor(optimizer, every=1)
    for _ in range(2):
        params["there"].sum().backward()
        params["everywhere"].sum().backward()
        optimizer.step()
        said = optimizer.norms().names, tuple(optimizer.norm_names()), monitor.latest.names
        optimizer.zero_grad()
    params["everywhere"].grad = torch.ones(7)
    before = params["everywhere"].detach().clone()
    optimizer.max_grad_norm = 1.0
    try:
        optimizer.step()
    except RuntimeError as error:
        return said, str(error), torch.equal(params["everywhere"], before)
    return said, "", dist.get_rank()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("inside", [[0], [0, 1]], ids=str)
def test_a_process_outside_of_a_mesh_has_no_norms_of_its_parameter_and_does_not_clip_by_a_norm_of_its_own(
    inside, backend
):
    *there, outside = run(len(inside) + 1, _steps, inside, backend)
    names = ("there", "everywhere")
    assert there == [((names, names, names), "", rank) for rank in inside]
    (said, error, unchanged) = outside
    assert said == (("everywhere",),) * 3
    assert "step() with max_grad_norm" in error
    assert "'there'" in error
    assert unchanged is True


def _others():
    torch.manual_seed(0)
    there = nn.Parameter(distribute_tensor(torch.randn(4, 6), DeviceMesh("cpu", [0, 1]), [Shard(0)]))
    everywhere = nn.Parameter(torch.randn(7))
    ours, other = lwadamw.AdamW([("everywhere", everywhere)]), torch.optim.SGD([("there", there)], lr=0.1)
    monitor = lwadamw.Monitor(ours, every=1, others=[other])
    there.sum().backward()
    everywhere.sum().backward()
    ours.step()
    other.step()
    return monitor.latest.names


def test_a_monitor_of_another_optimizer_has_no_row_of_a_parameter_that_is_elsewhere():
    both = ("everywhere", "there")
    assert run(3, _others) == [both, both, ("everywhere",)]


STORAGES = {
    "plain": (torch.float32, {}),
    "8 bits": (torch.float32, {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}),
    "stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
    "copy": (torch.bfloat16, {"master_weights": torch.float32}),
    "remainder": (torch.bfloat16, {"master_weights": "remainder"}),
    "kahan": (torch.bfloat16, {"rounding": "kahan"}),
    "huber": (torch.float32, {"decay": "huber"}),
}


def _storage(name, backend):
    """Two steps, a checkpoint, and a third step from it: whether all goes on as without the checkpoint."""
    dtype, options = STORAGES[name]
    weights = []
    for resumes in (False, True):
        torch.manual_seed(0)
        mesh = DeviceMesh("cpu", [0, 1])
        params = {
            "there": nn.Parameter(distribute_tensor(torch.randn(4, 300).to(dtype), mesh, [Shard(0)])),
            "everywhere": nn.Parameter(torch.randn(7, 50).to(dtype)),
        }
        optimizer = lwadamw.AdamW(params.items(), backend=backend, **options)
        for step in range(3):
            if step == 2 and resumes:
                saved = optimizer.state_dict()
                optimizer = lwadamw.AdamW(params.items(), backend=backend, **options)
                optimizer.load_state_dict(saved)
            params["there"].square().sum().backward()
            params["everywhere"].square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([params["there"].detach().to_local(), params["everywhere"].detach()])
    return [torch.equal(a, b) for a, b in zip(*weights, strict=True)], [w.numel() for w in weights[0]]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("name", STORAGES)
def test_every_storage_steps_and_resumes_on_a_process_outside_of_a_mesh(name, backend):
    same = [True, True]
    assert run(3, _storage, name, backend) == [(same, [600, 350]), (same, [600, 350]), (same, [0, 350])]
