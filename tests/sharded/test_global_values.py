"""Norms, clipping and skipped steps of sharded models are those of the single process, and the same on every process."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

import lwadamw
from lwadamw.state.members import split_dimensions

from . import models
from .processes import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")
BACKENDS = ("torch", "triton")
STEPS, CLIP = 20, 0.3


def _alike(value):
    """Raise unless every process has the same value."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert all(v == values[0] for v in values), values


def _close(found, expected, tolerance=1e-6):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=1e-7)


def _clipped_steps_and_norms(world):
    for name, (wrap, part, d, hidden) in models.layouts(world).items():
        for backend in BACKENDS:
            single, sharded = models.net(d, hidden), wrap(models.net(d, hidden))
            steps = STEPS if backend == "torch" and world > 2 else 2
            one = models.optimizer(single, backend, max_grad_norm=CLIP)
            many = models.optimizer(sharded, backend, max_grad_norm=CLIP)
            for step in range(steps):
                models.backward(single, step)
                models.backward(sharded, step, part)
                one.step()
                with CommDebugMode() as calls:
                    many.step()
                # One for each process group among which anything is split.
                assert calls.get_total_counts() == (2 if name == "FSDP2 x TP" else 1)
                _close(float(many.grad_norm), float(one.grad_norm))
                _alike(float(many.grad_norm))
                if step in (0, steps - 1):
                    expected, found = one.norms(), many.norms()
                    assert found.names == expected.names, name
                    for column in ("weight", "update", "grad"):
                        _close(getattr(found, column), getattr(expected, column), 3e-5 if step else 1e-6)
                    _alike((found.weight.tolist(), found.update.tolist(), found.grad.tolist(), found.angle.tolist()))
                one.zero_grad()
                many.zero_grad()
            models.backward(single, steps)
            models.backward(sharded, steps, part)
            _close(float(many.clip_grad_norm_(CLIP)), float(one.clip_grad_norm_(CLIP)), 1e-4)
            one.step()
            many.step()
            one.zero_grad()
            many.zero_grad()
            for p, q in zip(single.parameters(), sharded.parameters(), strict=True):
                torch.testing.assert_close(models.whole(q), p.detach(), rtol=1e-4, atol=1e-5)
            many.max_grad_norm = None
            models.backward(sharded, steps, part)
            with CommDebugMode() as calls:
                many.step()
            assert calls.get_total_counts() == 0
            many.zero_grad()
            many.max_grad_norm = CLIP
            _one_bad_shard(sharded, many, part)
    return True


def _one_bad_shard(model, optimizer, part):
    """An inf in what one process holds skips the step everywhere."""
    before = [models.whole(p) for p in model.parameters()]
    skipped = int(optimizer.skipped_steps)
    models.backward(model, 0, part)
    weight = model.layers[0].up.weight
    mesh = weight.device_mesh
    # All processes that hold the same part have the same gradient.
    if all(mesh.get_local_rank(d) == mesh.size(d) - 1 for d in split_dimensions(weight)):
        weight.grad._local_tensor.view(-1)[0] = math.inf
    optimizer.step()
    assert int(optimizer.skipped_steps) == skipped + 1
    for p, q in zip(before, model.parameters(), strict=True):
        assert torch.equal(p, models.whole(q))
    optimizer.zero_grad()


MATRIX = pytest.mark.matrix


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=MATRIX), pytest.param(4, marks=MATRIX)])
def test_clipped_steps_norms_skips_and_calls_are_those_of_the_whole_model(world):
    assert run(world, _clipped_steps_and_norms, world) == [True] * world


