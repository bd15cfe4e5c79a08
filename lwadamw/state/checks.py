"""Checks of parameters, gradients and state that are made before a step writes anything."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import decay, keys
from .blocks import QUANT, cut
from .companions import misfit, misfit_of_codes
from .members import Member, is_fake, local, members_of
from .storage import ARRAYS, CODES, COMPANIONS, FLOATS, MOMENTS, SCALES, check_options, check_parameter, wanted_dtype

_ANEW = "del optimizer.state[p] starts its moments at zero"


def check_state(member: Member, state: Mapping[str, Any]) -> None:
    """Raise an error if the state of a parameter does not fit the parameter.

    Args:
        member: the parameter.
        state: its state.

    Raises:
        RuntimeError: a tensor of the state has another shape, another device, or other placements than the parameter, or a
            dtype that it cannot be kept in; a companion does not fit the parameter; an 8-bit moment has no fitting scales,
            or is not possible under amsgrad or with these segments; or the huber threshold is not float32[].
        ValueError: the group asks for a way to keep weights that float16 does not have.
    """
    p = member.param
    for key in ARRAYS:
        tensor = state.get(key)
        if tensor is None:
            continue
        if tensor.shape != p.shape or local(tensor).shape != local(p).shape:
            parts = (
                ""
                if tensor.shape != p.shape
                else (f" and this process holds {tuple(local(tensor).shape)} and {tuple(local(p).shape)} of them")
            )
            raise RuntimeError(
                f"{key} of {member.name!r} has shape {tuple(tensor.shape)}, the parameter {tuple(p.shape)}{parts}. {_ANEW}. Or "
                "load a checkpoint of this model."
            )
        if tensor.device != p.device:
            raise RuntimeError(
                f"{key} of {member.name!r} {tuple(p.shape)} is on {tensor.device}, the parameter on {p.device}. "
                f"Move the optimizer state back before stepping: optimizer.state[p][{key!r}] = "
                f"optimizer.state[p][{key!r}].to(p.device)."
            )
    check_companion(member, state)
    if p.dtype == torch.float16 and not any(key in state for key in COMPANIONS):
        check_parameter(p, member.name, member.group)  # somebody may have edited the group
    _check_moments(member, state)
    step = state.get("step")
    if isinstance(step, Tensor) and step.numel() != 1:
        raise RuntimeError(
            f"step of {member.name!r} {tuple(p.shape)} has shape {tuple(step.shape)}, and is one number. "
            "optimizer.state[p]['step'] = torch.tensor(1.0) sets it to 1."
        )
    if decay.is_huber(member.group):
        _check_threshold(member, state)
    if member.group["amsgrad"] and "exp_avg_sq" in state and state["exp_avg_sq"].dtype in CODES:
        raise RuntimeError(
            f"exp_avg_sq of {member.name!r} {tuple(p.shape)} is kept in 8 bits, and amsgrad=True would keep its maximum, which "
            "8 bits cannot. Set the group's exp_avg_sq_dtype to torch.bfloat16 or torch.float32 and call "
            "optimizer.convert_state(), or set amsgrad=False."
        )
    codes = any(state[key].dtype in CODES for key in SCALES if key in state)
    if codes and any(size % QUANT for size in member.segments):
        raise RuntimeError(
            f"the moments of {member.name!r} {tuple(p.shape)} are kept in 8 bits, and its segments of {member.segments} "
            f"elements do not hold whole blocks of {QUANT} that share a scale. optimizer.convert_state() makes these moments "
            "torch.float32."
        )
    if (reason := misfit_of_codes(p, state)) is not None:
        raise RuntimeError(
            f"the state of {member.name!r} {tuple(p.shape)} does not fit: {reason}. {_ANEW}. Or load moments and scales from "
            "the same checkpoint."
        )


def check_layouts(members: Sequence[Member], state: Mapping[Any, Mapping[str, Any]]) -> None:
    """Raise an error if a parameter has or gets moments in 8 bits, and is sharded inside blocks that share a scale.

    All processes raise the same error, because only whole shapes, meshes, placements and dtypes are looked at.

    Args:
        members: the parameters.
        state: the optimizer's state by parameter.

    Raises:
        RuntimeError: a shard of a parameter does not consist of whole blocks.
    """
    found = [m for m in members if cut(m.param) is not None and _in_codes(m, state.get(m.param, {}))]
    if not found:
        return
    first = found[0]
    names = ", ".join(repr(m.name) for m in found[1:4]) + (f" and {len(found) - 4} more" if len(found) > 4 else "")
    others = f" The same holds for {names}." if names else ""
    raise RuntimeError(
        f"{first.name!r} {tuple(first.param.shape)} has moments in 8 bits and {cut(first.param)}.{others} Shard another "
        "dimension, or use a number of shards that divides the parameter into whole blocks, or put such parameters into a "
        "group of their own with moments of 16 bits. To change whole groups:\n"
        f"    for i in {sorted({m.group_index for m in found})}: optimizer.param_groups[i].update("
        "exp_avg_dtype=torch.bfloat16, exp_avg_sq_dtype=torch.bfloat16)"
    )


def _in_codes(member: Member, state: Mapping[str, Any]) -> bool:
    p, group, segments = member.param, member.group, member.whole_segments
    kept = (state[k].dtype if k in state else wanted_dtype(p, group, k, segments) for k in ("exp_avg", "exp_avg_sq"))
    return any(dtype in CODES for dtype in kept)


def check_companion(member: Member, state: Mapping[str, Any]) -> None:
    """Raise an error if the companion of a weight can neither be used nor be merged. `companions.misfit` says when.

    Args:
        member: the parameter.
        state: its state.

    Raises:
        RuntimeError: the companion does not fit the dtype of the parameter.
    """
    p = member.param
    if (reason := misfit(p, state)) is not None:
        raise RuntimeError(
            f"the state of {member.name!r} {tuple(p.shape)} does not fit: {reason}. Give the parameter its former dtype back, "
            "or drop the companion and with it the digits that it holds: "
            "for key in ('master_param', 'kahan_comp'): optimizer.state[p].pop(key, None)."
        )


def check_conversion(member: Member, state: Mapping[str, Any]) -> None:
    """Raise an error if the state of a parameter cannot be converted to the storage that its group asks for.

    Args:
        member: the parameter.
        state: its state.

    Raises:
        RuntimeError: the companion does not fit the dtype of the parameter, a moment in 8 bits has no scales, or the state has
            amsgrad's maximum and the group asks for an 8-bit second moment.
        ValueError: a storage option of the group is not valid, or does not work with the parameter.
    """
    p, group = member.param, member.group
    check_companion(member, state)
    check_options({**group, "amsgrad": False}, f"group {member.group_index}: ")
    check_parameter(p, member.name, group)
    for key, scales in SCALES.items():
        if key in state and state[key].dtype in CODES and scales not in state:
            raise RuntimeError(
                f"{key} of {member.name!r} {tuple(p.shape)} is kept in codes of 8 bits, and its {scales} is missing. {_ANEW}."
            )
    if "max_exp_avg_sq" in state and wanted_dtype(p, group, "exp_avg_sq", member.whole_segments) in CODES:
        raise RuntimeError(
            f"exp_avg_sq of {member.name!r} {tuple(p.shape)} would be kept in 8 bits, and so would its maximum, which 8 bits "
            "cannot keep. Set the group's exp_avg_sq_dtype to torch.bfloat16. Or set amsgrad=False and drop the maximum: "
            "optimizer.state[p].pop('max_exp_avg_sq')."
        )


def _check_moments(member: Member, state: Mapping[str, Any]) -> None:
    """Raise an error if a moment has a dtype in which no backend keeps it."""
    p = member.param
    for key in MOMENTS:
        if key not in state:
            continue
        codes = {"exp_avg": torch.int8, "exp_avg_sq": torch.uint8}.get(key)
        dtypes = {*FLOATS, codes, p.dtype} - {None}
        if p.dtype.is_complex:
            dtypes = {torch.complex64, p.dtype}
        if key == "max_exp_avg_sq" and "exp_avg_sq" in state:
            dtypes = {state["exp_avg_sq"].dtype}
        if state[key].dtype not in dtypes:
            fitting = torch.float32 if torch.float32 in dtypes else next(iter(dtypes))
            raise RuntimeError(
                f"{key} of {member.name!r} {tuple(p.shape)} is {state[key].dtype}, and beside a parameter of {p.dtype} it can "
                f"be {' or '.join(sorted(map(str, dtypes)))}. To cast it: "
                f"optimizer.state[p][{key!r}] = optimizer.state[p][{key!r}].to({fitting}). {_ANEW}."
            )


def _check_threshold(member: Member, state: Mapping[str, Any]) -> None:
    p, threshold = member.param, state.get(decay.THRESHOLD)
    if threshold is None or (threshold.shape, threshold.dtype, threshold.device) == ((), torch.float32, p.device):
        return
    raise RuntimeError(
        f"{decay.THRESHOLD} of {member.name!r} {tuple(p.shape)} is {threshold.dtype}{list(threshold.shape)} on "
        f"{threshold.device}, and has to be torch.float32[] on {p.device}. To compute it again from the weights: "
        f"del optimizer.state[p][{decay.THRESHOLD!r}]."
    )


def check_gradient(member: Member, grad: Tensor) -> None:
    """Raise an error if a gradient is not one of its parameter.

    Args:
        member: the parameter.
        grad: its gradient.

    Raises:
        RuntimeError: the gradient does not have a strided layout, has another shape than the parameter, its memory has been
            freed, or one of the two is complex.
    """
    p = member.param
    where = keys.GRAD_ATTRIBUTE.of(member.group)
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"AdamW does not support sparse gradients: the gradient of {member.name!r} {tuple(p.shape)} is "
            f"{grad.layout}. Build its module with sparse=False, or give the parameter to torch.optim.SparseAdam."
        )
    held = local(grad)
    if held.shape != local(p).shape:
        raise RuntimeError(
            f"the gradient of {member.name!r} {tuple(local(p).shape)} in p.{where} has shape {tuple(held.shape)}. "
            f"If somebody has changed the parameter since backward, drop the gradient: p.{where} = None. "
            f"Otherwise put a gradient of the parameter's shape there."
        )
    if held.numel() and not is_fake(held) and not held.untyped_storage().nbytes():
        raise RuntimeError(
            f"the memory of the gradient of {member.name!r} {tuple(p.shape)} in p.{where} has been freed. Bring it back, or "
            f"drop the gradient: p.{where} = None."
        )
    if grad.is_complex() != p.is_complex():
        raise RuntimeError(
            f"the gradient of {member.name!r} {tuple(p.shape)} in p.{where} is {grad.dtype}, the parameter {p.dtype}. Cast it: "
            f"p.{where} = p.{where}.to(p.dtype)."
        )


def check_real(members: Iterable[Member]) -> None:
    """Raise an error if a real parameter is about to be updated under torch's FakeTensorMode.

    Its state would become fake, torch's operators would update copies of it, and a compiled kernel would update it in earnest.

    Args:
        members: the parameters.

    Raises:
        RuntimeError: the mode is active and a parameter is a real tensor.
    """
    if not torch._C._len_torch_dispatch_stack() or not is_fake(torch.empty(0, device="cpu")):
        return
    for member in members:
        if not is_fake(local(member.param)):
            raise RuntimeError(
                f"step() under FakeTensorMode, but {member.name!r} {tuple(member.param.shape)} is a real tensor, so the step "
                "cannot be simulated. Leave the mode before step(), or build the model under the mode too."
            )


def capturing(device: torch.device | None = None) -> bool:
    """Return whether the current stream of a device is being captured in a CUDA graph.

    Args:
        device: the device; None: the current device. Nothing is ever captured on a CPU.
    """
    initialized: bool = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    if not initialized or (device is not None and device.type == "cpu"):
        return False
    if device is None or device.index == torch.cuda.current_device():
        return torch.cuda.is_current_stream_capturing()
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def check_capturable(groups: Sequence[dict[str, Any]]) -> None:
    """Raise an error if a step over these groups cannot be captured in a CUDA graph.

    Args:
        groups: an optimizer's `param_groups`.

    Raises:
        RuntimeError: a group has capturable=False, or a parameter is on a device on which nothing is being captured.
    """
    for i, group in enumerate(groups):
        if not group["capturable"]:
            raise RuntimeError(
                f"step() is being captured in a CUDA graph, but group {i} has capturable=False. "
                "Build the optimizer with capturable=True."
            )
    captured: set[torch.device] = set()
    for m in members_of(groups):
        device = local(m.param).device
        if device not in captured and not capturing(device):
            raise RuntimeError(
                f"step() is being captured in a CUDA graph, but nothing is being captured on {device}, where {m.name!r} "
                f"{tuple(m.param.shape)} is. A replay would leave this parameter as it is. Give the parameters of {device} an "
                "optimizer of their own."
            )
        captured.add(device)


def check_not_captured(member: Member) -> None:
    """Raise an error if a parameter is about to take its step inside a backward that is being captured in a CUDA graph.

    Args:
        member: the parameter.

    Raises:
        RuntimeError: the current stream of the parameter's device is being captured.
    """
    p = member.param
    if capturing(local(p).device):
        raise RuntimeError(
            f"lwadamw.AdamW: the backward that releases the gradient of {member.name!r} {tuple(p.shape)} is being captured "
            "in a CUDA graph. Call remove() on the handle of release_gradients(), and capture step()."
        )
