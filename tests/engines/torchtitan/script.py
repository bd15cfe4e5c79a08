"""A script: torchtitan's containers of optimizers and schedulers over FSDP2, with torch's AdamW, ours, and ours with a rule."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

import lwadamw
from lwadamw.engines import torchtitan
from tests.engines.killed import HALF, STEPS, kill_at, main

VALUES = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95)}
WIDTHS = {"layers.0.weight": 8, "out.weight": 8}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.layers = nn.Embedding(32, 16), nn.ModuleList([nn.Linear(16, 32)])
        self.norm, self.out = nn.LayerNorm(32), nn.Linear(32, 32, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(torch.relu(self.layers[0](self.embed(x)))))


def net() -> nn.Module:
    torch.manual_seed(0)
    return Net()


def config(kind: str) -> Any:
    if kind == "torch":
        groups = [ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=dict(VALUES))]
        return OptimizersContainer.Config(implementation="for-loop", param_groups=groups)
    return torchtitan.config(**VALUES, base_width=WIDTHS if kind == "rule" else None)


def build(kind: str) -> tuple[nn.Module, Any, Any]:
    model = net()
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    optimizers = config(kind).build(model_parts=[model])
    schedulers = LRSchedulersContainer.Config(warmup_steps=2, decay_ratio=0.5).build(
        optimizers=optimizers, training_steps=STEPS + 1
    )
    return model, optimizers, schedulers


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(8 * step, 8 * step + 8) * 5 % 32
    return x, (x * 3 + 1) % 32


def train(model: nn.Module, optimizers: Any, schedulers: Any, steps: range, doomed: bool = False) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(step)
        optimizers.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        if doomed:
            kill_at(step)
        optimizers.step()
        schedulers.step()
        losses.append(float(loss.detach()))
    return losses


def plain() -> list[float]:
    """The rule in a plain loop without torchtitan and FSDP2, with the schedule that torchtitan computes."""
    _, _, container = build("ours")
    factor = container.schedulers[0].lr_lambdas[0]
    model, losses = net(), []
    optimizer = lwadamw.AdamW(lwadamw.param_groups(model, WIDTHS), **VALUES)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    for step in range(STEPS):
        x, y = batch(step)
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    return losses


def states(model: nn.Module, optimizers: Any, schedulers: Any) -> dict[str, Any]:
    return {"model": model.state_dict(), "optimizer": optimizers.state_dict(), "scheduler": schedulers.state_dict()}


def alone(folder: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{folder}/store{os.getpid()}", rank=0, world_size=1)


def first(folder: Path, noted: dict[str, Any]) -> None:
    alone(folder)
    noted["plain"] = plain()
    noted["torch"] = train(*build("torch"), range(STEPS))
    noted["ours"] = train(*build("ours"), range(STEPS))
    made = build("rule")
    monitor = lwadamw.Monitor(made[1].optimizers[0], every=5)
    noted["rule"] = train(*made, range(STEPS))
    noted["logged"] = sorted(monitor.as_dict("norms/"))
    noted["names"] = [name for group in made[1].optimizers[0].param_groups for name in group["param_names"]]


def doomed(folder: Path) -> None:
    made = build("rule")
    train(*made, range(HALF))
    dcp.save(states(*made), checkpoint_id=folder / "checkpoint")
    train(*made, range(HALF, STEPS), doomed=True)


def second(folder: Path, noted: dict[str, Any]) -> None:
    alone(folder)
    made = build("rule")
    with torch.no_grad():
        for p in made[0].parameters():
            p.zero_()
    loaded = states(*made)
    dcp.load(loaded, checkpoint_id=folder / "checkpoint")
    for part, state in zip(made, loaded.values(), strict=True):
        part.load_state_dict(state)
    noted["resumed"] = train(*made, range(HALF, STEPS))


if __name__ == "__main__":
    main(first, doomed, second)