def _sequence_parallel(world):
    mesh = init_device_mesh("cpu", (world,))
    for backend in BACKENDS:
        for options in ({}, {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}):
            torch.manual_seed(0)
            single = models.Rows(8, 12)
            torch.manual_seed(0)
            sharded = models.sequence_parallel(models.Rows(8, 12), mesh)
            one = models.optimizer(single, backend, max_grad_norm=0.1, **options)
            many = models.optimizer(sharded, backend, max_grad_norm=0.1, **options)
            placements, tolerance = set(), 1e-3 if options else 1e-5
            for step in range(4):
                models.backward(single, step, width=8)
                models.backward(sharded, step, (dist.get_rank(), world), width=8)
                placements |= {str(p.grad.placements) for p in sharded.parameters() if isinstance(p, DTensor)}
                one.step()
                many.step()
                _close(float(many.grad_norm), float(one.grad_norm), 1e-5)
                found, expected = many.norms(), one.norms()
                for column in ("weight", "grad"):
                    _close(getattr(found, column), getattr(expected, column), 1e-4)
                one.zero_grad()
                many.zero_grad()
            assert any("P" in text for text in placements), placements
            for p, q in zip(single.parameters(), sharded.parameters(), strict=True):
                torch.testing.assert_close(models.whole(q), p.detach(), rtol=tolerance, atol=tolerance)
                if isinstance(q, DTensor) and q.placements == (Replicate(),):
                    _alike(q.to_local().tolist())
    return True


@MATRIX
def test_gradients_of_sequence_parallel_are_brought_to_their_parameter_first():
    assert run(2, _sequence_parallel, 2) == [True] * 2


def _misplaced(world):
    """Replicate for a Shard, Shard for a Replicate, and Partial for both, by hand."""
    from torch.distributed.tensor import Partial

    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    weight, grads = torch.randn(7, 4), [torch.randn(7, 4) for _ in range(3)]
    for backend in BACKENDS:
        for options in ({}, {"exp_avg_dtype": torch.bfloat16, "exp_avg_sq_dtype": torch.bfloat16}):
            for placement in (Shard(0), Shard(1), Replicate()):
                for given in (Shard(0), Shard(1), Replicate(), Partial()):
                    p = nn.Parameter(distribute_tensor(weight, mesh, [placement]))
                    q = nn.Parameter(weight.clone())
                    ours = lwadamw.AdamW([p], backend=backend, **models.OPTIONS, **options)
                    theirs = lwadamw.AdamW([q], backend=backend, **models.OPTIONS, **options)
                    for g in grads:
                        if given == Partial():
                            p.grad = DTensor.from_local(g / world, mesh, [Partial()])
                        else:
                            p.grad = distribute_tensor(g, mesh, [given])
                        q.grad = g.clone()
                        ours.step()
                        theirs.step()
                        _close(ours.norms().grad, theirs.norms().grad, 1e-5)
                    torch.testing.assert_close(models.whole(p), q.detach(), rtol=1e-5, atol=1e-5)
    return True


@MATRIX
def test_a_gradient_that_is_placed_otherwise_is_read_as_a_whole():
    assert run(2, _misplaced, 2) == [True] * 2


def _asynchronous(world):
    """Gradients of collectives that have not arrived, in a plain tensor and in a DTensor."""
    from torch.distributed._functional_collectives import all_reduce

    mesh = init_device_mesh("cpu", (world,))
    torch.manual_seed(0)
    weight, grad = torch.randn(5, 4), torch.randn(5, 4)
    for backend in BACKENDS:
        plain, placed = nn.Parameter(weight.clone()), nn.Parameter(distribute_tensor(weight, mesh, [Replicate()]))
        q = nn.Parameter(weight.clone())
        ours = lwadamw.AdamW([plain, placed], backend=backend, max_grad_norm=100.0, **models.OPTIONS)
        theirs = torch.optim.AdamW([q], **models.OPTIONS)
        for _ in range(3):
            plain.grad = all_reduce(grad / world, "sum", dist.group.WORLD)
            on_its_way = all_reduce(grad / world, "sum", dist.group.WORLD)
            placed.grad = DTensor(on_its_way, placed._spec, requires_grad=False)
            q.grad = grad.clone()
            ours.step()
            theirs.step()
        for p in (plain, placed):
            torch.testing.assert_close(models.whole(p), q.detach(), rtol=1e-5, atol=1e-5)
        _close(float(ours.grad_norm), math.sqrt(2) * float(grad.norm()), 1e-5)
    return True


def test_gradients_that_are_still_on_their_way_are_waited_for():
    assert run(2, _asynchronous, 2) == [True] * 2
