"""Storage: the types in which parameters, gradients, moments and master weights are kept, and the bytes that they take.

A group may have these keys. Each of them means what it means in torch, Transformer Engine or Megatron:

    exp_avg_dtype      None, torch.float32, torch.bfloat16, torch.int8
    exp_avg_sq_dtype   None, torch.float32, torch.bfloat16, torch.uint8
    master_weights     None, torch.float32, "remainder"
    rounding           "nearest", "stochastic", "kahan"
    rounding_seed      an int
    grad_attribute     "grad", "main_grad", "decoupled_grad"

The keys say how state is created. Once state exists, its own tensors decide how it is stored. So a checkpoint that has been
loaded is never cast unless the user asks for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from . import keys
from .blocks import QUANT, quantizes

MOMENTS: Final = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
SCALES: Final = {"exp_avg": "exp_avg_scale", "exp_avg_sq": "exp_avg_sq_scale"}
COMPANIONS: Final = ("master_param", "kahan_comp")
ARRAYS: Final = (*MOMENTS, *COMPANIONS)  # state tensors that have the parameter's shape
STATE: Final = (*ARRAYS, *SCALES.values())

CODES: Final = (torch.int8, torch.uint8)
HALVES: Final = (torch.bfloat16, torch.float16)
FLOATS: Final = (torch.float32, *HALVES)


class Storage(NamedTuple):
    """How one parameter is stored. The kernels are compiled once per storage.

    Attributes:
        param: dtype of the parameter.
        grad: dtype of the gradient.
        exp_avg: dtype of the first moment.
        exp_avg_sq: dtype of the second moment, and of its maximum under amsgrad.
        weight: how the weight is kept.
            "plain": in the parameter, rounded to nearest.
            "master": in a float32 companion; the parameter is its rounded copy.
            "remainder": bfloat16 parameter and int16 companion are the upper and lower half of a float32 weight.
            "kahan": the companion, of the parameter's dtype, is what rounding the parameter has lost.
            "stochastic": in the parameter, rounded up or down at random so that the mean is exact.
    """

    param: torch.dtype
    grad: torch.dtype
    exp_avg: torch.dtype
    exp_avg_sq: torch.dtype
    weight: str = "plain"

    @property
    def companion(self) -> torch.dtype | None:
        """The dtype of the second array that the weight is kept in, or None if there is no second array."""
        return {"master": torch.float32, "remainder": torch.int16, "kahan": self.param}.get(self.weight)

    @property
    def plain(self) -> bool:
        """Whether torch's own implementations can store a parameter in this way."""
        return self.weight == "plain" and {self.grad, self.exp_avg, self.exp_avg_sq} == {self.param}

    @property
    def draws(self) -> bool:
        """Whether the weight or a moment is rounded at random, so that random bits have to be drawn."""
        return self.weight == "stochastic" or self.exp_avg in CODES or self.exp_avg_sq in CODES

    def state_bytes(self, amsgrad: bool = False) -> float:
        """Return the bytes of state per element of a large parameter. The parameter itself is not counted.

        Args:
            amsgrad: whether the maximum of the second moment is kept too.
        """
        moments = self.exp_avg.itemsize + self.exp_avg_sq.itemsize * (2 if amsgrad else 1)
        scales = sum(4 / QUANT for dtype in (self.exp_avg, self.exp_avg_sq) if dtype in CODES)
        return moments + scales + (0 if self.companion is None else self.companion.itemsize)

    def moved_bytes(self, amsgrad: bool = False) -> float:
        """Return the bytes per element of a large parameter that a step has to read and write.

        Every array is read once and written once, except the gradient, which is only read.

        Args:
            amsgrad: whether the maximum of the second moment is kept too.
        """
        return 2 * self.param.itemsize + self.grad.itemsize + 2 * self.state_bytes(amsgrad)


def check_options(group: Mapping[str, Any], where: str) -> None:
    """Raise an error if a storage option of a group is not valid, or if two options exclude each other.

    Args:
        group: a parameter group, or the options of a constructor by name.
        where: the start of an error message, for instance "group 0: ".

    Raises:
        ValueError: a value is not valid, or two options exclude each other.
    """
    for key in keys.STORAGE:
        name, value = key.name, key.of(group)
        if key.values and value not in key.values:
            hint = ""
            if key in (keys.EXP_AVG_DTYPE, keys.EXP_AVG_SQ_DTYPE) and value in CODES:
                hint = (
                    " A second moment has no sign, so the dtype of its 8-bit codes is torch.uint8. The dtype of the first "
                    "moment's codes is torch.int8."
                )
            if key is keys.MASTER_WEIGHTS and value is True:
                hint = " torch.float32 keeps 4 bytes per element, 'remainder' 2 beside a bfloat16 parameter. Both are exact."
            raise ValueError(f"{where}{name}={value!r} is not one of {', '.join(map(repr, key.values))}.{hint}")
    seed = keys.ROUNDING_SEED.of(group)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**63:
        raise ValueError(f"{where}rounding_seed={seed!r} is not an int from 0 to 2**63 - 1.")
    master, rounding = keys.MASTER_WEIGHTS.of(group), keys.ROUNDING.of(group)
    if master is not None and rounding != keys.ROUNDING.default:
        raise ValueError(
            f"{where}master_weights={master!r} excludes rounding={rounding!r}: a master weight already keeps what rounding the "
            "parameter would lose. Leave one of them out."
        )
    if group.get("amsgrad") and keys.EXP_AVG_SQ_DTYPE.of(group) == torch.uint8:
        raise ValueError(
            f"{where}amsgrad=True excludes exp_avg_sq_dtype=torch.uint8: random rounding is sometimes up, and a maximum keeps "
            "every such value, so it would only grow. Use torch.bfloat16 or torch.float32."
        )
    if (asked := _first_asked(group)) and (group.get("differentiable") or group.get("foreach")):
        other = "differentiable" if group.get("differentiable") else "foreach"
        raise ValueError(
            f"{where}{other}=True asks for torch's implementation, which does not have {asked}. Leave one of them out."
        )


