"""Lightning's Trainer with a width rule: gradients are clipped inside the step, and norms go to the trainer's loggers."""

import lightning
import torch
from torch import nn

import lwadamw
from lwadamw.engines.lightning import callback


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))

    def training_step(self, x, _):
        return nn.functional.cross_entropy(self.net(x), (3 * x + 1) % 64)

    def configure_optimizers(self):
        groups = lwadamw.param_groups(self.net, {"1.weight": 16, "3.weight": 32}, roles={"3.weight": "output"})
        return lwadamw.AdamW(groups, lr=1e-2, weight_decay=0.1)


watch = callback(every=10, prefix="norms/")
trainer = lightning.Trainer(
    max_steps=20,
    accelerator="cpu",
    gradient_clip_val=1.0,
    callbacks=[watch],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(Module(), torch.utils.data.DataLoader(torch.arange(320) % 64, batch_size=16))
print(watch.monitor.report())
