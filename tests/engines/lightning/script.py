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
from tests.engines.killed import HALF, STEPS, main

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
    groups = lwadamw.param_groups(model, {"1.weight": 8, "3.weight": 8})
    return lwadamw.AdamW(groups, **VALUES, **options)


class Module(lightning.LightningModule):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.net, self.kind, self.seen = net(), kind, []
        self.inside: list[Any] = []

    def training_step(self, batch: Any, _: int) -> torch.Tensor:
        # A loader that cannot be resumed begins anew after a checkpoint in the middle of an epoch.
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
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        gradient_clip_val=CLIP,
        default_root_dir=str(folder),
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, torch.utils.data.DataLoader(Data(), batch_size=8), ckpt_path=resume)
    return trainer, module


def plain(kind: str = "rule", fabric: bool = False) -> list[float]:
    model, losses = net(), []
    optimizer = make(kind, model, max_grad_norm=None if fabric else CLIP)
    wrapped: Any = optimizer
    runner: Any = None
    if fabric:
        runner = lightning.Fabric(accelerator="cpu", devices=1)
        model, wrapped = runner.setup(model, optimizer)
    for x, y in torch.utils.data.DataLoader(Data(), batch_size=8):
        loss = F.cross_entropy(model(x), y)
        if fabric:
            runner.backward(loss)
            clip_gradients(wrapped, CLIP) if kind == "rule" else runner.clip_gradients(model, wrapped, max_norm=CLIP)
        else:
            loss.backward()
        wrapped.step()
        wrapped.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def first(folder: Path, noted: dict[str, Any]) -> None:
    noted["torch"] = fit("torch", folder)[1].seen
    noted["ours"] = fit("ours", folder)[1].seen
    noted["plain"] = plain()
    noted["fabric torch"], noted["fabric ours"] = plain("torch", fabric=True), plain("ours", fabric=True)
    noted["fabric rule"] = plain(fabric=True)
    watch, logger = callback(every=5, prefix="norms/"), CSVLogger(str(folder), name="", version="logs")
    trainer, module = fit("rule", folder, callbacks=[watch], logger=logger)
    logger.save()
    noted["rule"], noted["inside"], noted["clips"] = module.seen, module.inside, trainer.optimizers[0].max_grad_norm
    noted["last"] = {k: list(v) for k, v in watch.monitor.latest.columns.items()}
    noted["bf16"] = clipped_in_bf16(folder)
    half, _ = fit("rule", folder, HALF, callbacks=[callback(every=5)])
    half.save_checkpoint(folder / "half.ckpt")


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
    watch = callback(every=5, prefix="norms/")
    trainer, module = fit("rule", folder, resume=str(folder / "half.ckpt"), callbacks=[watch])
    noted["resumed"] = module.seen
    noted["resumed last"] = {k: list(v) for k, v in watch.monitor.latest.columns.items()}
    noted["multipliers"] = sorted({group["width_lr_mult"] for group in trainer.optimizers[0].param_groups})


if __name__ == "__main__":
    main(first, second)
