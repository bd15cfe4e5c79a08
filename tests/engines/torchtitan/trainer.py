"""A script: torchtitan's Trainer with the config of examples/torchtitan, with torch's AdamW, ours, and ours with a rule."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from tests.engines.torchtitan import on_cpu  # before torchtitan

from torchtitan.components.metrics import BaseLogger  # isort: skip
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig  # isort: skip
from torchtitan.config import ConfigManager  # isort: skip

import lwadamw
from lwadamw.engines import torchtitan
from tests.engines.killed import HALF, STEPS, kill_at, main

VALUES = {"lr": 3e-3, "weight_decay": 0.1, "betas": (0.9, 0.95)}


class Logger(BaseLogger):
    """Keeps what it is given."""

    def __init__(self) -> None:
        self.logged: dict[int, dict[str, float]] = {}

    def log(self, metrics: dict[str, Any], step: int) -> None:
        self.logged.setdefault(step, {}).update(metrics)


def build(kind: str, folder: Path, interval: int | None = None) -> tuple[Any, Logger]:
    """A trainer from torchtitan's command line, and its logger."""
    config = ConfigManager().parse_args(["--module", "examples.torchtitan.width", "--config", "llama3_width"])
    if kind == "rule":
        config = torchtitan.watched(config, every=5, roles_only=interval is not None)
    if kind == "ours":
        config.optimizer = torchtitan.config(**VALUES)
    if kind == "torch":
        groups = [ParamGroupConfig(pattern=".*", optimizer_name="AdamW", optimizer_kwargs=dict(VALUES))]
        config.optimizer = OptimizersContainer.Config(implementation="fused", param_groups=groups)
    if dist.is_initialized():
        dist.destroy_process_group()
    trainer = on_cpu.small(config, str(folder), STEPS, interval).build()
    logger = trainer.metrics_processor.logger = Logger()
    return trainer, logger


def train(kind: str, folder: Path, interval: int | None = None) -> tuple[list[float], Logger, Any]:
    trainer, logger = build(kind, folder, interval)
    trainer.train()
    gc.enable()
    names = [key for values in logger.logged.values() for key in values if key.endswith("global_avg_loss")]
    losses = [values[names[0]] for values in logger.logged.values() if names[0] in values]
    return losses, logger, trainer


def plain(folder: Path) -> list[float]:
    """The rule in a plain loop on torchtitan's model, with the clipping and the schedule of its Trainer."""
    trainer, _ = build("ours", folder)
    (model,), factor = trainer.model_parts, trainer.lr_schedulers.schedulers[0].lr_lambdas[0]
    optimizer = lwadamw.AdamW(lwadamw.param_groups(model, 64), max_grad_norm=1.0, **VALUES)
    scheduler, losses = torch.optim.lr_scheduler.LambdaLR(optimizer, factor), []
    for step in range(STEPS):
        x, positions, y = on_cpu.batch(step)
        loss = F.cross_entropy(model(x, positions=positions).flatten(0, 1).float(), y.flatten())
        loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def first(folder: Path, noted: dict[str, Any]) -> None:
    noted["plain"] = plain(folder / "plain")
    for kind in ("torch", "ours", "rule"):
        noted[kind], logger, trainer = train(kind, folder / kind)
    noted["logged"] = {
        step: values for step, values in logger.logged.items() if "norms/role/matrix/weight_rms" in values
    }
    noted["class"] = type(trainer.optimizers.optimizers[0]).__module__
    noted["monitor"] = trainer.monitors[0].state_dict()
    config = ConfigManager().parse_args(["--module", "examples.torchtitan.width", "--config", "llama3_width_watched"])
    noted["config"] = [type(config).__qualname__, config.optimizer.base_width]


def doomed(folder: Path) -> None:
    on_cpu.Data.watch = staticmethod(kill_at)
    train("rule", folder / "killed", HALF)


def second(folder: Path, noted: dict[str, Any]) -> None:
    noted["resumed"], logger, trainer = train("rule", folder / "killed", HALF)
    noted["resumed steps"] = [
        step for step, values in logger.logged.items() if "norms/role/matrix/weight_rms" in values
    ]
    keys = {key for values in logger.logged.values() for key in values if key.startswith("norms/")}
    noted["resumed keys"] = sorted(key for key in keys if not key.startswith("norms/role/"))
    noted["resumed monitor"] = trainer.monitors[0].state_dict()


if __name__ == "__main__":
    main(first, doomed, second)
