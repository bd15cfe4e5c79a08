"""A Lightning checkpoint of torch's AdamW goes on under a rule after both of its entries were converted as the docs say."""

import copy

import pytest
import torch
from torch import nn

import lwadamw

pytestmark = pytest.mark.engines

lightning = pytest.importorskip("lightning")

LR, WEIGHT_DECAY, STEPS = 1e-2, 0.1, 5


def factor(step):
    return 1 / (1 + step)


def old_optimizer(net):
    split = [[p for p in net.parameters() if (p.ndim >= 2) == wide] for wide in (True, False)]
    groups = [
        {"params": params, "weight_decay": decay} for params, decay in zip(split, (WEIGHT_DECAY, 0.0), strict=True)
    ]
    return torch.optim.AdamW(groups, lr=LR)


def new_optimizer(net):
    groups = lwadamw.param_groups(net, {"1.weight": 8, "2.weight": 8}, roles={"2.weight": "output"})
    return lwadamw.AdamW(groups, lr=LR, weight_decay=WEIGHT_DECAY)


def make_module(make):
    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Embedding(32, 16), nn.Linear(16, 32), nn.Linear(32, 32))
            self.loaded = None

        def training_step(self, x, _):
            return nn.functional.cross_entropy(self.net(x), (3 * x + 1) % 32)

        def configure_optimizers(self):
            optimizer = make(self.net)
            return [optimizer], [
                {"scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, factor), "interval": "step"}
            ]

        def on_train_batch_start(self, *_):
            if self.loaded is None:
                optimizer = self.optimizers().optimizer
                self.loaded = copy.deepcopy(
                    {n: optimizer.state[p] for n, p in self.net.named_parameters() if optimizer.state}
                )
                self.rates = [g["lr"] for g in optimizer.param_groups]

    return Module()


def fit(module, folder, steps, **options):
    trainer = lightning.Trainer(
        default_root_dir=folder,
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(torch.arange(STEPS * 2 * 8) % 32, batch_size=8)
    trainer.fit(module, loader, **options)
    return trainer


@pytest.mark.filterwarnings("ignore:load_state_dict. the checkpoint was written without a width rule")
@pytest.mark.filterwarnings("ignore:::lightning")
def test_a_lightning_checkpoint_of_torchs_adamw_goes_on_under_a_rule_after_its_conversion(tmp_path):
    first = make_module(old_optimizer)
    fit(first, tmp_path, STEPS).save_checkpoint(tmp_path / "old.ckpt")
    was = {name: first.optimizers().optimizer.state[p] for name, p in first.net.named_parameters()}

    second = make_module(new_optimizer)
    names = {p: name for name, p in second.net.named_parameters()}
    checkpoint = torch.load(tmp_path / "old.ckpt", weights_only=True)
    saved, new = checkpoint["optimizer_states"][0], new_optimizer(second.net)
    now = LR * saved["param_groups"][0]["lr"] / saved["param_groups"][0]["initial_lr"]
    for group, made in zip(saved["param_groups"], old_optimizer(second.net).param_groups, strict=True):
        group["param_names"], group["weight_decay"] = [names[p] for p in made["params"]], WEIGHT_DECAY
    new.load_state_dict(saved)
    scheduler, groups = checkpoint["lr_schedulers"][0], len(new.param_groups)
    for group in new.param_groups:
        group["lr"], group["initial_lr"] = now, LR
    scheduler |= {"base_lrs": [LR] * groups, "_last_lr": [now] * groups, "lr_lambdas": [None] * groups}
    checkpoint["optimizer_states"] = [new.state_dict()]
    torch.save(checkpoint, tmp_path / "new.ckpt")

    trainer = fit(second, tmp_path, 2 * STEPS, ckpt_path=tmp_path / "new.ckpt")
    assert set(second.loaded) == set(was)
    for name, entry in was.items():
        for key, value in entry.items():
            assert second.loaded[name][key].equal(value), (name, key)
    assert second.rates == pytest.approx([LR * factor(STEPS)] * groups)
    optimizer = second.optimizers().optimizer
    assert trainer.global_step == 2 * STEPS
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([LR * factor(2 * STEPS)] * groups)
    multipliers = {n: g["width_lr_mult"] for g in optimizer.param_groups for n in g["param_names"]}
    assert multipliers["1.weight"] == 0.5
