"""FullyShardedDataParallel: with `shard_group`, clipping and norms are those of the whole model. Without it: an error."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

import lwadamw

from . import models
from .processes import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")
BACKENDS = ("torch", "triton")
CLIP = 0.3


def _wrapped(original=True, **options):
    """Shards of 10 x 13 matrices: some parameters end inside a row, and of some a process has nothing."""

    def wrap(module):
        cpu = torch.device("cpu")
        return FullyShardedDataParallel(module, use_orig_params=original, device_id=cpu, **options)

    model = models.net(10, 13)
    for i, layer in enumerate(model.layers):
        model.layers[i] = wrap(layer)
    return wrap(model)


def _named(model):
    return {name.replace("_fsdp_wrapped_module.", ""): p for name, p in model.named_parameters()}


def _whole(model, gradients=False):
    """Return whole parameters, or their gradients, by name."""
    with FullyShardedDataParallel.summon_full_params(model, with_grads=gradients):
        return {name: (p.grad if gradients else p).detach().clone() for name, p in _named(model).items()}


def _original_parameters(world):
    part = (dist.get_rank(), world)
    for backend in BACKENDS:
        model = _wrapped()
        reference = {name: nn.Parameter(p) for name, p in _whole(model).items()}
        held = [p.numel() for p in model.parameters()]
        assert 0 in held
        assert any(0 < n < p.numel() for n, p in zip(held, reference.values(), strict=True))
        many = models.optimizer(_named(model), backend, max_grad_norm=CLIP, shard_group=model.process_group)
        one = models.optimizer(reference, backend, max_grad_norm=CLIP)
        for step in range(3):
            model.zero_grad()
            models.backward(model, step, part)
            for name, grad in _whole(model, gradients=True).items():
                reference[name].grad = grad
            many.step()
            one.step()
            np.testing.assert_allclose(float(many.grad_norm), float(one.grad_norm), rtol=1e-6)
            found, expected = many.norms(), one.norms()
            assert sorted(found.names) == sorted(expected.names)
            order = [expected.names.index(name) for name in found.names]
            for column in ("weight", "update", "grad"):
                np.testing.assert_allclose(getattr(found, column), getattr(expected, column)[order], rtol=1e-6)
        for name, p in _whole(model).items():
            torch.testing.assert_close(p, reference[name].detach(), rtol=1e-6, atol=1e-7)
        model.zero_grad()
        models.backward(model, 0, part)
        if dist.get_rank() == 1:
            next(p for p in model.parameters() if p.numel()).grad[0] = float("inf")
        before = [p.detach().clone() for p in model.parameters()]
        many.step()
        assert int(many.skipped_steps) == 1
        assert all(map(torch.equal, before, model.parameters()))
    return True


def test_original_parameters_equal_the_single_process():
    assert run(2, _original_parameters, 2) == [True] * 2


def _flat_parameters(world):
    """Flat parameters are vectors. Elements are updated as they are in the model, and norms are those of the vectors."""
    part = (dist.get_rank(), world)
    for backend in BACKENDS:
        single, model = models.net(10, 13), _wrapped(original=False)
        many = models.optimizer(_named(model), backend, max_grad_norm=CLIP, shard_group=model.process_group)
        one = models.optimizer(single, backend, max_grad_norm=CLIP)
        for step in range(3):
            models.backward(single, step)
            models.backward(model, step, part)
            one.step()
            many.step()
            np.testing.assert_allclose(float(many.grad_norm), float(one.grad_norm), rtol=1e-5)
            found, expected = many.norms(), one.norms()
            assert sorted(found.names) == ["_flat_param", "layers.0._flat_param"]
            for column in ("weight", "update", "grad"):
                ours, theirs = (np.square(getattr(norms, column)).sum() for norms in (found, expected))
                np.testing.assert_allclose(ours, theirs, rtol=1e-4)
            one.zero_grad()
            many.zero_grad()
        for p, q in zip(single.parameters(), _whole_of_flat(model), strict=True):
            torch.testing.assert_close(q, p.detach(), rtol=1e-4, atol=1e-5)
        _checkpoint(model, many, backend, part)
    return True


def _whole_of_flat(model):
    with FullyShardedDataParallel.summon_full_params(model):
        return [p.detach().clone() for p in model.parameters()]


def _checkpoint(model, optimizer, backend, part):
    """The wrapper's own checkpoint of an optimizer resumes exactly."""
    saved = FullyShardedDataParallel.optim_state_dict(model, optimizer)
    assert {name: p.shape for name, p in models.net(10, 13).named_parameters()} == {
        name: state["exp_avg"].shape for name, state in saved["state"].items()
    }
    again = _wrapped(original=False)
    again.load_state_dict(model.state_dict())
    resumed = models.optimizer(_named(again), backend, max_grad_norm=CLIP, shard_group=again.process_group)
    resumed.load_state_dict(FullyShardedDataParallel.optim_state_dict_to_load(again, resumed, saved))
    for trained, follower in ((model, optimizer), (again, resumed)):
        models.backward(trained, 9, part)
        follower.step()
    assert all(map(torch.equal, model.parameters(), again.parameters()))


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")
def test_flat_parameters_equal_the_single_process_and_resume():
    assert run(2, _flat_parameters, 2) == [True] * 2


