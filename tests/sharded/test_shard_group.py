"""Plain tensors that are shards: with `shard_group`, clipping and norms are those of the whole model."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

import lwadamw

from . import models
from .processes import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")
BACKENDS = ("torch", "triton")


def _flat_shards(world):
    """Parameters cut into flat pieces that end inside rows, one whole parameter, and one that a single process has."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    weights = {"a": torch.randn(7, 5), "b": torch.randn(9), "whole": torch.randn(4, 3), "mine": torch.randn(6)}
    cuts = {"a": 17, "b": 0}  # process 0 has nothing of b
    for backend in BACKENDS:
        params = {"whole": nn.Parameter(weights["whole"].clone())}
        for name, cut in cuts.items():
            flat = weights[name].flatten()
            params[name] = nn.Parameter((flat[:cut] if rank == 0 else flat[cut:]).clone())
        if rank == 1:
            params["mine"] = nn.Parameter(weights["mine"].clone())
        reference = {name: nn.Parameter(w.clone()) for name, w in weights.items()}
        groups = {"[ab]": dist.group.WORLD, "mine": dist.group.WORLD}
        ours = lwadamw.AdamW(params.items(), backend=backend, max_grad_norm=0.5, shard_group=groups, **models.OPTIONS)
        theirs = lwadamw.AdamW(reference.items(), backend=backend, max_grad_norm=0.5, **models.OPTIONS)
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            grads = {name: torch.randn(w.shape, generator=generator) for name, w in weights.items()}
            for name, p in reference.items():
                p.grad = grads[name].clone()
                if name in cuts:
                    flat, cut = grads[name].flatten(), cuts[name]
                    params[name].grad = (flat[:cut] if rank == 0 else flat[cut:]).clone()
                elif name in params:
                    params[name].grad = grads[name].clone()
            ours.step()
            theirs.step()
            assert float(ours.grad_norm) == pytest.approx(float(theirs.grad_norm), rel=1e-6)
            found, expected = ours.norms(), theirs.norms()
            assert sorted(found.names) == sorted(expected.names)
            order = [expected.names.index(name) for name in found.names]
            for column in ("weight", "update", "grad"):
                np.testing.assert_allclose(getattr(found, column), getattr(expected, column)[order], rtol=1e-5)
        own = sum(float(p.double().square().sum()) for p in params.values())
        assert math.isclose(float(ours.norm_sums(local=True)[:, 0].sum()), own, rel_tol=1e-5)
        for name, p in params.items():
            flat, cut = reference[name].detach().flatten(), cuts.get(name)
            part = flat if cut is None else flat[:cut] if rank == 0 else flat[cut:]
            torch.testing.assert_close(p.detach().flatten(), part, rtol=1e-5, atol=1e-6)
    return True


def test_flat_shards_equal_the_single_process():
    assert run(2, _flat_shards, 2) == [True] * 2


def _zero_redundancy(world):
    warnings.simplefilter("ignore")
    from torch.distributed.optim import ZeroRedundancyOptimizer  # it warns about torch.jit

    for backend in BACKENDS:
        single, split = models.net(8, 12), models.net(8, 12)
        one = models.optimizer(single, backend, max_grad_norm=0.3)
        many = ZeroRedundancyOptimizer(
            split.parameters(),
            optimizer_class=lwadamw.AdamW,
            backend=backend,
            max_grad_norm=0.3,
            shard_group=dist.group.WORLD,
            **models.OPTIONS,
        )
        for step in range(3):
            for model in (single, split):
                models.backward(model, step)
            one.step()
            many.step()
            assert float(many.optim.grad_norm) == pytest.approx(float(one.grad_norm), rel=1e-5)
            own = float(many.optim.norm_sums(local=True)[:, 2].sum())
            total = torch.tensor(own)
            dist.all_reduce(total)
            assert math.sqrt(total) == pytest.approx(min(float(one.grad_norm), 0.3), rel=1e-5)
            # Its parameters have no names, and number 0 of one process is not number 0 of the other.
            with pytest.raises(RuntimeError, match=r"^lwadamw.AdamW: norms\(\) with shard_group, but .* have no names"):
                many.optim.norms()
            one.zero_grad()
            many.zero_grad()
        for p, q in zip(single.parameters(), split.parameters(), strict=True):
            torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-5, atol=1e-6)
    return True


def test_the_zero_redundancy_optimizer_clips_by_the_global_norm():
    assert run(2, _zero_redundancy, 2) == [True] * 2


def _loss_scaling(world):
    """An inf in the shard of one process. Nobody but ShardedGradScaler tells the other processes."""
    found = []
    for backend in BACKENDS:
        for clip, told, fused in ((None, True, None), (0.3, True, True), (None, False, None)):
            p = nn.Parameter(torch.ones(4))
            p._fsdp_flattened = not told  # as FullyShardedDataParallel marks it
            group = dist.group.WORLD if told else None
            optimizer = lwadamw.AdamW([("w", p)], backend=backend, max_grad_norm=clip, fused=fused, shard_group=group)
            scaler = ShardedGradScaler("cpu", init_scale=8.0, process_group=dist.group.WORLD)
            for step in range(3):
                scaler.scale(torch.zeros((), requires_grad=True))
                p.grad = torch.full((4,), 8.0 * (dist.get_rank() + 1))
                if step == 1 and dist.get_rank() == world - 1:
                    p.grad[0] = math.inf
                scaler.step(optimizer)
                scaler.update()
            found.append((optimizer.steps_taken(), scaler.get_scale()))
    return found


def test_an_inf_in_one_plain_shard_skips_the_step_of_every_process_under_the_sharded_scaler():
    assert run(2, _loss_scaling, 2) == [[(2, 4.0)] * 6] * 2


def test_what_is_no_process_group_is_refused():
    p = nn.Parameter(torch.zeros(2))
    for given in ("world", {"*": 3}, [dist]):
        with pytest.raises(TypeError, match="is not a process group. Give torch.distributed.group.WORLD"):
            lwadamw.AdamW([p], shard_group=given)
