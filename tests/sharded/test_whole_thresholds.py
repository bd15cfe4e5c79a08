"""Huber thresholds of split parameters are those of the single process, on every process, and after a resume."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor.debug import CommDebugMode

import lwadamw
from lwadamw.state.members import local, wrap_like

from . import models
from .places import give_gradients, places_of
from .processes import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")
BACKENDS = ("torch", "triton")
HUBER = {"decay": "huber", "huber_scale": 0.5, "lr": 1e-2, "weight_decay": 2.0}
MATRIX = pytest.mark.matrix


def _optimizer(model, backend, dtype, **more):
    storage = {"master_weights": torch.float32} if dtype == torch.bfloat16 else {}
    return lwadamw.AdamW(model.named_parameters(), backend=backend, **HUBER, **storage, **more)


def _thresholds(optimizer):
    return [float(optimizer.state[p]["huber_threshold"]) for g in optimizer.param_groups for p in g["params"]]


def _layout(name, layout, backend, dtype):
    """Train a sharded model and the single process on the same gradients. The thresholds may differ by 1e-6 only."""
    single, sharded = layout.whole().to(dtype), layout.wrap(layout.whole().to(dtype))
    places = places_of(layout.whole(), layout.wrap)
    one, many = _optimizer(single, backend, dtype), _optimizer(sharded, backend, dtype)
    for step in range(2):
        if step == 1:  # a resumed run goes on alike
            saved = copy.deepcopy(many.state_dict())
            many = _optimizer(sharded, backend, dtype)
            many.load_state_dict(saved)
        give_gradients(single, sharded, places, step)
        one.step()
        with CommDebugMode() as calls:
            many.step()
        # The first step needs the thresholds of the weights before it too.
        groups = 2 if name == "FSDP2 x TP" else 1
        assert calls.get_total_counts() == (2 * groups if step == 0 else groups), (name, step)
        expected, found = _thresholds(one), _thresholds(many)
        assert found == pytest.approx(expected, rel=1e-6), (name, backend, dtype, step)
        everybody = [None] * dist.get_world_size()
        dist.all_gather_object(everybody, found)
        assert all(some == found for some in everybody)
    for (key, p), q in zip(sharded.named_parameters(), single.parameters(), strict=True):
        part = q.detach().flatten()[places[key]].float()
        torch.testing.assert_close(
            local(p.detach()).float(), part, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6
        )
    found, expected = many.norms(), one.norms()
    for column in ("weight", "update"):
        assert getattr(found, column).tolist() == pytest.approx(getattr(expected, column).tolist(), rel=1e-4)
    with pytest.raises(RuntimeError, match="with decay='huber': .* is split over processes"):
        many.release_gradients()


def _layouts(world, chosen):
    for name, layout in models.layouts(world).items():
        for backend, dtype in chosen.get(name, ()):
            _layout(name, layout, backend, dtype)
    return True


FP32, BF16 = [("torch", torch.float32), ("triton", torch.float32)], [("torch", torch.bfloat16)]
CHOSEN = [
    (2, {"FSDP2": FP32}),
    pytest.param(2, {"TP": FP32}, marks=MATRIX),
    pytest.param(3, {"FSDP2": [*FP32, *BF16]}, marks=MATRIX),
    pytest.param(4, {"HSDP": FP32}, marks=MATRIX),
    pytest.param(4, {"FSDP2 x TP": FP32}, marks=MATRIX),
]


@pytest.mark.parametrize(
    ("world", "chosen"), CHOSEN, ids=lambda value: "" if isinstance(value, int) else " ".join(value)
)
def test_thresholds_of_sharded_models_are_those_of_the_single_process(world, chosen):
    assert run(world, _layouts, world, chosen) == [True] * world


def _flat_shards(world):
    """Flat pieces, one of which is empty, and whole parameters that a single process has, as with ZeRO."""
    rank = dist.get_rank()
    torch.manual_seed(0)
    weights = {"a": torch.randn(7, 5), "b": torch.randn(9), "whole": torch.randn(4, 3), "mine": torch.randn(6)}
    cuts = {"a": 17, "b": 0}  # process 0 has nothing of b
    for backend in BACKENDS:

        def part(name, whole):
            flat, cut = whole.flatten(), cuts.get(name)
            return whole.clone() if cut is None else (flat[:cut] if rank == 0 else flat[cut:]).clone()

        held = [name for name in weights if name != "mine" or rank == 1]
        params = {name: nn.Parameter(part(name, weights[name])) for name in held}
        reference = {name: nn.Parameter(w.clone()) for name, w in weights.items()}
        shard_group = {"[ab]": dist.group.WORLD, "mine": dist.group.WORLD}
        ours = lwadamw.AdamW(params.items(), backend=backend, shard_group=shard_group, **HUBER)
        theirs = lwadamw.AdamW(reference.items(), backend=backend, **HUBER)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for name, p in reference.items():
                p.grad = torch.randn(p.shape, generator=generator)
                late = name == "mine" and step < 2  # its state comes later than that of the others
                p.grad = None if late else p.grad
                if name in params and not late:
                    params[name].grad = part(name, p.grad)
            ours.step()
            theirs.step()
            for name, p in params.items():
                if p.grad is not None:
                    expected = float(theirs.state[reference[name]]["huber_threshold"])
                    assert float(ours.state[p]["huber_threshold"]) == pytest.approx(expected, rel=1e-6), (name, step)
        for name, p in params.items():
            torch.testing.assert_close(p.detach(), part(name, reference[name].detach()), rtol=1e-5, atol=1e-6)
        nameless = lwadamw.AdamW(params.values(), backend=backend, shard_group=dist.group.WORLD, **HUBER)
        before = [p.detach().clone() for p in params.values()]
        with pytest.raises(RuntimeError, match='decay="huber" with shard_group, but parameters have no names'):
            nameless.step()
        assert all(map(torch.equal, before, params.values()))
    return True


def _skips(world):
    """A changed law is followed, and an inf in one shard leaves the thresholds of all processes as they were."""
    layout = models.layouts(world)["FSDP2"]
    for backend in BACKENDS:
        runs = []
        for model in (layout.whole(), layout.wrap(layout.whole())):
            optimizer = lwadamw.AdamW(model.named_parameters(), backend=backend, max_grad_norm=1.0, weight_decay=2.0)
            for step in range(3):
                for p in model.parameters():
                    p.grad = wrap_like(p, torch.ones_like(local(p.detach())))
                if step == 1:
                    optimizer.param_groups[0].update(decay="huber", huber_scale=1.0)
                if step == 2:
                    runs.append(_thresholds(optimizer))
                    if len(runs) == 1 or dist.get_rank() == 1:
                        local(model.layers[0].up.weight.grad).view(-1)[0] = math.inf
                optimizer.step()
            runs.append(_thresholds(optimizer))
        assert runs[0] == runs[1]
        assert runs[2] == runs[3] == pytest.approx(runs[0], rel=1e-6)
    return True


@MATRIX
@pytest.mark.parametrize("work", [_flat_shards, _skips])
def test_flat_shards_and_changed_laws_and_skipped_steps(work):
    assert run(2, work, 2) == [True] * 2
