"""Random rounding of FSDP2 x TP: the bits of an element are those of its place in the whole parameter."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import lwadamw
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.members import local, wrap_like

from .processes import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")
BACKENDS = ("torch", "triton")
# 8-bit moments need 4096 elements and rows of whole blocks. 27 rows are 14 and 13 of them, and then 7, 7, 7 and 6.
SIZES = {"up": (256, 27), "down": (256, 18), "thin": (256, 3)}


def _net(dtype, numbered=False):
    torch.manual_seed(0)
    model = nn.Module()
    for name, size in SIZES.items():
        model.add_module(name, nn.Linear(*size, dtype=dtype))
    if numbered:
        for p in model.parameters():
            p.data = torch.arange(p.numel(), dtype=torch.float32).view(p.shape)
    return model


def _sharded(model):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "thin": ColwiseParallel()}
    return fully_shard(parallelize_module(model, mesh["tp"], plan), mesh=mesh["dp"])


def _one_combination(name, backend):
    c = COMBINATIONS[name]
    options = {**c.options, "lr": 1e-2, "weight_decay": 0.1, "rounding_seed": 5, "norms": False, "backend": backend}
    if backend == "torch":
        options["fused"] = (
            False  # torch's fused kernel rounds the last elements of an array in another way than the first
        )
    single, sharded = _net(c.param), _sharded(_net(c.param))
    # A model whose weights are their own places tells which elements this process holds.
    places = {
        key: local(p.detach()).long() for key, p in _sharded(_net(torch.float32, numbered=True)).named_parameters()
    }
    assert any("trided" in repr(p.placements) or "_S(" in str(p.placements) for p in sharded.parameters())
    one = lwadamw.AdamW(single.named_parameters(), **options)
    many = lwadamw.AdamW(sharded.named_parameters(), **options)
    generator = torch.Generator().manual_seed(1)
    for _ in range(2):
        for (key, p), q in zip(sharded.named_parameters(), single.parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=generator).to(c.grad)
            p.grad = wrap_like(p, q.grad.flatten()[places[key]])
        one.step()
        many.step()
    for (key, p), q in zip(sharded.named_parameters(), single.parameters(), strict=True):
        assert torch.equal(local(p.detach()), q.detach().flatten()[places[key]]), (name, backend, key)
        for moment in ("exp_avg", "exp_avg_sq"):
            found, expected = local(many.state[p][moment]), one.state[q][moment]
            assert found.dtype == expected.dtype, (key, moment)
            assert torch.equal(found, expected.flatten()[places[key]]), (name, backend, key, moment)
    assert name == "bf16, stochastic" or one.state[single.up.weight]["exp_avg"].dtype == torch.int8


def _fsdp2_with_tensor_parallelism(names):
    for name in names:
        for backend in BACKENDS:
            _one_combination(name, backend)
    return True


@pytest.mark.matrix
@pytest.mark.parametrize("name", ["bf16, stochastic", "bf16, stochastic, 8-bit moments", "fp32, 8-bit moments"])
def test_random_rounding_of_fsdp2_with_tensor_parallelism_equals_the_single_process(name):
    assert run(4, _fsdp2_with_tensor_parallelism, [name]) == [True] * 4
