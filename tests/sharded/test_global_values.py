"""Norms, clipping and skipped steps of sharded models are those of the single process, and the same on every process."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode

from lwadamw.state.members import local, split_dimensions

from . import models
from .processes import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")
BACKENDS = ("torch", "triton")
CLIP = 0.3


def _alike(value):
    """Raise unless every process has the same value."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    assert all(v == values[0] for v in values), values


def _close(found, expected, tolerance=1e-6, smallest=0.0):
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=smallest)


def _same_gradients(world, steps):
    """Hand the gradients of a model that trains in shards to other optimizers: of its shards, and of whole parameters.

    So nothing differs but the optimizers. A single process that trains by itself adds up its matrix products in another order.
    """
    first = dist.get_rank() == 0
    for name, layout in models.layouts(world).items():
        model = layout.wrap(layout.whole())
        shards = {"torch": dict(model.named_parameters())}
        shards["triton"] = {n: nn.Parameter(p.detach().clone()) for n, p in model.named_parameters()}
        whole = {b: {n: nn.Parameter(models.whole(p)) for n, p in model.named_parameters()} for b in BACKENDS}
        many = {b: models.optimizer(shards[b], b, max_grad_norm=CLIP) for b in BACKENDS}
        one = {b: models.optimizer(whole[b], b, max_grad_norm=CLIP) for b in BACKENDS}

        def give(step, layout=layout, model=model, shards=shards, whole=whole, bad=False):
            model.zero_grad()
            layout.backward(model, step)
            if bad:
                _spoil(model)
            for n, p in model.named_parameters():
                gathered = models.whole(p.grad)
                shards["triton"][n].grad = p.grad
                for backend in BACKENDS:
                    whole[backend][n].grad = gathered.clone()

        for step in range(steps):
            give(step)
            for backend in BACKENDS:
                if step == 1:  # a loop that clips by itself
                    norm = float(many[backend].clip_grad_norm_(CLIP))
                with CommDebugMode() as calls:
                    many[backend].step()
                assert layout.calls is None or calls.get_total_counts() == layout.calls, name
                found = many[backend].norms()
                _alike((float(many[backend].grad_norm), [c.tolist() for c in _columns(found)]))
                if first:
                    one[backend].step()
                    expected = one[backend].norms()
                    assert found.names == expected.names, name
                    _close(float(many[backend].grad_norm), float(one[backend].grad_norm))
                    if step == 1:
                        _close(norm, float(one[backend].grad_norm))
                    for theirs, ours in zip(_columns(expected), _columns(found), strict=True):
                        _close(ours, theirs)
        _one_bad_shard(give, shards, many)
        give(steps)
        for backend in BACKENDS:
            many[backend].max_grad_norm = None
            with CommDebugMode() as calls:
                many[backend].step()
            assert layout.calls is None or calls.get_total_counts() == 0, name
    return True


def _columns(norms):
    return norms.weight, norms.update, norms.grad


def _spoil(model):
    """Put an inf into one shard. All processes that hold the same part have the same gradient."""
    grad = model.layers[0].up.weight.grad
    mesh = grad.device_mesh
    if all(mesh.get_local_rank(d) == mesh.size(d) - 1 for d in split_dimensions(grad)):
        grad._local_tensor.view(-1)[0] = math.inf


def _one_bad_shard(give, shards, many):
    """An inf in what one process holds skips the step everywhere, and the counters agree."""
    give(0, bad=True)
    for backend in BACKENDS:
        before = [local(p).detach().clone() for p in shards[backend].values()]
        many[backend].step()
        assert int(many[backend].skipped_steps) == 1
        assert all(map(torch.equal, before, map(local, shards[backend].values())))
        _alike([float(many[backend].state[p]["step"]) for p in shards[backend].values()])


MATRIX = pytest.mark.matrix
ONLY_FSDP2 = pytest.mark.skipif(
    not models.FSDP2_ON_CPU, reason="this torch cannot run the forward pass of FSDP2 on the CPU"
)
WORLDS = [2, pytest.param(3, marks=ONLY_FSDP2), pytest.param(4, marks=ONLY_FSDP2)]


@pytest.mark.parametrize("world", [WORLDS[0], WORLDS[2]])
def test_clipped_steps_norms_skips_and_calls_are_those_of_the_whole_model(world):
    assert run(world, _same_gradients, world, 2) == [True] * world


@MATRIX
@pytest.mark.parametrize("world", WORLDS)
def test_twenty_clipped_steps_have_the_norms_of_the_whole_model(world):
    assert run(world, _same_gradients, world, 20, seconds=400) == [True] * world


def _own_gradients(world):
    for layout in models.layouts(world).values():
        single, sharded = layout.whole(), layout.wrap(layout.whole())
        one = models.optimizer(single, "torch", max_grad_norm=CLIP)
        many = models.optimizer(sharded, "torch", max_grad_norm=CLIP)
        placements = set()
        for step in range(4):
            layout.backward(single, step, single=True)
            layout.backward(sharded, step)
            placements |= {str(p.grad.placements) for p in sharded.parameters() if isinstance(p, DTensor)}
            one.step()
            many.step()
            _close(float(many.grad_norm), float(one.grad_norm), 1e-5)
            for theirs, ours in zip(_columns(one.norms()), _columns(many.norms()), strict=True):
                _close(ours, theirs, 1e-4 if step else 1e-6, 1e-7)
            one.zero_grad()
            many.zero_grad()
        assert layout.width is None or any("P" in text for text in placements), placements
        for p, q in zip(single.parameters(), sharded.parameters(), strict=True):
            torch.testing.assert_close(models.whole(q), p.detach(), rtol=1e-4, atol=1e-5)
            if isinstance(q, DTensor) and not split_dimensions(q):
                _alike(q.to_local().tolist())
    return True


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=[MATRIX, ONLY_FSDP2])])
def test_a_sharded_model_trains_as_the_single_process_does(world):
    assert run(world, _own_gradients, world) == [True] * world
