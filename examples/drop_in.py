"""lwadamw.AdamW in place of torch.optim.AdamW: the same losses, and norms of every parameter."""

import torch
from torch import nn

import lwadamw

torch.manual_seed(0)
model = nn.Sequential(nn.Embedding(64, 32), nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))

optimizer = lwadamw.AdamW(model.named_parameters(), lr=1e-2, weight_decay=0.1, max_grad_norm=1.0)
for step in range(20):
    x = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(step))
    loss = nn.functional.cross_entropy(model(x), (3 * x + 1) % 64)
    loss.backward()
    optimizer.step()
    if step % 10 == 9:
        norms = optimizer.norms()
        print(step + 1, f"{loss.item():.3f}", dict(zip(norms.names, norms.weight.round(3).tolist(), strict=True)))
    optimizer.zero_grad()
