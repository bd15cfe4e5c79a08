"""bfloat16 weights in five storages: bytes of state, and how far the weights end from those of float32 training."""

import torch
from torch import nn

import lwadamw

STEPS, SIZE = 200, 128
STORAGES = {
    "float32": {},
    "bfloat16, as in torch": {},
    "stochastic rounding": {"rounding": "stochastic"},
    "16-bit remainder": {"master_weights": "remainder"},
    "remainder, bfloat16 moments": {
        "master_weights": "remainder",
        "exp_avg_dtype": torch.bfloat16,
        "exp_avg_sq_dtype": torch.bfloat16,
    },
    "remainder, 8-bit moments": {
        "master_weights": "remainder",
        "exp_avg_dtype": torch.int8,
        "exp_avg_sq_dtype": torch.uint8,
    },
}


def linear(dtype):
    """The same weights in every dtype: those that bfloat16 has exactly."""
    torch.manual_seed(0)
    return nn.Linear(SIZE, SIZE, bias=False).bfloat16().to(dtype)


def train(dtype, **storage):
    model = linear(dtype)
    target = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(1)) / 16
    optimizer = lwadamw.AdamW(model.named_parameters(), lr=1e-4, weight_decay=0.0, **storage)
    generator = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        noise = torch.randn(SIZE, SIZE, generator=generator) / 16
        model.weight.grad = (model.weight.detach().float() - target + noise).to(dtype)
        optimizer.step()
    state = optimizer.state[model.weight]
    size = sum(value.numel() * value.element_size() for name, value in state.items() if name != "step")
    return optimizer.master_weight(model.weight), size / model.weight.numel()


start = linear(torch.float32).weight.detach()
exact, _ = train(torch.float32)
print(f"{'storage':<30}{'bytes of state':>15}{'distance':>12}")
for name, storage in STORAGES.items():
    weight, size = train(torch.float32 if name == "float32" else torch.bfloat16, **storage)
    print(f"{name:<30}{size:>15.4f}{(weight - exact).norm() / (exact - start).norm():>12.4f}")
