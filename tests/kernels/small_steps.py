"""Small steps of every storage, for tools that watch each access of a kernel and are slow.

    python -m tests.kernels.small_steps             # or with names of storages, see lwadamw/state/combinations.py

The sizes are odd, so that the masked loop, the aligned loop and chunks of every kind run, and nothing else does. Each tensor is
an allocation of its own: torch's caching allocator would hide an access beyond the end of a tensor from compute-sanitizer.
"""

from __future__ import annotations

import os
import sys

import torch

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"  # read at the first allocation
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lwadamw import AdamW
from lwadamw.state.combinations import COMBINATIONS

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPES = ((), (3,), (0,), (17, 241), (64, 70))


def take_steps(storage: str) -> None:
    """Take two clipped steps with norms, and read the norms.

    Args:
        storage: a key of COMBINATIONS.
    """
    c = COMBINATIONS[storage]
    params = [torch.nn.Parameter(torch.randn(shape, device=DEVICE).to(c.param)) for shape in SHAPES]
    optimizer = AdamW(params, backend="triton", max_grad_norm=1.0, **c.options)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        optimizer.step()
    norms = optimizer.norms()
    if not all(map(bool, torch.isfinite(torch.tensor(norms.weight)))):
        raise RuntimeError(f"{storage}: a norm is not finite: {norms.weight}")


if __name__ == "__main__":
    storages = sys.argv[1:] or list(COMBINATIONS)
    for name in storages:
        take_steps(name)
        print(f"{name} stepped", flush=True)
    print(f"{len(storages)} storages stepped on {DEVICE}")
