"""Rebinding: give groups the parameters that a model has today, after a wrapper has replaced those that they were built of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from ..state.names import has_names
from .groups import Evidence, Groups
from .sites import sites


def rebind(groups: Iterable[Mapping[str, Any]], model: nn.Module) -> Groups:
    """Return the same groups with the parameters that a model has today, found by their names.

    `fully_shard`, `parallelize_module` and other wrappers put new parameters in the place of those that a model had. Groups
    that were built before still hold the old ones, which no longer get gradients. Roles, multipliers, segments, evidence and
    all other keys of the groups stay as they are. The groups that are given are not changed.

    Args:
        groups: what `param_groups` returned, or the `param_groups` of an optimizer that was built from it.
        model: the model today, with or without its wrappers.

    Returns:
        New groups for `AdamW`. A tied parameter stands in them once, under the name that it had.

    Raises:
        TypeError: `model` is not a torch.nn.Module.
        ValueError: the groups have no names, a parameter of the groups is missing in the model or has another shape there, the
            model has a parameter that is new, or two parameters of the groups have become one.

    Examples:
        >>> import torch
        >>> from lwadamw import param_groups
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
        >>> groups = param_groups(model, 4, width=8, roles={"*.weight": "matrix"})
        >>> for layer in model:
        ...     layer.weight = torch.nn.Parameter(layer.weight.detach().clone())  # as fully_shard does
        >>> groups = rebind(groups, model)
        >>> groups[0]["params"][0][1] is model[0].weight
        True
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"rebind: model is {type(model).__name__}. Give the torch.nn.Module whose parameters are trained."
        )
    evidence: dict[str, Evidence] = dict(getattr(groups, "evidence", {}))
    named = [(group, _named(group, i)) for i, group in enumerate(groups)]
    former = {name: p for _, params in named for name, p in params}
    today = {site.name: p for p, places in sites(model) for site in places}
    missing = [f"{name!r} {tuple(p.shape)}" for name, p in former.items() if name not in today]
    new = _new(model, former, evidence)
    if missing or new:
        raise ValueError(_different(missing, new))
    _check_apart({name: today[name] for name in former})
    for name, p in former.items():
        _check_shape(name, p, today[name])
    bound = []
    for group, params in named:
        # `params` stays the first key, as torch has it.
        kept = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        kept = {key: dict(value) if isinstance(value, Mapping) else value for key, value in kept.items()}
        bound.append({"params": [(name, today[name]) for name, _ in params], **kept})
    return Groups(bound, evidence)


def _named(group: Mapping[str, Any], index: int) -> list[tuple[str, Tensor]]:
    """Return the names and the parameters of a group of `param_groups` or of an optimizer."""
    params = list(group["params"])
    if all(isinstance(entry, tuple) for entry in params):
        return params
    if has_names(group):
        return list(zip(group["param_names"], params, strict=True))
    raise ValueError(
        f"rebind: group {index} has {len(params)} parameters without names, so nobody can tell which parameter of the model "
        "takes the place of each. Give what lwadamw.param_groups returned with fold=False; or call param_groups after the "
        "model has been wrapped."
    )


def _new(model: nn.Module, former: Mapping[str, Tensor], evidence: Mapping[str, Evidence]) -> list[str]:
    """Return the parameters of a model that the groups do not have, and that were not left out as frozen."""
    found = []
    for p, places in sites(model):
        names = [site.name for site in places]
        if any(name in former for name in names):
            continue
        known = next((evidence[name] for name in names if name in evidence), None)
        if not p.requires_grad and (known is None or known.frozen) and not getattr(p, "_is_flat_param", False):
            continue
        note = ", which was frozen when the groups were built" if known is not None and known.frozen else ""
        tied = next((name for name, of in evidence.items() if names[0] in _tied_with(of)), None)
        found.append(f"{names[0]!r} {tuple(p.shape)}{note}" + (f", which was tied with {tied!r}" if tied else ""))
    return found


def _tied_with(evidence: Evidence) -> list[str]:
    """Return the names in the evidence of a tied parameter."""
    _, _, tied = evidence.why.partition("; tied with ")
    return tied.partition(";")[0].split(", ")


def _different(missing: list[str], new: list[str]) -> str:
    lines = [f"{kind}: {_listed(names)}." for kind, names in (("missing", missing), ("new", new)) if names]
    return (
        "rebind: the model has not the parameters that the groups were built of.\n  "
        + "\n  ".join(lines)
        + "\nGive the model that param_groups was called with, after it has been wrapped. If the wrapper has changed names, "
        "ties, or which parameters are frozen, call lwadamw.param_groups on the wrapped model instead. "
        "FullyShardedDataParallel needs use_orig_params=True."
    )


def _listed(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f", and {len(names) - 8} more" if len(names) > 8 else "")


def _check_apart(bound: Mapping[str, Tensor]) -> None:
    first: dict[int, str] = {}
    for name, p in bound.items():
        other = first.setdefault(id(p), name)
        if other != name:
            raise ValueError(
                f"rebind: {other!r} and {name!r} {tuple(p.shape)} were two parameters when the groups were built, and are one "
                "now. Tie them before lwadamw.param_groups is called."
            )


def _check_shape(name: str, former: Tensor, today: Tensor) -> None:
    """Raise a ValueError if a parameter has another shape than before and is no shard. Width ratios follow from the shape."""
    # Shards of engines that flatten parameters, and of Megatron's layers, have the shape of what one process holds.
    shard = today.numel() <= former.numel() and (today.ndim == 1 or getattr(today, "tensor_model_parallel", False))
    if today.shape != former.shape and not shard:
        raise ValueError(
            f"rebind: {name!r} had shape {tuple(former.shape)} when its role and its width ratio were decided, and has shape "
            f"{tuple(today.shape)} in the model. Call lwadamw.param_groups with this model."
        )
