"""Storage: in which types parameters, gradients, moments and master weights are kept, and what that costs.

The words of a group, all optional, each meaning what it does elsewhere in torch, Transformer Engine or Megatron:

    exp_avg_dtype      None, torch.float32, torch.bfloat16, torch.int8
    exp_avg_sq_dtype   None, torch.float32, torch.bfloat16, torch.uint8
    master_weights     None, torch.float32, "remainder"
    rounding           "nearest", "stochastic", "kahan"
    rounding_seed      an int
    grad_attribute     "grad", "main_grad", "decoupled_grad"

They say how state is created. From then on the state itself decides, so that nothing loaded is cast unasked.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from . import keys

MOMENTS: Final = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
SCALES: Final = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}
COMPANIONS: Final = ("master_param", "kahan_comp")
ARRAYS: Final = (*MOMENTS, *COMPANIONS)  # of the parameter's own shape
STATE: Final = (*ARRAYS, *SCALES.values())

CODES: Final = (torch.int8, torch.uint8)
HALVES: Final = (torch.bfloat16, torch.float16)
FLOATS: Final = (torch.float32, *HALVES)
QUANT: Final = 128  # elements that share a scale in an 8-bit moment
QUANT_LEAST: Final = 4096  # smaller parameters keep 32-bit moments


class Storage(NamedTuple):
    """How one parameter is stored: what a variant of the kernels is compiled for."""

    param: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    weight: str = "plain"  # "plain", "master", "remainder", "kahan", "stochastic"

    @property
    def companion(self) -> torch.dtype | None:
        """Type of the second array the weight is kept in, if there is one."""
        return {"master": torch.float32, "remainder": torch.int16, "kahan": self.param}.get(self.weight)

    @property
    def plain(self) -> bool:
        """Whether torch's own implementations store it so."""
        return self.weight == "plain" and {self.grad, self.exp_avg, self.exp_avg_sq} == {self.param}

    @property
    def draws(self) -> bool:
        """Whether anything is rounded at random."""
        return self.weight == "stochastic" or self.exp_avg in CODES or self.exp_avg_sq in CODES

    def state_bytes(self, amsgrad: bool = False) -> float:
        """Bytes of state per element of a large parameter, the parameter itself not included."""
        moments = self.exp_avg.itemsize + self.exp_avg_sq.itemsize * (2 if amsgrad else 1)
        scales = sum(4 / QUANT for dtype in (self.exp_avg, self.exp_avg_sq) if dtype in CODES)
        return moments + scales + (0 if self.companion is None else self.companion.itemsize)

    def moved_bytes(self, amsgrad: bool = False) -> float:
        """Bytes per element that a step reads and writes: everything once, except that gradients are only read and the
        parameter is only written where a master weight is read in its place."""
        param = self.param.itemsize * (1 if self.weight == "master" else 2)
        return param + self.grad.itemsize + 2 * self.state_bytes(amsgrad)


def check_options(group: Mapping[str, Any], where: str) -> None:
    """Raise a ValueError if a group's storage options are not among those there are, or exclude each other."""
    for key in keys.STORAGE:
        name, value = key.name, key.of(group)
        if key.values and value not in key.values:
            hint = ""
            if key in (keys.EXP_AVG_DTYPE, keys.EXP_AVG_SQ_DTYPE) and value in CODES:
                hint = (
                    " A second moment has no sign, so its 8-bit codes are torch.uint8; the first one's are torch.int8."
                )
            if key is keys.MASTER_WEIGHTS and value is True:
                hint = " torch.float32 keeps 4 bytes per element, 'remainder' 2 beside a bfloat16 parameter; both are exact."
            raise ValueError(f"{where}{name}={value!r} is not one of {', '.join(map(repr, key.values))}.{hint}")
    seed = keys.ROUNDING_SEED.of(group)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"{where}rounding_seed={seed!r} is not an int from 0 to 2**63 - 1.")
    master, rounding = keys.MASTER_WEIGHTS.of(group), keys.ROUNDING.of(group)
    if master is not None and rounding != keys.ROUNDING.default:
        raise ValueError(
            f"{where}master_weights={master!r} excludes rounding={rounding!r}: with master weights nothing is lost in "
            "rounding the parameter. Leave one of them out."
        )
    if group.get("amsgrad") and keys.EXP_AVG_SQ_DTYPE.of(group) == torch.uint8:
        raise ValueError(
            f"{where}amsgrad=True excludes exp_avg_sq_dtype=torch.uint8: a maximum of rounded values only grows. "
            "Use torch.bfloat16 or torch.float32."
        )
    if (asked := _first_asked(group)) and (group.get("differentiable") or group.get("foreach")):
        other = "differentiable" if group.get("differentiable") else "foreach"
        raise ValueError(
            f"{where}{other}=True asks for torch's implementation, which knows no {asked}. Drop one of them."
        )


