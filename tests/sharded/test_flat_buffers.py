"""Ranges of flat buffers, as docs/sharding.md tells of them: everything that is measured is that of the whole parameters."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import lwadamw
from lwadamw.monitor import profile_file

from .processes import run

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="runs on gloo and the CPU")

PAGE = (Path(__file__).parents[2] / "docs" / "sharding.md").read_text()
# A tau of 10 steps, and a global norm that clips.
OPTIONS = {"lr": 1e-2, "weight_decay": 10.0, "betas": (0.9, 0.95), "max_grad_norm": 0.5}
# Shape, and the dimension that tensor parallelism cuts. Process 0 has nothing of the last ones.
SHAPES: dict[str, tuple[tuple[int, ...], int | None]] = {
    "rows": ((12, 7), 0),
    "columns": ((9, 12), 1),
    "whole": ((5, 6), None),
    "wide": ((4, 32), 1),
    "bias": ((8,), 0),
    "norm": ((3,), None),
}


def documented() -> Any:
    """The function of docs/sharding.md."""
    (code,) = re.findall(r"<!-- a test runs this -->\n```python\n(.*?)```", PAGE, re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names["optimizer_of"]


def _block(shape: tuple[int, ...], dim: int | None, rank: int, size: int) -> Any:
    if dim is None or size == 1:
        return None
    share = shape[dim] // size
    return tuple((rank * share, (rank + 1) * share) if d == dim else (0, n) for d, n in enumerate(shape))


def _cut(whole: torch.Tensor, block: Any) -> torch.Tensor:
    return whole if block is None else whole[tuple(slice(a, b) for a, b in block)]


def _groups(tensor_parallel: int) -> tuple[Any, Any]:
    """The data-parallel and the tensor-parallel group of this process."""
    world, mine = dist.get_world_size(), dist.get_rank()
    data = [list(range(i, world, tensor_parallel)) for i in range(tensor_parallel)]
    tensor = [list(range(i, i + tensor_parallel)) for i in range(0, world, tensor_parallel)]
    found = []
    for ranks in (data, tensor):
        made = [(dist.new_group(some), some) for some in ranks]
        found.append(next(group for group, some in made if mine in some))
    return found[0], found[1]


def _compare(tensor_parallel: int, backend: str, folder: str) -> None:
    data, tensor = _groups(tensor_parallel)
    torch.manual_seed(0)
    wholes = {name: torch.randn(shape) for name, (shape, _) in SHAPES.items()}
    layout = {name: (shape, _block(shape, dim, tensor.rank(), tensor.size())) for name, (shape, dim) in SHAPES.items()}

    def as_buffer(values: dict[str, torch.Tensor]) -> torch.Tensor:
        return torch.cat([_cut(values[name], block).flatten() for name, (_, block) in layout.items()])

    reference = {name: nn.Parameter(whole.clone()) for name, whole in wholes.items()}
    one = lwadamw.AdamW(reference.items(), backend=backend, **OPTIONS)
    many = documented()(as_buffer(wholes), layout, data, tensor, backend=backend, **OPTIONS)
    alone, monitor = (lwadamw.Monitor(o, every=1, spectrum_every=2, steps=40) for o in (one, many))
    for step in range(4):
        generator = torch.Generator().manual_seed(step)
        grads = {name: torch.randn(whole.shape, generator=generator) for name, whole in wholes.items()}
        for name, p in reference.items():
            p.grad = grads[name]
        flat = as_buffer(grads)
        for piece in many.param_groups[0]["params"]:
            piece.grad = flat[piece.storage_offset() : piece.storage_offset() + piece.numel()]
        one.step()
        many.step()
        _check_norms(many.norms(), one.norms())
        _check_reading(monitor, alone)
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, [column.tobytes() for _, column in sorted(monitor.latest.columns.items())])
    assert len(set(map(tuple, everybody))) == 1
    path = f"{folder}/{tensor_parallel}.{backend}"
    profile = profile_file.save(monitor, f"{path}.{dist.get_rank()}.json")
    assert {s.name: s.shape for s in profile.segments} == {name: shape for name, (shape, _) in SHAPES.items()}
    assert os.path.exists(f"{path}.{dist.get_rank()}.json") == (dist.get_rank() == 0)


def _check_norms(found: Any, expected: Any) -> None:
    assert sorted(found.names) == sorted(expected.names)
    order = [found.names.index(name) for name in expected.names]
    for column in ("weight", "update", "grad", "angle"):
        loose = 1e-4 if column == "angle" else 1e-5  # the kernels add in float32, and an angle is a difference
        np.testing.assert_allclose(getattr(found, column)[order], getattr(expected, column), rtol=loose, err_msg=column)


def _check_reading(monitor: Any, alone: Any) -> None:
    found, expected = monitor.latest, alone.latest
    order = [found.names.index(name) for name in expected.names]
    assert monitor.verdicts == alone.verdicts
    for column, values in expected.columns.items():
        loose = 1e-2 if column in ("top", "second", "bulk") else 1e-4
        np.testing.assert_allclose(found.columns[column][order], values, rtol=loose, err_msg=column)
    matrices = [i for i, name in enumerate(found.names) if len(SHAPES[name][0]) == 2]
    assert np.isfinite(found.columns["top"][matrices]).all()
    assert len(matrices) == 4


def work(tensor_parallel: list[int], backends: list[str], folder: str) -> bool:
    for size in tensor_parallel:
        for backend in backends:
            _compare(size, backend, folder)
    return True


def test_norms_readings_and_spectra_of_flat_buffers_are_those_of_the_single_process(tmp_path):
    assert run(2, work, [1], ["torch"], str(tmp_path)) == [True] * 2


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("world", "tensor_parallel", "backends"), [(2, [1], ["triton"]), (2, [2], ["torch"]), (4, [2], ["torch", "triton"])]
)
def test_norms_readings_and_spectra_of_blocks_and_ranges_are_those_of_the_single_process(
    world, tensor_parallel, backends, tmp_path
):
    assert run(world, work, tensor_parallel, backends, str(tmp_path)) == [True] * world
