"""A script: a small network under Lightning and under Fabric, with torch's AdamW, with ours, and with ours and a rule."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import lightning
import torch
import torch.nn.functional as F
from lightning.pytorch.loggers import CSVLogger
from torch import nn

import lwadamw
from lwadamw.engines.lightning import callback, clip_gradients
from tests.engines.killed import HALF, STEPS, kill_at, main

VALUES = {"lr": 1e-2, "weight_decay": 0.1}
CLIP = 0.2

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32, bias=False))


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8 * STEPS

    def __getitem__(self, i: int) -> Any:
        return torch.tensor(i * 5 % 32), torch.tensor((i * 5 * 3 + 1) % 32)


def batch_of(step: int) -> Any:
    return tuple(map(torch.stack, zip(*(Data()[i] for i in range(8 * step, 8 * step + 8)), strict=True)))


def make(kind: str, model: nn.Module, **options: Any) -> Any:
    if kind == "torch":
        return torch.optim.AdamW(model.parameters(), **VALUES)
    if kind == "ours":
        return lwadamw.AdamW(model.named_parameters(), **VALUES, **options)
    groups = lwadamw.param_groups(model, {"1.weight": 8, "3.weight": 8}, roles={"3.weight": "output"})
    return lwadamw.AdamW(groups, **VALUES, **options)


class Module(lightning.LightningModule):
    doomed = False

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind, self.seen = net(), kind, []
        self.inside: list[Any] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        # A loader that cannot be resumed begins anew after a checkpoint in the middle of an epoch.
        if self.doomed:
            kill_at(self.global_step)
        x, y = batch_of(self.global_step)
        loss = F.cross_entropy(self.net(x), y)
        self.seen.append(float(loss))
        return loss

    def configure_optimizers(self) -> Any:
        return make(self.kind, self.net)

    def on_train_batch_end(self, *_: Any) -> None:
        if self.kind != "torch":
            wrapped: Any = self.optimizers()
            self.inside.append([type(wrapped).__name__, float(wrapped.norms().grad.max()), len(wrapped.state)])


def fit(
    kind: str,
    folder: Path,
    steps: int = STEPS,
    resume: Any = None,
    callbacks: Any = (),
    logger: Any = False,
    **options: Any,
) -> Any:
    module = Module(kind)
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        logger=logger,
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=CLIP,
        default_root_dir=str(folder),
        callbacks=list(callbacks),
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(module, torch.utils.data.DataLoader(Data(), batch_size=8), ckpt_path=resume)
    return trainer, module


def plain() -> list[float]:
    model, losses = net(), []
    optimizer = make("rule", model, max_grad_norm=CLIP)
    for x, y in torch.utils.data.DataLoader(Data(), batch_size=8):
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


class Fabricated:
    """A loop of Fabric."""

    def __init__(self, kind: str) -> None:
        self.kind, model = kind, net()
        self.fabric = lightning.Fabric(accelerator="cpu", devices=1)
        self.model, self.optimizer = self.fabric.setup(model, make(kind, model))

    def train(self, steps: range, doomed: bool = False) -> list[float]:
        losses = []
        for step in steps:
            x, y = batch_of(step)
            loss = F.cross_entropy(self.model(x), y)
            self.fabric.backward(loss)
            if doomed:
                kill_at(step)
            if self.kind == "rule":
                clip_gradients(self.optimizer, CLIP)
            else:
                self.fabric.clip_gradients(self.model, self.optimizer, max_norm=CLIP)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    def state(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer}


def first(folder: Path, noted: dict[str, Any]) -> None:
    noted["torch"] = fit("torch", folder)[1].seen
    noted["ours"] = fit("ours", folder)[1].seen
    noted["plain"] = plain()
    noted["fabric"] = {kind: Fabricated(kind).train(range(STEPS)) for kind in ("torch", "ours")}
    loop = Fabricated("rule")
    monitor = lwadamw.Monitor(loop.optimizer, every=5)
    noted["fabric"]["rule"], noted["fabric"]["plain"] = loop.train(range(STEPS)), noted["plain"]
    noted["fabric logged"] = monitor.as_dict()
    noted["norms of the wrapper"] = float(loop.optimizer.norms().weight.min())
    watch, logger = callback(every=5, prefix="norms/"), CSVLogger(str(folder), name="", version="logs")
    trainer, module = fit("rule", folder, callbacks=[watch], logger=logger)
    logger.save()
    noted["rule"], noted["inside"], noted["clips"] = module.seen, module.inside, trainer.optimizers[0].max_grad_norm
    noted["last"] = {k: list(v) for k, v in watch.monitor.latest.columns.items()}
    noted["bf16"] = clipped_in_bf16(folder)


def doomed(folder: Path) -> None:
    loop = Fabricated("rule")
    loop.train(range(HALF))
    loop.fabric.save(folder / "fabric.ckpt", loop.state())
    saved = lightning.pytorch.callbacks.ModelCheckpoint(folder, "half", every_n_train_steps=HALF)
    Module.doomed = True
    fit("rule", folder, callbacks=[callback(every=5), saved], enable_checkpointing=True)


def clipped_in_bf16(folder: Path) -> list[Any]:
    """Train in bf16-mixed with an optimizer that leaves unscaling to its step, as on a GPU. Without the callback: the error."""

    class OnGpu(Module):
        def configure_optimizers(self) -> Any:
            return lwadamw.AdamW(self.net.named_parameters(), fused=True, **VALUES)

    out: list[Any] = []
    for callbacks in ([], [callback(every=1)]):
        globals()["Module"], former = OnGpu, globals()["Module"]
        try:
            trainer, module = fit("ours", folder, 3, callbacks=callbacks, precision="bf16-mixed")
            out.append([module.seen, float(trainer.optimizers[0].norms().grad.max())])
        except RuntimeError as error:
            out.append(str(error))
        finally:
            globals()["Module"] = former
    return out


def second(folder: Path, noted: dict[str, Any]) -> None:
    watch, logger = (
        callback(every=5, prefix="norms/", roles_only=True),
        CSVLogger(str(folder), name="", version="roles"),
    )
    trainer, module = fit("rule", folder, resume=str(folder / "half.ckpt"), callbacks=[watch], logger=logger)
    logger.save()
    noted["resumed"] = module.seen
    noted["resumed last"] = {k: list(v) for k, v in watch.monitor.latest.columns.items()}
    noted["multipliers"] = sorted({group["width_lr_mult"] for group in trainer.optimizers[0].param_groups})
    loop = Fabricated("rule")
    loop.fabric.load(folder / "fabric.ckpt", loop.state())
    noted["fabric"]["resumed"] = loop.train(range(HALF, STEPS))


if __name__ == "__main__":
    main(first, doomed, second)
