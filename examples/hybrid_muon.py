"""A hybrid run: torch's Muon takes the matrices, lwadamw.AdamW takes the rest, and one Monitor watches both."""

import torch
from torch import nn

import lwadamw

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))

roles = lwadamw.by_role(lwadamw.param_groups(model, {"1.weight": 16, "3.weight": 32}, rule="standard"))
matrices = [(name, p) for group in roles["matrix"] for name, p in group["params"]]
muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
adamw = lwadamw.AdamW(lwadamw.Groups(roles["vector"] + roles.get("output", []), roles["vector"].evidence), lr=1e-2)
monitor = lwadamw.Monitor(adamw, every=10, others=[muon])

for step in range(20):
    x = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(step))
    loss = nn.functional.cross_entropy(model(x), (3 * x + 1) % 64)
    loss.backward()
    adamw.step()
    muon.step()
    model.zero_grad()
print(monitor.report())
