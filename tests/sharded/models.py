"""Small models that are sharded in every way torch has, and the single process that they are compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

import lwadamw

VOCABULARY, BATCH = 11, 24
FSDP2_ON_CPU = hasattr(torch.cpu.Stream, "record_event")  # torch 2.6 cannot run the forward pass of FSDP2 on the CPU
OPTIONS: dict[str, Any] = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}


class Block(nn.Module):
    def __init__(self, d: int, hidden: int, residual: bool) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, hidden), nn.Linear(hidden, d, bias=residual)
        self.residual = residual

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.down(torch.relu(self.up(self.norm(x))))
        return x + y if self.residual else y


class Net(nn.Module):
    """An embedding, a block and a head. Sizes that the number of processes does not divide leave uneven shards."""

    def __init__(self, d: int, hidden: int, residual: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, d)
        self.layers = nn.ModuleList([Block(d, hidden, residual)])
        self.norm, self.head = nn.LayerNorm(d), nn.Linear(d, VOCABULARY, bias=False)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(self.norm(x)) * self.gain


def net(d: int, hidden: int, residual: bool = True) -> Net:
    torch.manual_seed(0)
    return Net(d, hidden, residual)


def fsdp2(model: nn.Module, mesh: Any) -> nn.Module:
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def tensor_parallel(model: nn.Module, mesh: Any) -> nn.Module:
    for layer in model.layers:
        parallelize_module(layer, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


def sequence_parallel(model: nn.Module, mesh: Any) -> nn.Module:
    """Split activations by rows between the blocks. Then gradients of norms and biases are Partial, and on their way."""
    for layer in model.layers:
        plan = {
            "norm": SequenceParallel(sequence_dim=0),
            "up": ColwiseParallel(input_layouts=Shard(0)),
            "down": RowwiseParallel(output_layouts=Shard(0), use_local_output=True),
        }
        parallelize_module(layer, mesh, plan)
    return parallelize_module(
        model, mesh, {"head": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate())}
    )


class Rows(nn.Module):
    """A block and a head over rows of features, for sequence parallelism."""

    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block(d, hidden, False)])
        self.head = nn.Linear(d, VOCABULARY, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def batch(step: int, width: int | None) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7 * step + 1)
    words = torch.randint(0, VOCABULARY, (BATCH,), generator=generator)
    inputs = words if width is None else torch.randn(BATCH, width, generator=generator)
    return inputs, (words * 3 + 1) % VOCABULARY


def backward(model: nn.Module, step: int, part: tuple[int, int] = (0, 1), width: int | None = None) -> None:
    """Leave gradients of the mean loss over this process's part of a batch, as (index, number of parts)."""
    x, y = batch(step, width)
    index, parts = part
    if width is not None:
        x = x.chunk(parts)[index]
    else:
        x, y = x.chunk(parts)[index], y.chunk(parts)[index]
    out = model(x)
    F.cross_entropy((out.full_tensor() if isinstance(out, DTensor) else out).float(), y).backward()


def whole(tensor: Any) -> torch.Tensor:
    tensor = tensor.detach()
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).clone()


class Layout(NamedTuple):
    """A model and a way to shard it.

    Attributes:
        whole: makes the model of a single process.
        wrap: shards it.
        part: this process's part of a batch, as (index, number of parts).
        width: number of features of the rows that the model takes. None: it takes words.
        calls: number of all-reduces of a clipped step. None: gradients have to be moved too.
    """

    whole: Callable[[], nn.Module]
    wrap: Callable[[nn.Module], nn.Module]
    part: tuple[int, int]
    width: int | None = None
    calls: int | None = 1

    def backward(self, model: nn.Module, step: int, *, single: bool = False) -> None:
        """Leave gradients of a step, in the model of a single process or in the sharded model."""
        backward(model, step, (0, 1) if single else self.part, self.width)


def rows(d: int, hidden: int) -> Rows:
    torch.manual_seed(0)
    return Rows(d, hidden)


def layouts(world: int) -> dict[str, Layout]:
    """Return ways to shard models over a number of processes. The sizes 10 and 13 leave uneven shards.

    Only 2 processes have ways without FSDP2, which this torch may not have on the CPU.
    """
    rank = dist.get_rank()
    flat = init_device_mesh("cpu", (world,))
    found: dict[str, Layout] = {}
    if world < 4:
        found["FSDP2"] = Layout(lambda: net(10, 13), lambda m: fsdp2(m, flat), (rank, world))
    if world == 2:
        found["TP"] = Layout(lambda: net(8, 12), lambda m: tensor_parallel(m, flat), (0, 1))
        found["SP"] = Layout(lambda: rows(8, 12), lambda m: sequence_parallel(m, flat), (rank, world), 8, None)
    if world == 4:
        square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        data = square.get_local_rank("dp")
        found["HSDP"] = Layout(lambda: net(10, 13), lambda m: fsdp2(m, hybrid), (rank, world))
        found["FSDP2 x TP"] = Layout(
            lambda: net(8, 12),
            lambda m: fsdp2(tensor_parallel(m, square["tp"]), square["dp"]),
            (data, 2),
            calls=2,
        )
    return found if FSDP2_ON_CPU else {name: way for name, way in found.items() if name in ("TP", "SP")}


def optimizer(model: nn.Module | dict[str, nn.Parameter], backend: str, **options: Any) -> lwadamw.AdamW:
    params = model.items() if isinstance(model, dict) else model.named_parameters()
    return lwadamw.AdamW(params, backend=backend, **{**OPTIONS, **options})
