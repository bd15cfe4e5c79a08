"""reduce_sums: sums of one process become those of whole parameters, for programs that reduce by themselves."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import lwadamw

from .processes import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")


def _sums(world):
    rank, mesh = dist.get_rank(), init_device_mesh("cpu", (world,))
    weights = {
        "split": torch.arange(7.0),
        "whole": torch.arange(3.0),
        "cut": torch.arange(8.0),
        "own": torch.arange(4.0),
    }
    params = {
        "split": nn.Parameter(distribute_tensor(weights["split"], mesh, [Shard(0)])),
        "whole": nn.Parameter(distribute_tensor(weights["whole"], mesh, [Replicate()])),
        "cut": nn.Parameter(weights["cut"][:3] if rank == 0 else weights["cut"][3:]),
    }
    if rank == 1:
        params["own"] = nn.Parameter(weights["own"].clone())
    told = {"cut": dist.group.WORLD, "own": [dist.group.WORLD]}
    optimizer = lwadamw.AdamW(params.items(), lr=0.0, weight_decay=0.0, backend="torch", shard_group=told)
    for p in params.values():
        p.grad = torch.ones_like(p)
    optimizer.step()
    names, sums = optimizer.norm_names(), optimizer.norm_sums(local=True)
    found, whole = lwadamw.reduce_sums(torch.cat([sums, sums[:, :1]], 1), names, params, shard_group=told)
    assert torch.equal(whole[:, :4], optimizer.norm_sums())
    assert torch.equal(whole[:, 4], whole[:, 0])
    assert dict(zip(found, whole[:, 0].tolist(), strict=True)) == {
        name: float(w.square().sum()) for name, w in weights.items()
    }
    norms = lwadamw.Norms.from_sums(found, whole[:, :4])
    assert norms.as_dict()["weight/split"] == pytest.approx(float(weights["split"].norm()))
    return found


def test_sums_of_one_process_become_sums_over_whole_parameters():
    first, second = run(2, _sums, 2)
    assert first == second


def test_parts_of_a_parameter_are_split_as_the_parameter_is():
    names, sums = lwadamw.reduce_sums(torch.ones(2, 3), ["w[0]", "w[1]"], [("w", torch.zeros(4))])
    assert names == ["w[0]", "w[1]"]
    assert torch.equal(sums, torch.ones(2, 3))


def test_rows_without_a_name_or_a_parameter_are_refused():
    with pytest.raises(ValueError, match=r"sums have shape \(3, 4\), 1 names need \(1, k\)"):
        lwadamw.reduce_sums(torch.ones(3, 4), ["w"], {})
    p = nn.Parameter(torch.ones(2))
    optimizer = lwadamw.AdamW([("w", p)])
    p.grad = torch.ones(2)
    optimizer.step()
    sums, names = optimizer.norm_sums(local=True), optimizer.norm_names()
    with pytest.raises(ValueError, match=r"no 'w'\. Give those of the optimizer: (.*)\.$") as refused:
        lwadamw.reduce_sums(sums, names, {"_orig_mod.w": p})
    remedy = str(refused.value).partition("optimizer: ")[2].removesuffix(".")
    assert lwadamw.reduce_sums(sums, names, eval(remedy, {"optimizer": optimizer, "zip": zip}))[0] == ["w"]