def _untold(world):
    part, said = (dist.get_rank(), world), []
    for backend in BACKENDS:
        for original in (True, False):
            model = _wrapped(original)
            params = _named(model)
            optimizer = models.optimizer(params, backend, max_grad_norm=CLIP)
            models.backward(model, 0, part)
            before = [p.detach().clone() for p in params.values()]
            for call in (optimizer.step, lambda o=optimizer: o.clip_grad_norm_(1.0)):
                with pytest.raises(RuntimeError) as refused:
                    call()
                said.append(str(refused.value))
            assert all(map(torch.equal, before, params.values()))
            optimizer.max_grad_norm = None
            optimizer.step()
            sums, names = optimizer.norm_sums(local=True), optimizer.norm_names()
            for call in (
                optimizer.norms,
                optimizer.norm_sums,
                lambda s=sums, n=names, p=params: lwadamw.reduce_sums(s, n, p),
            ):
                with pytest.raises(RuntimeError) as refused:
                    call()
                said.append(str(refused.value))
            remedy = re.search(r"(shard_group=model\.\w+)\.", said[0]).group(1)
            options = eval(f"dict({remedy})", {"model": model})
            models.optimizer(params, backend, max_grad_norm=CLIP, **options).step()
    return said


def test_shards_that_nobody_has_told_about_are_refused_alike_on_every_process():
    first, second = run(2, _untold, 2)
    assert first == second
    calls = ["step() with max_grad_norm", "clip_grad_norm_()", "norms()", "norm_sums()", "reduce_sums()"]
    for i, message in enumerate(first):
        name = "_flat_param" if i // len(calls) % 2 else "gain"
        assert message.startswith(f"lwadamw.AdamW: {calls[i % len(calls)]} would use the part of '{name}' that"), (
            message
        )


def _unsharded(world):
    """Under NO_SHARD every process has the whole parameters, and needs to tell nothing. To tell it is no harm."""
    for backend in BACKENDS:
        for options in ({}, {"shard_group": []}):
            model = _wrapped(sharding_strategy=ShardingStrategy.NO_SHARD)
            single = models.net(10, 13)
            many = models.optimizer(_named(model), backend, max_grad_norm=CLIP, **options)
            one = models.optimizer(single, backend, max_grad_norm=CLIP)
            models.backward(model, 0, (dist.get_rank(), world))
            models.backward(single, 0)
            many.step()
            one.step()
            np.testing.assert_allclose(float(many.grad_norm), float(one.grad_norm), rtol=1e-5)
            assert dict(zip(many.norms().names, many.norms().weight, strict=True)) == pytest.approx(
                dict(zip(one.norms().names, one.norms().weight, strict=True)), rel=1e-5
            )
    return True


@pytest.mark.matrix
@pytest.mark.filterwarnings("ignore")
def test_no_shard_needs_no_group():
    assert run(2, _unsharded, 2) == [True] * 2