def _first_asked(group: Mapping[str, Any]) -> str | None:
    """Return name and value of the first storage option that is not the default, as written in a call.

    The seed is not looked at, because a seed alone changes nothing.
    """
    for key in (keys.EXP_AVG_DTYPE, keys.EXP_AVG_SQ_DTYPE, keys.MASTER_WEIGHTS, keys.ROUNDING):
        if key.of(group) != key.default:
            return f"{key.name}={key.of(group)!r}"
    return None


def check_parameter(p: Tensor, name: str, group: Mapping[str, Any]) -> None:
    """Raise an error if a parameter's dtype does not work with the storage options of its group.

    Args:
        p: the parameter.
        name: its name, for error messages.
        group: its group.

    Raises:
        ValueError: the dtype does not work with an option.
    """
    asked = _first_asked(group)
    if asked is None or p.dtype == torch.float32:
        return
    what = f"{name!r} {tuple(p.shape)} is {p.dtype}"
    if p.dtype not in HALVES:
        raise ValueError(
            f"{asked}, but {what}, whose state has its own dtype. Put the parameter into a group without {asked}."
        )
    if p.dtype == torch.float16 and keys.MASTER_WEIGHTS.of(group) == "remainder":
        raise ValueError(
            f"master_weights='remainder', but {what}. Only a bfloat16 number is the upper half of a float32 number. "
            "Use master_weights=torch.float32."
        )
    if p.dtype == torch.float16 and keys.ROUNDING.of(group) == "stochastic":
        raise ValueError(
            f"rounding='stochastic', but {what}. Stochastic rounding exists for bfloat16 only. "
            "Use rounding='kahan' or master_weights=torch.float32."
        )


def wanted_companion(p: Tensor, group: Mapping[str, Any]) -> str | None:
    """Return the state key of the companion that a group asks for, or None.

    Only parameters of 16 bits get a companion: a float32 parameter is its own master weight.

    Args:
        p: the parameter.
        group: its group.
    """
    if p.dtype not in HALVES:
        return None
    if keys.MASTER_WEIGHTS.of(group) is not None:
        return "master_param"
    return "kahan_comp" if keys.ROUNDING.of(group) == "kahan" else None


def wanted_dtype(p: Tensor, group: Mapping[str, Any], key: str, segments: Sequence[int] = ()) -> torch.dtype:
    """Return the dtype in which a moment is created.

    Without an option, it is the dtype of the weight that the step updates: float32 with master weights, else the dtype of
    the parameter, as in torch. A moment in 8 bits becomes float32 if the parameter does not fit blocks of QUANT elements,
    see `quantizes`.

    Args:
        p: the parameter.
        group: its group.
        key: "exp_avg" or "exp_avg_sq".
        segments: the number of elements of each segment; () for one segment.
    """
    asked = (keys.EXP_AVG_DTYPE if key == "exp_avg" else keys.EXP_AVG_SQ_DTYPE).of(group)
    if asked is None or p.dtype not in FLOATS:
        return torch.float32 if wanted_companion(p, group) == "master_param" else p.dtype
    return torch.float32 if asked in CODES and not quantizes(p, segments) else asked


def storage_of(
    p: Tensor, grad: Tensor | None, group: Mapping[str, Any], state: Mapping[str, Any], segments: Sequence[int] = ()
) -> Storage:
    """Return how a parameter is stored, or how it will be stored once its state exists.

    Args:
        p: the parameter.
        grad: its gradient. None: the gradient is taken to have the parameter's dtype.
        group: its group. Used only for tensors that the state does not have yet.
        state: its state, empty if there is none yet.
        segments: the number of elements of each segment; () for one segment.
    """
    m, v = (
        state[key].dtype if key in state else wanted_dtype(p, group, key, segments) for key in ("exp_avg", "exp_avg_sq")
    )
    return Storage(p.dtype, p.dtype if grad is None else grad.dtype, m, v, kept_weight(p, group, state))


def kept_weight(p: Tensor, group: Mapping[str, Any], state: Mapping[str, Any]) -> str:
    """Return how the weight of a parameter is kept, one of the values of `Storage.weight`.

    If the state has a companion, the companion decides. Else the options of the group decide.

    Args:
        p: the parameter.
        group: its group.
        state: its state, empty if there is none yet.
    """
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
