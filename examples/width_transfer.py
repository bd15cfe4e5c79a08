"""Tune the learning rate on a narrow model, train a wide one with it, and see what this lr loses against the best lr there."""

import torch
from torch import nn

import lwadamw

PROXY, TARGET, STEPS = 32, 256, 60
RATES = [2.0**k for k in range(-9, -3)]


def build(width):
    torch.manual_seed(0)
    layers = [nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 8))


torch.manual_seed(7)
teacher = nn.Sequential(nn.Linear(16, 64), nn.Tanh(), nn.Linear(64, 8)).requires_grad_(False)
nn.init.normal_(teacher[0].weight, std=0.6)
nn.init.normal_(teacher[2].weight, std=0.6)
inputs = torch.randn(STEPS + 32, 128, 16)
labels = teacher(inputs).argmax(-1)  # the last 32 batches are for validation


def train(width, rule, lr, watch=False):
    model = build(width)
    with torch.device("meta"):
        proxy = build(PROXY)  # the shapes of the model that was tuned
    groups = lwadamw.param_groups(model, proxy, rule=rule, roles={"0.weight": "vector", "6.weight": "output"})
    optimizer = lwadamw.AdamW(groups, lr=lr, weight_decay=0.1, betas=(0.9, 0.95))
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, STEPS)
    monitor = lwadamw.Monitor(optimizer, model, steps=STEPS, every=10) if watch else None
    for x, y in zip(inputs[:STEPS], labels[:STEPS], strict=True):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
    with torch.no_grad():
        loss = nn.functional.cross_entropy(model(inputs[STEPS:].flatten(0, 1)), labels[STEPS:].flatten())
    return loss.item(), monitor


columns = {"proxy": (PROXY, "fan2025"), "fan2025": (TARGET, "fan2025"), "standard": (TARGET, "standard")}
losses = {name: [train(width, rule, lr)[0] for lr in RATES] for name, (width, rule) in columns.items()}
print(f"{'lr':<10}" + "".join(f"{name:>10}" for name in columns))
for i, lr in enumerate(RATES):
    stars = {name: "*" if found[i] == min(found) else " " for name, found in losses.items()}
    print(f"{lr:<10.5f}" + "".join(f"{losses[name][i]:>9.3f}{stars[name]}" for name in columns))

tuned = min(range(len(RATES)), key=losses["proxy"].__getitem__)
for rule in ("fan2025", "standard"):
    above = losses[rule][tuned] - min(losses[rule])
    print(f"width {TARGET}, {rule}: the proxy's lr {RATES[tuned]:g} is {above:.3f} above the best loss of the column")

print(train(TARGET, "fan2025", RATES[tuned], watch=True)[1].report())
