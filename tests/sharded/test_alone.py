"""A process that makes a collective call alone is told so, and a process without parameters takes part."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lwadamw
from lwadamw.state.collectives import device_of

from .processes import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")

CALLS = {
    "norms()": lambda optimizer, params, group: optimizer.norms(),
    "norm_sums()": lambda optimizer, params, group: optimizer.norm_sums(),
    "step() with max_grad_norm": lambda optimizer, params, group: optimizer.step(),
    "clip_grad_norm_()": lambda optimizer, params, group: optimizer.clip_grad_norm_(1.0),
    "reduce_sums()": lambda optimizer, params, group: lwadamw.reduce_sums(
        optimizer.norm_sums(local=True), optimizer.norm_names(), params, shard_group=group
    ),
}


def _alone(world):
    """Process 0 makes every call alone. Each call has a process group of its own, because a timeout ends the group."""
    said = {}
    for name, call in CALLS.items():
        group = dist.new_group(timeout=datetime.timedelta(seconds=0.3))
        p = nn.Parameter(torch.ones(3))
        p.grad = torch.ones(3)
        optimizer = lwadamw.AdamW([("w", p)], backend="torch", shard_group=group)
        optimizer.step()
        optimizer.max_grad_norm = 1.0
        before = p.detach().clone()
        if dist.get_rank() == 0:
            try:
                call(optimizer, {"w": p}, group)
            except RuntimeError as error:
                said[name] = (str(error), repr(error.__cause__))
            assert optimizer.norm_sums(local=True).shape == (1, 4)
        assert torch.equal(p, before), name
        dist.barrier()
    return said


@pytest.mark.matrix
def test_a_process_that_calls_alone_is_told_which_call_waits_for_others():
    said = run(2, _alone, 2)[0]
    assert list(said) == list(CALLS)
    for name, (message, cause) in said.items():
        assert message.startswith(f"lwadamw.AdamW: {name} is collective"), message
        assert "Make the call on every process." in message
        assert "imed out" in cause, cause
    for name in ("norms()", "norm_sums()"):
        assert "norm_sums(local=True) returns" in said[name][0]
    for name in ("step() with max_grad_norm", "clip_grad_norm_()"):
        assert "max_grad_norm=None" in said[name][0]


def _without_parameters(world):
    """Process 1 of an engine that cuts parameters into flat pieces may have got none."""
    found = []
    for backend in ("torch", "triton"):
        params = [("w", nn.Parameter(torch.ones(3)))] if dist.get_rank() == 0 else []
        for _, p in params:
            p.grad = torch.full_like(p, 2.0)
        groups = [{"params": params}] if params else [{"params": [], "lr": 1e-3}]
        optimizer = lwadamw.AdamW(groups, backend=backend, max_grad_norm=1.0, shard_group=dist.group.WORLD)
        optimizer.step()
        norms = optimizer.norms()
        found.append((norms.names, norms.weight.tolist(), norms.grad.tolist(), float(optimizer.grad_norm)))
        for _, p in params:
            p.grad[0] = float("inf")
        optimizer.step()
        found.append((int(optimizer.skipped_steps), float(optimizer.clip_grad_norm_(1.0))))
    return found


def test_a_process_without_parameters_has_the_norms_of_the_others():
    first, second = run(2, _without_parameters, 2)
    assert first == second
    assert first[0][0] == ("w",)
    assert first[0][3] == pytest.approx(12**0.5)
    assert first[1][0] == 1


@pytest.mark.parametrize(
    ("configuration", "available", "device"),
    [
        ("cuda:nccl", True, "cuda"),
        ("cpu:gloo,cuda:gloo", True, "cpu"),
        ("cpu:gloo,cuda:nccl", True, "cuda"),
        ("cpu:gloo,cuda:nccl", False, "cpu"),
        ("cpu:mpi", True, "cpu"),
    ],
)
def test_its_sums_are_on_a_device_that_the_process_group_takes(configuration, available, device, monkeypatch):
    monkeypatch.setattr(dist, "get_backend_config", lambda group: configuration)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert device_of([object()]) == torch.device(device)
