"""The scale model counts what real processes hold and send."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from bench import scale
from tests.sharded.processes import run

pytestmark = [
    pytest.mark.matrix,
    pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU"),
]
SHAPES = scale.llama_405b(layers=2, d=10, kv=4, ffn=14, vocab=22)  # 4 processes divide none of them but kv
COUNTS = ("elements", "moved", "step", "norms", "tables")


def layouts(world):
    return [
        scale.Layout("FSDP2"),
        *([scale.Layout("HSDP", shard=2), scale.Layout("FSDP2 x TP", tensor=2)] if world == 4 else []),
    ]


class Model(nn.Module):
    """A module for each parameter of SHAPES, under the same name."""

    def __init__(self):
        super().__init__()
        for shape in SHAPES:
            *path, last, _ = shape.name.split(".")
            owner = self
            for name in path:
                owner._modules.setdefault(name, nn.Module())
                owner = owner._modules[name]
            rows, *cols = shape.sizes
            owner.add_module(last, nn.Linear(cols[0], rows, bias=False) if cols else nn.RMSNorm(rows))


def _real(world):
    """Return what each layout's process counts, after comparing its parameters with those of torch's own wrappers."""
    results = []
    for layout in layouts(world):
        mesh, model = layout.mesh(world), Model()
        plan = {0: ColwiseParallel(), 1: RowwiseParallel()}
        if layout.tensor > 1:
            split = {s.name.removesuffix(".weight"): plan[s.split] for s in SHAPES if s.split is not None}
            parallelize_module(model, mesh["tensor"], split)
        fully_shard(model, mesh=mesh if layout.tensor == 1 else mesh["shard"])
        theirs = dict(model.named_parameters())
        ours, _ = scale.make_shards(SHAPES, layout, mesh)
        for shape, p in zip(SHAPES, ours, strict=True):
            q = theirs[shape.name]
            assert p.to_local().shape == q.to_local().shape, (layout.name, shape.name)
            if layout.tensor == 1 or shape.split is not None:
                assert p.placements == q.placements, (layout.name, shape.name)
        found = scale.measure(SHAPES, layout, world)
        results.append({key: found[key] for key in COUNTS})
    return results


@pytest.mark.parametrize("world", [1, 2, 4])
def test_real_processes_hold_and_send_what_the_scale_model_counts(world):
    real = run(world, _real, world)
    for rank in range(world):
        for layout, found in zip(layouts(world), real[rank], strict=True):
            with scale.pretended(world, rank):
                predicted = scale.measure(SHAPES, layout, world)
            assert found == {key: predicted[key] for key in COUNTS}, (layout.name, rank)
    sent = [(len(r["step"]["groups"]), len(r["norms"]["groups"])) for r in real[0]]
    assert sent == {1: [(0, 0)], 2: [(1, 1)], 4: [(1, 1), (1, 1), (2, 2)]}[world]
    assert not dist.is_initialized()
