"""Collectives: calls in which processes wait for each other, and what is said if one of them waits in vain."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_Result = TypeVar("_Result")

# What gloo, NCCL and MPI say if a process did not come, or has gone.
_ALONE: Final = re.compile(
    r"time[d ]*-?out|closed by peer|reset by peer|broken pipe|aborted|remote process", re.IGNORECASE
)


class Call(NamedTuple):
    """What the user has called.

    Attributes:
        name: the call as it is written.
        alone: a sentence that says what a process can do alone.
    """

    name: str
    alone: str


_OWN: Final = "norm_sums(local=True) returns the sums over what this process holds, and is not collective."
_UNCLIPPED: Final = "A step with max_grad_norm=None is not collective."
STEP: Final = Call("step() with max_grad_norm", _UNCLIPPED)
HUBER: Final = Call(
    'step() with decay="huber"', 'A step with decay="coupled" and max_grad_norm=None is not collective.'
)
READING: Final = Call("a reading of Monitor", "Build a Monitor with the same arguments on every process.")
CLIP: Final = Call("clip_grad_norm_()", _UNCLIPPED)
NORMS: Final = Call("norms()", _OWN)
NORM_SUMS: Final = Call("norm_sums()", _OWN)


def add_over(tensor: Tensor, group: ProcessGroup, call: Call) -> None:
    """Add up a tensor over the processes of a group, in place.

    Args:
        tensor: any tensor.
        group: the process group.
        call: what the user has called.

    Raises:
        RuntimeError: another process did not make the call.
    """
    _together(call, lambda: torch.distributed.all_reduce(tensor, group=group))


def gathered(value: Any, group: ProcessGroup, call: Call) -> list[Any]:
    """Return what every process of a group has given, in the order of their ranks.

    Args:
        value: what this process gives. It can be pickled.
        group: the process group.
        call: what the user has called.

    Raises:
        RuntimeError: another process did not make the call.
    """
    values: list[Any] = [None] * group.size()
    _together(call, lambda: torch.distributed.all_gather_object(values, value, group=group))
    return values


def _together(call: Call, work: Callable[[], _Result]) -> _Result:
    try:
        return work()
    except RuntimeError as error:
        if not _ALONE.search(str(error)):
            raise
        raise RuntimeError(
            f"lwadamw.AdamW: {call.name} is collective, because parameters are split over processes. Another process has not "
            f"made the call within the timeout of the process group, or has ended. Make the call on every process. {call.alone}"
        ) from error


def device_of(groups: Sequence[ProcessGroup]) -> torch.device:
    """Return the device of tensors that process groups add up, for a process that holds no parameter to take it from.

    Args:
        groups: the process groups. They are of one kind.

    Returns:
        The accelerator, if a backend of the first group serves nothing else. Else the CPU.
    """
    # The configuration reads "cpu:gloo,cuda:nccl". Where one backend serves both, it adds up tensors of both.
    pairs = [part.split(":") for part in torch.distributed.get_backend_config(groups[0]).split(",")]
    backend_of = {pair[0]: pair[-1] for pair in pairs}
    for device, backend in backend_of.items():
        module = getattr(torch, device, None)  # torch.cuda, torch.xpu
        if device != "cpu" and backend_of.get("cpu") != backend and module is not None and module.is_available():
            return torch.device(device)
    return torch.device("cpu")
