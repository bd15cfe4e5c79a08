"""A script: a small network under DeepSpeed's ZeRO 1 and 2 on one process, with torch's AdamW, ours, and ours with a rule."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(
    DS_ACCELERATOR="cpu", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT="29577"
)

import deepspeed
import torch
import torch.nn.functional as F
from torch import nn

import lwadamw
from lwadamw.engines.deepspeed import AdamW
from tests.engines.killed import HALF, STEPS, kill_at, main

VALUES = {"lr": 1e-2, "weight_decay": 0.1}
CLIP = 0.5

# DeepSpeed would compile a collective for shared memory.
sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32, bias=False))


def groups(model: nn.Module) -> Any:
    return lwadamw.param_groups(model, {"1.weight": 8, "3.weight": 8}, roles={"3.weight": "output"})


def build(kind: str, stage: int = 1, logs: Path | None = None) -> tuple[Any, Any]:
    model = net()
    if kind == "torch":
        optimizer: Any = torch.optim.AdamW(model.parameters(), **VALUES)
    else:
        optimizer = AdamW(groups(model) if kind == "rule" else model.named_parameters(), **VALUES)
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "csv_monitor": {"enabled": logs is not None, "output_path": str(logs), "job_name": "run"},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0], optimizer


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.arange(8 * step, 8 * step + 8) * 5 % 32
    return x, (x * 3 + 1) % 32


def train(engine: Any, steps: range, seen: Callable[[int], None] = lambda step: None) -> list[float]:
    losses = []
    for step in steps:
        x, y = batch(step)
        loss = F.cross_entropy(engine(x), y)
        engine.backward(loss)
        seen(step)
        engine.step()
        losses.append(float(loss.detach()))
    return losses


def plain() -> list[float]:
    """The rule in a plain loop without DeepSpeed."""
    model, losses = net(), []
    optimizer = lwadamw.AdamW(groups(model), max_grad_norm=CLIP, **VALUES)
    for step in range(STEPS):
        x, y = batch(step)
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def first(folder: Path, noted: dict[str, Any]) -> None:
    deepspeed.init_distributed("gloo", init_method=f"file://{folder}/store1", rank=0, world_size=1)
    noted["plain"] = plain()
    noted["torch"] = train(build("torch")[0], range(STEPS))
    noted["ours"] = train(build("ours")[0], range(STEPS))
    noted["torch, stage 2"] = train(build("torch", 2)[0], range(STEPS))
    noted["rule, stage 2"] = train(build("rule", 2)[0], range(STEPS))
    engine, optimizer = build("rule", logs=folder / "logs")
    monitor = lwadamw.Monitor(optimizer, every=5)
    monitor.on_reading.append(
        lambda _: engine.monitor.write_events([(k, v, monitor.step) for k, v in monitor.as_dict("norms/").items()])
    )
    rule = train(engine, range(HALF))
    sorts = [part._torch for part in optimizer._parts.values()]
    noted["rule"] = rule + train(engine, range(HALF, STEPS))
    noted["backends kept"] = [part._torch is was for part, was in zip(optimizer._parts.values(), sorts, strict=True)]
    noted["counted"], noted["names"] = monitor.step, list(monitor.latest.names)
    noted["weights"] = optimizer.norms().weight.tolist()
    noted["expected"] = [
        float(torch.cat([p.detach().flatten() for p in group["params"]]).norm()) for group in optimizer.param_groups
    ]


def doomed(folder: Path) -> None:
    engine, _ = build("rule")
    train(engine, range(HALF))
    engine.save_checkpoint(str(folder / "checkpoint"), tag="half")
    train(engine, range(HALF, STEPS), kill_at)


def second(folder: Path, noted: dict[str, Any]) -> None:
    deepspeed.init_distributed("gloo", init_method=f"file://{folder}/store2", rank=0, world_size=1)
    engine, _ = build("rule")
    engine.load_checkpoint(str(folder / "checkpoint"), tag="half")
    noted["resumed"] = train(engine, range(HALF, STEPS))


if __name__ == "__main__":
    main(first, doomed, second)