def _first_asked(group: Mapping[str, Any]) -> str | None:
    """Name and value of the first storage option that is not the default; a seed changes nothing by itself."""
    for key in (keys.EXP_AVG_DTYPE, keys.EXP_AVG_SQ_DTYPE, keys.MASTER_WEIGHTS, keys.ROUNDING):
        if key.of(group) != key.default:
            return f"{key.name}={key.of(group)!r}"
    return None


def check_parameter(p: Tensor, name: str, group: Mapping[str, Any]) -> None:
    """Raise a ValueError if a parameter's dtype excludes what its group asks for."""
    asked = _first_asked(group)
    if asked is None or p.dtype == torch.float32:
        return
    what = f"{name!r} {tuple(p.shape)} is {p.dtype}"
    if p.dtype not in HALVES:
        raise ValueError(f"{asked}, but {what}, whose state has its own dtype. Give it a group without {asked}.")
    if p.dtype == torch.float16 and keys.MASTER_WEIGHTS.of(group) == "remainder":
        raise ValueError(
            f"master_weights='remainder', but {what}: only a bfloat16 is the upper half of a float32. "
            "Use master_weights=torch.float32."
        )
    if p.dtype == torch.float16 and keys.ROUNDING.of(group) == "stochastic":
        raise ValueError(
            f"rounding='stochastic', but {what}: random bits are drawn for bfloat16 only. "
            "Use rounding='kahan' or master_weights=torch.float32."
        )


def wanted_companion(p: Tensor, group: Mapping[str, Any]) -> str | None:
    """Key of the companion that a group asks for; a float32 parameter needs none."""
    if p.dtype not in HALVES:
        return None
    if keys.MASTER_WEIGHTS.of(group) is not None:
        return "master_param"
    return "kahan_comp" if keys.ROUNDING.of(group) == "kahan" else None


def wanted_dtype(p: Tensor, group: Mapping[str, Any], key: str, segments: Sequence[int] = ()) -> torch.dtype:
    """In which type a moment is created.

    By default in that of the weight that the step updates: float32 with master weights, else the parameter's, as torch
    does. 8 bits where blocks of QUANT elements fit, else float32.
    """
    asked = (keys.EXP_AVG_DTYPE if key == "exp_avg" else keys.EXP_AVG_SQ_DTYPE).of(group)
    if asked is None or p.dtype not in FLOATS:
        return torch.float32 if wanted_companion(p, group) == "master_param" else p.dtype
    return torch.float32 if asked in CODES and not quantizes(p, segments) else asked


def storage_of(
    p: Tensor, grad: Tensor | None, group: Mapping[str, Any], state: Mapping[str, Any], segments: Sequence[int] = ()
) -> Storage:
    """How a parameter is stored, or will be where its state does not exist yet."""
    m, v = (
        state[key].dtype if key in state else wanted_dtype(p, group, key, segments) for key in ("exp_avg", "exp_avg_sq")
    )
    return Storage(p.dtype, p.dtype if grad is None else grad.dtype, m, v, kept_weight(p, group, state))


def kept_weight(p: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """How the weight of a parameter is kept, or will be where its state does not exist yet. What is there wins."""
    if "master_param" in state:
        return "remainder" if state["master_param"].dtype == torch.int16 else "master"
    if "kahan_comp" in state:
        return "kahan"
    companion = wanted_companion(p, group)
    if companion == "master_param":
        return "remainder" if keys.MASTER_WEIGHTS.of(group) == "remainder" else "master"
    if companion == "kahan_comp":
        return "kahan"
    return "stochastic" if p.dtype == torch.bfloat16 and keys.ROUNDING.of(group) == "stochastic" else "plain"


def quantizes(p: Tensor, segments: Sequence[int] = ()) -> bool:
    """Whether 8-bit moments of a parameter have scales of their own per block, per segment and per shard."""
    if p.numel() < QUANT_LEAST or any(size % QUANT for size in segments):
        return False
    mesh = getattr(p, "device_mesh", None)
    if mesh is None:
        return True
    # Scales are sharded as the parameter is, so blocks have to end where rows and shards do.
    last = p.ndim - 1
    parts = 1
    for size, placement in zip(mesh.shape, p.placements, strict=True):  # type: ignore[attr-defined]
        if placement.is_shard() and getattr(placement, "dim", None) == last:
            parts *= size
    return p.shape[-1] % (QUANT * parts) == 0


def scale_shape(p: Tensor) -> tuple[int, ...]:
    """Shape of the scales of an 8-bit moment: one per block of QUANT elements in memory order.

    >>> scale_shape(torch.empty(32, 256)), scale_shape(torch.empty(50, 100))
    ((32, 2), (40,))
    """
    if p.ndim and p.is_contiguous() and p.shape[-1] % QUANT == 0:
        return (*p.shape[:-1], p.shape[-1] // QUANT)
    return (-(-p.numel() // QUANT),)
