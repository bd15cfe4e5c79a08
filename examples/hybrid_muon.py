"""A hybrid run: torch's Muon takes the matrices, lwadamw.AdamW takes the rest, and one Monitor watches both."""

import torch
from torch import nn

import lwadamw

torch.manual_seed(0)
model = nn.Sequential(
    nn.Embedding(64, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 64, bias=False)
)

# The head is no hidden matrix, so Muon does not get it.
groups = lwadamw.param_groups(model, base_width=32, rule="standard", roles={"4.weight": "output"})
roles = lwadamw.by_role(groups)
matrices = [(name, p) for group in roles["matrix"] for name, p in group["params"]]
muon = torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
adamw = lwadamw.AdamW(roles["vector"] + roles["output"], lr=1e-2)
monitor = lwadamw.Monitor(adamw, every=10, others=[muon])

for step in range(20):
    x = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(step))
    loss = nn.functional.cross_entropy(model(x), (3 * x + 1) % 64)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)  # by the norm of the whole model, for both
    adamw.step()
    muon.step()
    model.zero_grad()
print(monitor.report())
