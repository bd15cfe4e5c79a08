"""Variants: what a kernel is compiled for, that is its compile-time constants and its compiler options."""

from __future__ import annotations

from typing import Any, Final

import torch
import triton.language as tl

from ..kernels import layout
from ..state.storage import CODES, HALVES, Storage

# Triton's name of each dtype that a kernel reads or writes.
TRITON_TYPES: Final = {
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.int8: tl.int8,
    torch.uint8: tl.uint8,
}
# The number in kernels/layout.py that stands for each value of `Storage.weight`.
_WEIGHTS: Final = {
    "plain": layout.PLAIN,
    "master": layout.MASTER,
    "remainder": layout.REMAINDER,
    "kahan": layout.KAHAN,
    "stochastic": layout.STOCHASTIC,
}


def update_constants(storage: Storage, strided: bool, amsgrad: bool, huber: bool = False) -> dict[str, Any]:
    """Return the compile-time constants of the update kernel, all but NORMS.

    Args:
        storage: how all rows of the plan are stored.
        strided: whether the kernel draws random bits and some row is a shard whose elements are several separate runs
            of the whole parameter.
        amsgrad: whether some row keeps max_exp_avg_sq.
        huber: whether the rows of the plan decay by Huber's law.

    Returns:
        Constants by the name of the kernel's argument.
    """
    short = all(dtype in HALVES or dtype in CODES for dtype in storage[:4]) and storage.weight != "master"
    return {
        "PARAM": TRITON_TYPES[storage.param],
        "GRAD": TRITON_TYPES[storage.grad],
        "EXP_AVG": TRITON_TYPES[storage.exp_avg],
        "EXP_AVG_SQ": TRITON_TYPES[storage.exp_avg_sq],
        "WEIGHT": _WEIGHTS[storage.weight],
        "STRIDED": strided,
        "AMSGRAD": amsgrad,
        "HUBER": huber,
        "BLOCK": 2 * layout.BLOCK if short and not amsgrad else layout.BLOCK,
    }


def launch_options(backend: str, storage: Storage | None = None, block: int = 0) -> dict[str, Any]:
    """Return the compiler options of a kernel.

    Only the update kernel has options of its own, so only for this kernel give the arguments after `backend`.

    Args:
        backend: the compiler's backend, "cuda" or "hip".
        storage: how the rows that the update kernel works on are stored; None for every other kernel.
        block: the update kernel's constant BLOCK, elements per iteration; 0 for every other kernel.

    Returns:
        Options by the name that Triton gives them.
    """
    options: dict[str, Any] = {"num_warps": layout.WARPS[backend], "enable_fp_fusion": False}
    if backend == "cuda" and block > layout.BLOCK:
        options["maxnreg"] = layout.DOUBLE_REGISTERS
    elif backend == "cuda" and storage is not None and storage.draws:
        options["maxnreg"] = layout.RANDOM_REGISTERS
    return options


def current_backend() -> str:
    """Return the compiler's backend for the GPUs that this build of torch supports: "cuda" or "hip"."""
    return "hip" if torch.version.hip else "cuda"


def total_bits(n_chunks: int) -> int:
    """Return the constant BITS of the kernel that adds up the partial sums of all chunks as integers.

    Args:
        n_chunks: number of partial sums.

    Returns:
        Number of binary digits that each partial sum keeps, at most 52, so that the sum of all fits into an int64.
    """
    return min(63 - max(n_chunks, 1).bit_length(), 52)
