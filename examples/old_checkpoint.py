"""A transformers checkpoint of torch.optim.AdamW goes on under a width rule. Moments are kept, groups are those of the rule."""

import shutil
import tempfile
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from lwadamw.engines import huggingface

LR, WEIGHT_DECAY = 1e-2, 0.1  # the values that were tuned at the base width


class WidthTrainer(huggingface.WidthTrainer, Trainer):
    width = {"base_width": 16}


def convert(folder, old, new, model):
    """Rewrite optimizer.pt and scheduler.pt in a copy of a checkpoint.

    Args:
        folder: the copy.
        old: an optimizer as the old run made it. It says in which order the checkpoint has the parameters.
        new: the optimizer of the new run. It loads the checkpoint.
        model: the model of both.
    """
    names = {p: name for name, p in model.named_parameters()}
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    for group, made in zip(saved["param_groups"], old.param_groups, strict=True):
        group["param_names"], group["weight_decay"] = [names[p] for p in made["params"]], WEIGHT_DECAY
    # Loading a scheduler does not set lr, so the checkpoint needs the value of the schedule at its own step.
    lr = LR * saved["param_groups"][0]["lr"] / saved["param_groups"][0]["initial_lr"]
    new.load_state_dict(saved)
    for group in new.param_groups:
        group["lr"], group["initial_lr"] = lr, LR
    torch.save(new.state_dict(), folder / "optimizer.pt")

    scheduler, groups = torch.load(folder / "scheduler.pt", weights_only=True), len(new.param_groups)
    scheduler |= {"base_lrs": [LR] * groups, "_last_lr": [lr] * groups, "lr_lambdas": [None] * groups}
    torch.save(scheduler, folder / "scheduler.pt")


config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
data = [{"input_ids": (row := torch.arange(16) * (i % 7 + 1) % 64), "labels": row} for i in range(160)]


def trainer_of(kind, folder, steps):
    args = TrainingArguments(
        str(folder),
        max_steps=steps,
        learning_rate=LR,
        weight_decay=WEIGHT_DECAY,
        save_steps=10,
        report_to=[],
        use_cpu=True,
    )
    return kind(model=LlamaForCausalLM(config), args=args, train_dataset=data)


with tempfile.TemporaryDirectory() as folder:
    folder = Path(folder)
    trainer_of(Trainer, folder / "old", 20).train()  # its checkpoint after 10 steps is the old one

    shutil.copytree(folder / "old" / "checkpoint-10", folder / "new" / "checkpoint-10")
    trainer = trainer_of(WidthTrainer, folder / "new", 20)
    old = trainer_of(Trainer, folder / "old", 20)
    old.model = trainer.model
    convert(folder / "new" / "checkpoint-10", old.create_optimizer(), trainer.create_optimizer(), trainer.model)
    was, now = (torch.load(folder / run / "checkpoint-10" / "optimizer.pt")["state"] for run in ("old", "new"))
    moments = [sorted(float(entry["exp_avg"].sum()) for entry in state.values()) for state in (was, now)]
    trainer.train(resume_from_checkpoint=str(folder / "new" / "checkpoint-10"))
    print("all moments kept:", moments[0] == moments[1], "  base lr of the groups:", trainer.lr_scheduler.base_lrs)
