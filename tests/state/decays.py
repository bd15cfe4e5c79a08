"""Shared by the tests of decay laws: a peak learning rate, and optimizers of every law and storage type."""

import torch

from lwadamw import AdamW

PEAK = 0.05
WIDTHS = {"width_lr_mult": 0.25, "width_wd_mult": 3.0, "width_eps_mult": 0.5, "eps": 0.1}

STORAGES = {
    "fp32": (torch.float32, {}),
    "fp32, 8 bits": (torch.float32, {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}),
    "bf16": (torch.bfloat16, {}),
    "bf16, remainder": (torch.bfloat16, {"master_weights": "remainder"}),
    "bf16, master": (torch.bfloat16, {"master_weights": torch.float32}),
    "bf16, kahan": (torch.bfloat16, {"rounding": "kahan"}),
    "bf16, stochastic": (torch.bfloat16, {"rounding": "stochastic"}),
    "fp16, master": (torch.float16, {"master_weights": torch.float32}),
}


def make(storage, law, backend, device, shapes=((4, 70), (33,))):
    """Return named parameters of a storage type, the same in every call, and their optimizer with a decay law."""
    dtype, options = STORAGES[storage]
    torch.manual_seed(1)
    params = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    named = [(f"w{i}", p) for i, p in enumerate(params)]
    return params, AdamW(named, lr=PEAK, weight_decay=2.0, decay=law, backend=backend, **options)
