"""Combinations of storage options that are worth having: the options of each, its cost, its error, and when to use it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, NamedTuple

import torch

from .storage import Storage, storage_of

_FP32, _BF16, _FP16 = torch.float32, torch.bfloat16, torch.float16
_LARGE = (64, 128)  # a shape whose moments can be kept in 8 bits


class Combination(NamedTuple):
    """A combination of storage options.

    Attributes:
        options: keyword arguments of AdamW.
        param: dtype of the parameters.
        grad: dtype of the gradients.
        bound: upper bound on the error after 200 steps on a noisy quadratic. The error is the distance between the weights
            and those of float64 AdamW, divided by the distance that the float64 weights have moved.
        when: when to use the combination.
    """

    options: Mapping[str, Any]
    param: torch.dtype
    grad: torch.dtype
    bound: float
    when: str

    @property
    def storage(self) -> Storage:
        """The storage of a large parameter.

        Examples:
            >>> COMBINATIONS["bf16, kahan"].storage.companion
            torch.bfloat16
        """
        p, grad = (torch.empty(_LARGE, dtype=dtype, device="meta") for dtype in (self.param, self.grad))
        return storage_of(p, grad, self.options, {})

    @property
    def arguments(self) -> str:
        """The options as they are written in a call of AdamW."""
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


_MOMENTS_32: Final = {"exp_avg_dtype": _FP32, "exp_avg_sq_dtype": _FP32}
_MOMENTS_16: Final = {"exp_avg_dtype": _BF16, "exp_avg_sq_dtype": _BF16}
_MOMENTS_8: Final = {"exp_avg_dtype": torch.int8, "exp_avg_sq_dtype": torch.uint8}
_MASTER: Final = {"master_weights": _FP32}
_REMAINDER: Final = {"master_weights": "remainder"}
_KAHAN: Final = {"rounding": "kahan"}
_STOCHASTIC: Final = {"rounding": "stochastic"}

COMBINATIONS: Final[dict[str, Combination]] = {
    "fp32": Combination({}, _FP32, _FP32, 1e-4, "the reference; small models"),
    "fp32, bf16 moments": Combination(_MOMENTS_16, _FP32, _FP32, 5e-3, "fp32 weights, half the state"),
    "fp32, 8-bit moments": Combination(_MOMENTS_8, _FP32, _FP32, 5e-2, "fp32 weights, a quarter of the state"),
    "bf16": Combination({}, _BF16, _BF16, 1.0, "as torch does it; small updates are lost in rounding"),
    "bf16, fp32 moments": Combination(_MOMENTS_32, _BF16, _BF16, 1.0, "exact moments; small updates still are lost"),
    "bf16, master": Combination(
        _MASTER, _BF16, _BF16, 1e-3, "the usual mixed precision, checkpoints with fp32 weights"
    ),
    "bf16, master, bf16 moments": Combination(
        _MASTER | _MOMENTS_16, _BF16, _BF16, 5e-3, "the same with half the moments"
    ),
    "bf16, remainder": Combination(_REMAINDER, _BF16, _BF16, 1e-3, "fp32's own steps in fewer bytes"),
    "bf16, remainder, bf16 moments": Combination(
        _REMAINDER | _MOMENTS_16, _BF16, _BF16, 5e-3, "exact weights, fewer bytes"
    ),
    "bf16, remainder, 8-bit moments": Combination(
        _REMAINDER | _MOMENTS_8, _BF16, _BF16, 5e-2, "exact weights, fewest bytes for that"
    ),
    "bf16, kahan": Combination(_KAHAN, _BF16, _BF16, 5e-3, "weights of 16 bits, nothing random"),
    "bf16, stochastic": Combination(_STOCHASTIC, _BF16, _BF16, 0.25, "no second array for the weight"),
    "bf16, stochastic, fp32 moments": Combination(
        _STOCHASTIC | _MOMENTS_32, _BF16, _BF16, 0.25, "the same where moments matter more than bytes"
    ),
    "bf16, stochastic, 8-bit moments": Combination(
        _STOCHASTIC | _MOMENTS_8, _BF16, _BF16, 0.25, "the least memory there is"
    ),
    "fp16, master": Combination(_MASTER, _FP16, _FP16, 1e-3, "fp16 training with a GradScaler"),
}


def table() -> str:
    """Return the combinations as a Markdown table.

    Returns:
        A row per combination: its name, its arguments, the bytes of state per element of a large parameter, the bytes per
        element that a step reads and writes, the bound on the error, and when to use it.
    """
    lines = ["| combination | arguments | state | moved | off | when |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for name, combination in COMBINATIONS.items():
        stored = combination.storage
        arguments = f"`{combination.arguments}`" if combination.options else ""
        lines.append(
            f"| {name} | {arguments} | {stored.state_bytes():g} | {stored.moved_bytes():g} "
            f"| {combination.bound:g} | {combination.when} |"
        )
    return "\n".join(lines)
