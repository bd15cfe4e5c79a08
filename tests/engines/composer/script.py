"""A script: a small network under Composer's Trainer, with torch's AdamW, with ours, and with ours and a rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import lwadamw
from lwadamw.engines.composer import callback
from lwadamw.loggers import report_to_composer
from tests.engines.composer.on_cpu import composer
from tests.engines.killed import HALF, STEPS, kill_at, main

VALUES = {"lr": 1e-2, "weight_decay": 0.1}
CLIP = 0.2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32, bias=False))


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8 * STEPS

    def __getitem__(self, i: int) -> Any:
        return torch.tensor(i * 5 % 32), torch.tensor((i * 5 * 3 + 1) % 32)


class Model(composer.ComposerModel):
    doomed = False

    def __init__(self) -> None:
        super().__init__()
        self.net, self.seen = net(), []

    def forward(self, batch: Any) -> torch.Tensor:
        if self.doomed:
            kill_at(len(self.seen))
        return self.net(batch[0])

    def loss(self, outputs: torch.Tensor, batch: Any, *_: Any) -> torch.Tensor:
        loss = F.cross_entropy(outputs, batch[1])
        self.seen.append(float(loss.detach()))
        return loss


def make(kind: str, model: nn.Module, **options: Any) -> Any:
    if kind == "torch":
        return torch.optim.AdamW(model.parameters(), **VALUES)
    if kind == "ours":
        return lwadamw.AdamW(model.named_parameters(), **VALUES, **options)
    groups = lwadamw.param_groups(model, {"1.weight": 8, "3.weight": 8}, roles={"3.weight": "output"})
    return lwadamw.AdamW(groups, **VALUES, **options)


def trainer_of(kind: str, **options: Any) -> Any:
    model = Model()
    return composer.Trainer(
        model=model,
        optimizers=make(kind, model.net),
        train_dataloader=torch.utils.data.DataLoader(Data(), batch_size=8),
        max_duration=f"{STEPS}ba",
        device="cpu",
        algorithms=[composer.algorithms.GradientClipping("norm", CLIP)],
        progress_bar=False,
        **options,
    )


def fit(kind: str, **options: Any) -> Any:
    trainer = trainer_of(kind, **options)
    trainer.fit()
    return trainer


def losses(trainer: Any) -> list[float]:
    return trainer.state.model.seen


def plain() -> list[float]:
    model, seen = net(), []
    optimizer = make("rule", model, max_grad_norm=CLIP)
    for x, y in torch.utils.data.DataLoader(Data(), batch_size=8):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen.append(float(loss.detach()))
    return seen


def series(logger: Any, name: str) -> list[list[float]]:
    return [[int(timestamp.batch), float(value)] for timestamp, value in logger.data[name]]


def monitored_by_composer() -> dict[str, Any]:
    """Return what OptimizerMonitor logs of the optimizer, and the norms of the optimizer itself after the last step."""
    logger = composer.loggers.InMemoryLogger()
    trainer = trainer_of(
        "ours", callbacks=[composer.callbacks.OptimizerMonitor(batch_log_interval=STEPS)], loggers=[logger]
    )
    report_to_composer(trainer.state.optimizers[0])
    trainer.fit()
    norms = trainer.state.optimizers[0].norms()
    logged = {kind: series(logger, f"l2_norm/{kind}/net.1.weight") for kind in ("param", "update")}
    clipped = series(logger, "l2_norm/grad/global")
    return {"logged": logged, "weight": norms.weight[1], "update": norms.update[1], "clipped": clipped}


def first(folder: Path, noted: dict[str, Any]) -> None:
    noted["torch"], noted["ours"], noted["plain"] = losses(fit("torch")), losses(fit("ours")), plain()
    noted["by composer"] = monitored_by_composer()
    watch, logger = callback(every=5, prefix="norms/"), composer.loggers.InMemoryLogger()
    trainer = fit("rule", callbacks=[watch], loggers=[logger])
    noted["rule"] = losses(trainer)
    noted["logged"] = series(logger, "norms/weight_rms/1.weight")
    noted["last of a role"] = logger.data["norms/role/matrix/weight_norm"][-1][1]
    noted["norms"] = [
        watch.monitor.latest.norms.weight[i] for i, role in enumerate(watch.monitor.latest.roles) if role == "matrix"
    ]
    noted["last"] = {k: list(v) for k, v in watch.monitor.latest.columns.items()}


def doomed(folder: Path) -> None:
    Model.doomed = True
    fit("rule", callbacks=[callback(every=5)], save_folder=str(folder / "saved"), save_interval=f"{HALF}ba")


def second(folder: Path, noted: dict[str, Any]) -> None:
    watch, logger = callback(every=5, prefix="norms/", roles_only=True), composer.loggers.InMemoryLogger()
    path = str(next((folder / "saved").glob(f"ep*ba{HALF}-rank0.pt")))
    trainer = fit("rule", callbacks=[watch], loggers=[logger], load_path=path)
    noted["by role"] = sorted(name for name in logger.data if name.startswith("norms/"))
    noted["resumed"] = losses(trainer)
    noted["resumed last"] = {k: list(v) for k, v in watch.monitor.latest.columns.items()}
    noted["multipliers"] = sorted({group["width_lr_mult"] for group in trainer.state.optimizers[0].param_groups})


if __name__ == "__main__":
    main(first, doomed, second)
