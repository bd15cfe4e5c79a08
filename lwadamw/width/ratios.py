"""Width ratios: m = fan_in / base fan_in of each parameter, from however the user said what the base width is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from ..state.names import layer_type
from .roles import Decision, RoleSpec, decide, matches, sites

# (name, parameter, decision) -> (m, a remark for the evidence)
Ratio = Callable[[str, Tensor, Decision], tuple[float, str]]

_log = logging.getLogger("lwadamw")
_CONFIG_NAMES = ("hidden_size", "d_model", "n_embd", "dim", "width")


def ratios(
    model: nn.Module,
    base_width: int | Mapping[str, int] | nn.Module,
    width: int | None,
    names: Mapping[str, Sequence[str]],  # every parameter's name and its aliases
    roles: Mapping[str, RoleSpec],
) -> Ratio:
    """How to find the width ratio of a parameter.

    Raises:
        TypeError, ValueError: the base width is not given in a way that determines it.
    """
    if isinstance(base_width, nn.Module):
        return _from_model(base_width, names, roles)
    if isinstance(base_width, Mapping):
        return _from_map(base_width, names)
    if isinstance(base_width, bool) or not isinstance(base_width, int):
        raise TypeError(
            f"param_groups: base_width is {type(base_width).__name__}; give the proxy's width as an int, a mapping of name "
            "patterns to its fan_in, or the proxy model."
        )
    if base_width < 1:
        raise ValueError(f"param_groups: base_width={base_width} is not a positive width.")
    return _from_int(base_width, _model_width(model) if width is None else width)


def fan_in_of(p: Tensor, decision: Decision) -> int:
    """fan_in of any parameter; a vector, for rules that scale those too, counts its last dimension."""
    return decision.fan_in if decision.fan_in is not None else (p.shape[-1] if p.ndim else 1)


def _from_int(base_width: int, width: int) -> Ratio:
    if width == base_width:
        _log.info(
            "width == base_width == %d: every multiplier is 1, this is the proxy. Vectors still get no decay.", width
        )

    def ratio(name: str, p: Tensor, decision: Decision) -> tuple[float, str]:
        if decision.fan_in is None:
            return width / base_width, ""
        if decision.fan_in % width:
            pattern = layer_type(name)
            raise ValueError(
                f"param_groups: fan_in {decision.fan_in} of {name!r} {tuple(p.shape)} is not a multiple of the width {width}, "
                f"so base_width={base_width} does not fix its ratio. Pass the proxy model, e.g. built under "
                f'torch.device("meta"), or base_width={{"{pattern}": <its fan_in there>, "*": {base_width}}}.'
            )
        factor = decision.fan_in // width
        return width / base_width, f", base fan_in {factor * base_width}" if factor > 1 else ""

    return ratio


def _from_map(base: Mapping[str, int], names: Mapping[str, Sequence[str]]) -> Ratio:
    for pattern, value in base.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"param_groups: base_width[{pattern!r}]={value!r} is not a positive fan_in.")
        if not any(matches(pattern, alias) for aliases in names.values() for alias in aliases):
            raise ValueError(f"param_groups: base_width pattern {pattern!r} matches no parameter.")

    def ratio(name: str, p: Tensor, decision: Decision) -> tuple[float, str]:
        for pattern, value in base.items():
            if any(matches(pattern, alias) for alias in names[name]):
                return fan_in_of(p, decision) / value, f", base fan_in {value}"
        raise ValueError(
            f"param_groups: no base_width pattern matches {name!r} {tuple(p.shape)}, fan_in {fan_in_of(p, decision)}. "
            'Add one, or "*" as the last for all the rest.'
        )

    return ratio


def _from_model(base: nn.Module, names: Mapping[str, Sequence[str]], roles: Mapping[str, RoleSpec]) -> Ratio:
    fan_ins: dict[str, int] = {}
    layered: dict[str, set[int]] = {}
    for p, places in sites(base):
        fan_in = fan_in_of(p, decide(p, places, base, roles))
        for site in places:
            fan_ins[site.name] = fan_in
            layered.setdefault(layer_type(site.name), set()).add(fan_in)

    def ratio(name: str, p: Tensor, decision: Decision) -> tuple[float, str]:
        for alias in names[name]:
            there = {fan_ins[alias]} if alias in fan_ins else layered.get(layer_type(alias), set())
            if len(there) == 1:  # the same parameter, or that of every layer of a shallower base
                (base_fan_in,) = there
                note = f", base fan_in {base_fan_in}" if decision.fan_in is not None else ""
                return fan_in_of(p, decision) / base_fan_in, note
        raise ValueError(
            f"param_groups: the base model has no parameter {name!r}. Build it with the model's own class and another width."
        )

    return ratio


def _model_width(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    for name in _CONFIG_NAMES:
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.embedding_dim
    raise ValueError("param_groups: cannot tell the model's width. Pass width=..., or the proxy model as base_width.")
