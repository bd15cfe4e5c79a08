"""A script: a small Llama under transformers.Trainer and under accelerate: torch's AdamW, ours, and ours with a rule."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import lwadamw
from lwadamw.engines import huggingface
from tests.engines.killed import HALF, STEPS, kill_at, main

VALUES = {"lr": 1e-2, "weight_decay": 0.1, "betas": (0.9, 0.95), "eps": 1e-8}
RULE = {"base_width": 16}


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=32,
        )
    )


class Data(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 8 * STEPS

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        x = (torch.arange(16) * (i % 7 + 1) + i) % 64
        return {"input_ids": x, "labels": x}


class Recorded(Trainer):
    """A Trainer that keeps the losses in full precision and the order of the data."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.losses: list[float] = []
        super().__init__(*args, **kwargs)

    def _get_train_sampler(self, *_: Any) -> Any:
        return torch.utils.data.SequentialSampler(Data())

    doomed = False

    def compute_loss(self, model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        if self.doomed:
            kill_at(self.state.global_step)
        loss = super().compute_loss(model, inputs, *rest, **options)
        self.losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
        return loss


class Ours(huggingface.WidthTrainer, Recorded):
    pass


class Doomed(Ours):
    doomed = True


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        use_cpu=True,
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=VALUES["lr"],
        weight_decay=VALUES["weight_decay"],
        adam_beta1=0.9,
        adam_beta2=0.95,
        lr_scheduler_type="constant",
        logging_steps=5,
        report_to=[],
        disable_tqdm=True,
        **{"save_strategy": "no", **options},
    )


def train(
    folder: Path, kind: type[Recorded], width: Any = None, resume: Any = None, callbacks: Any = (), **options: Any
) -> Any:
    trainer = kind(model=model(), args=arguments(folder, **options), train_dataset=Data(), callbacks=list(callbacks))
    trainer.width = width or {}
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def passed(way: str, fold: bool, folder: Path, resume: bool = False) -> list[float]:
    """Return the losses of a Trainer that gets the optimizer in one of the three ways. It saves after HALF steps."""
    net, folder = model(), folder / f"{way} {fold}"
    args = arguments(folder, **{} if resume else {"save_strategy": "steps", "save_steps": HALF})
    base = {"lr": VALUES["lr"], "weight_decay": VALUES["weight_decay"]} if fold else {}
    given: dict[str, Any] = {}
    if way != "mixin":
        groups = lwadamw.param_groups(net, **RULE, fold=fold, **base)
        optimizer = lwadamw.AdamW(groups, **VALUES) if way == "optimizers" else None
        if optimizer is not None:
            given = {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0))}
        else:
            given = {"optimizer_cls_and_kwargs": (lwadamw.AdamW, {**VALUES, "params": groups})}
    trainer = (Ours if way == "mixin" else Recorded)(model=net, args=args, train_dataset=Data(), **given)
    if way == "mixin":
        trainer.width = {**RULE, "fold": fold}
    trainer.train(resume_from_checkpoint=str(folder / f"checkpoint-{HALF}") if resume else None)
    return trainer.losses


WAYS = [(way, fold) for way in ("optimizers", "optimizer_cls_and_kwargs", "mixin") for fold in (False, True)]


def batch(step: int) -> torch.Tensor:
    return torch.stack([Data()[i]["input_ids"] for i in range(8 * step, 8 * step + 8)])


def plain() -> list[float]:
    """The rule in a plain loop, with the clipping that Trainer does by default."""
    net, losses = model(), []
    optimizer = lwadamw.AdamW(lwadamw.param_groups(net, **RULE), max_grad_norm=1.0, **VALUES)
    for step in range(STEPS):
        x = batch(step)
        loss = net(input_ids=x, labels=x).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    return losses


class Accelerated:
    """A loop of accelerate: what it prepared, and its losses."""

    def __init__(self, kind: str) -> None:
        net = model()
        made: Any = {
            "torch": lambda: torch.optim.AdamW(net.parameters(), fused=True, **VALUES),  # as Trainer does
            "ours": lambda: lwadamw.AdamW(net.named_parameters(), **VALUES),
            "rule": lambda: lwadamw.AdamW(lwadamw.param_groups(net, **RULE), **VALUES),
        }
        self.accelerator = Accelerator(cpu=True)
        self.model, self.optimizer = self.accelerator.prepare(net, made[kind]())

    def train(self, steps: range, doomed: bool = False) -> list[float]:
        losses = []
        for step in steps:
            x = batch(step)
            loss = self.model(input_ids=x, labels=x).loss
            self.accelerator.backward(loss)
            if doomed:
                kill_at(step)
            self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad()
            losses.append(float(loss))
        return losses


def first(folder: Path, noted: dict[str, Any]) -> None:
    noted["torch"] = train(folder, Recorded).losses
    noted["ours"] = train(folder, Ours).losses
    noted["plain"] = plain()
    watch = huggingface.callback(every=5, prefix="norms/")
    noted["rule"] = (trainer := train(folder, Ours, RULE, callbacks=[watch])).losses
    noted["logged"] = [entry for entry in trainer.state.log_history if "loss" in entry]
    noted["last"] = {k: list(v) for k, v in watch.monitor.latest.columns.items()}
    noted["accelerate"] = {kind: Accelerated(kind).train(range(STEPS)) for kind in ("torch", "ours")}
    loop = Accelerated("rule")
    monitor = lwadamw.Monitor(loop.optimizer, every=5)
    noted["accelerate"]["rule"] = loop.train(range(STEPS))
    noted["accelerate"]["plain"] = noted["plain"]
    noted["accelerate logged"] = monitor.as_dict()
    noted["ways"] = {f"{way} {fold}": passed(way, fold, folder) for way, fold in WAYS}
    noted["norms inside"] = float(loop.optimizer.optimizer.norms().weight.min())


def doomed(folder: Path) -> None:
    loop = Accelerated("rule")
    loop.train(range(HALF))
    loop.accelerator.save_state(str(folder / "accelerate"))
    watch = huggingface.callback(every=5, prefix="norms/")
    train(folder, Doomed, RULE, callbacks=[watch], save_strategy="steps", save_steps=HALF)


def second(folder: Path, noted: dict[str, Any]) -> None:
    watch = huggingface.callback(every=5, prefix="norms/", roles_only=True)
    trainer = train(folder, Ours, RULE, str(folder / f"checkpoint-{HALF}"), [watch])
    logged = {name for entry in trainer.state.log_history if entry["step"] > HALF for name in entry}
    noted["by role"] = sorted(name for name in logged if name.startswith("norms/"))
    noted["ways resumed"] = {f"{way} {fold}": passed(way, fold, folder, resume=True) for way, fold in WAYS}
    noted["resumed"] = trainer.losses
    noted["resumed last"] = {k: list(v) for k, v in watch.monitor.latest.columns.items()}
    noted["multipliers"] = sorted({group["width_lr_mult"] for group in trainer.optimizer.param_groups})
    loop = Accelerated("rule")
    loop.accelerator.load_state(str(folder / "accelerate"))
    noted["accelerate"]["resumed"] = loop.train(range(HALF, STEPS))


if __name__ == "__main__":
    main(first, doomed, second)
