"""A model, its layouts over some of the processes, and saving and loading it through torch's distributed checkpoint."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from lwadamw import AdamW
from lwadamw.state.combinations import COMBINATIONS


class Net(nn.Module):
    """Matrices whose rows are whole blocks, and a matrix of which two rows together are; a large vector; few elements."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(256, 96), nn.Linear(256, 48, bias=False)
        self.odd, self.bundles = nn.Parameter(torch.empty(33, 256)), nn.Parameter(torch.empty(64, 192))
        self.vector, self.few = nn.Parameter(torch.empty(4099)), nn.Parameter(torch.empty(3))


def meshes() -> dict[str, Any]:
    """Return the mesh of each layout over the first processes of four. All processes have to make the call."""
    found = {f"FSDP2, {n}": DeviceMesh("cpu", list(range(n))) for n in (1, 2, 3, 4)}
    square = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("dp", "tp"))
    return {**found, "whole": found["FSDP2, 1"], "row-parallel, 2": found["FSDP2, 2"], "FSDP2 x TP": square}


def all_of_them() -> Any:
    """Return a mesh of all processes."""
    return init_device_mesh("cpu", (dist.get_world_size(),))


def is_member(mesh: Any) -> bool:
    return mesh.get_coordinate() is not None


def group_of(mesh: Any) -> Any:
    return dist.group.WORLD if mesh.ndim == 2 else mesh.get_group()


def make(
    name: str, layout: str, mesh: Any, options: Any = None, seed: int = 0, backend: str = "torch"
) -> tuple[nn.Module, AdamW]:
    """Return a model and an optimizer of a combination. `options` replace the options of the combination."""
    torch.manual_seed(seed)
    model = Net()
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape))
    model.to(COMBINATIONS[name].param)
    if layout == "row-parallel, 2":
        parallelize_module(model, mesh, {"down": RowwiseParallel()})
    elif layout == "FSDP2 x TP":
        parallelize_module(model, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(model, mesh=mesh["dp"])
    elif layout != "whole":
        fully_shard(model, mesh=mesh)
    named = list(model.named_parameters())
    groups = [{"params": named[:3], "width_lr_mult": 0.5}, {"params": named[3:], "lr": 2e-2}]
    return model, AdamW(
        groups, lr=1e-2, backend=backend, **(COMBINATIONS[name].options if options is None else options)
    )


def step(model: nn.Module, optimizer: AdamW, seed: int) -> None:
    """Take a step on gradients that are the same in every layout but the strided one."""
    torch.manual_seed(seed)
    for p in model.parameters():
        grad = (torch.randn(p.shape) * 0.01).to(p.dtype)
        if not isinstance(p, DTensor):
            p.grad = grad
        elif all(type(placement).__name__ != "_StridedShard" for placement in p.placements):
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
        else:
            p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


def whole(tensor: Any) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def snapshot(model: nn.Module, optimizer: AdamW) -> dict[str, torch.Tensor]:
    """Return everything that is kept, of whole parameters: parameters, weights in float32, steps, and state bit for bit."""
    found = {}
    for name, p in model.named_parameters():
        found |= {name: whole(p), f"{name}.whole": whole(optimizer.master_weight(p))}
        for key, value in optimizer.state[p].items():
            # gloo does not gather int16, and scales may have several shapes.
            bits = whole(value.int() if value.dtype == torch.int16 else value).to(value.dtype)
            found[f"{name}.{key}"] = bits.flatten() if key.endswith("scale") else bits
    return found


def tensors_of(model: nn.Module, optimizer: AdamW, flat: bool) -> dict[str, Any]:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, optimizer, options=options)}


def save(model: nn.Module, optimizer: AdamW, path: str, flat: bool, group: Any) -> None:
    dcp.save(tensors_of(model, optimizer, flat), checkpoint_id=path, process_group=group)


def load(model: nn.Module, optimizer: AdamW, path: str, flat: bool, group: Any) -> None:
    tensors = tensors_of(model, optimizer, flat)
    dcp.load(tensors, checkpoint_id=path, process_group=group)
    set_model_state_dict(model, tensors["model"])
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    set_optimizer_state_dict(model, optimizer, tensors["optim"], options=options)


def alike(value: Any, group: Any) -> None:
    """Raise unless every process of a group has the same value."""
    values: list[Any] = [None] * group.size()
    dist.all_gather_object(values, value, group=group)
    assert all(v == values[0] for v in values), values
