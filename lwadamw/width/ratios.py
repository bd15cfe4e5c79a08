"""Width ratios: m = fan_in / base fan_in of each parameter, from any of the three forms of base_width."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..state.names import layer_type
from .patterns import as_mapping, first_match, matches_any, separating
from .roles import Decision, decide
from .rules import Role
from .sites import sites
from .specs import RoleSpec

_log = logging.getLogger("lwadamw")
_CONFIG_NAMES = ("hidden_size", "d_model", "n_embd", "dim", "width")
# Stands for a number that only the user knows. It is not valid Python, so nobody can run a remedy without filling it in.
_TO_FILL = "<its fan_in at the proxy>"


@dataclass(frozen=True, slots=True)
class Decided:
    """One distinct parameter of a model, and what was decided about its role.

    Attributes:
        param: the parameter.
        names: its name, then its aliases where it is tied.
        decision: its role and the evidence.
    """

    param: Tensor
    names: tuple[str, ...]
    decision: Decision

    @property
    def name(self) -> str:
        """The name that groups and norms use."""
        return self.names[0]

    @property
    def role(self) -> Role:
        """The role; `matrix` where nothing decided it, so that nothing loses its decay."""
        return self.decision.role or "matrix"

    @property
    def fan_in(self) -> int:
        """fan_in of any role. Rules may scale vectors too, and for a vector it is the last dimension, 1 for a single number."""
        return _fan_in(self.param, self.decision)

    def __str__(self) -> str:
        return f"{self.name!r} {tuple(self.param.shape)}"


# Gives the width ratio m of a parameter and a remark for its evidence.
Ratio = Callable[[Decided], tuple[float, str]]


def ratios(
    model: nn.Module,
    base_width: int | Mapping[str, int] | nn.Module,
    width: int | None,
    parameters: Sequence[Decided],
    scaled: Sequence[Decided],
    roles: Mapping[str, RoleSpec],
) -> Ratio:
    """Return the function that gives the width ratio m of a parameter.

    Args:
        model: the model whose parameters are to be grouped.
        base_width: the proxy's width, patterns and the fan_in of a matrix at the proxy, or the proxy model.
        width: the width of `model`, for an int `base_width`; None: from its config or its embedding.
        parameters: every distinct parameter of the model.
        scaled: the parameters whose multipliers depend on m. The function may be called for these.
        roles: patterns of the user and the role that each gives, for the parameters of a proxy model.

    Raises:
        TypeError: `base_width` has another type.
        ValueError: `base_width` does not determine the ratio of every parameter in `scaled`. With patterns and with a proxy
            model, the returned function raises it.
    """
    if isinstance(base_width, nn.Module):
        return _from_model(base_width, roles)
    if isinstance(base_width, Mapping):
        return _from_map(base_width, parameters, scaled)
    if isinstance(base_width, bool) or not isinstance(base_width, int):
        raise TypeError(
            f"param_groups: base_width is {type(base_width).__name__}. Give the proxy's width as an int, a mapping of name "
            "patterns to the fan_in at the proxy, or the proxy model."
        )
    width = _model_width(model) if width is None else width
    for name, value, whose in (("base_width", base_width, "the proxy"), ("width", width, "this model")):
        if value < 1:
            raise ValueError(f"param_groups: {name}={value} is not a positive width. Give the width of {whose}.")
    return _from_int(base_width, width, scaled)


def _fan_in(p: Tensor, decision: Decision) -> int:
    return decision.fan_in if decision.fan_in is not None else (p.shape[-1] if p.ndim else 1)


def _from_int(base_width: int, width: int, scaled: Sequence[Decided]) -> Ratio:
    if width == base_width:
        _log.info(
            "width == base_width == %d: this model is the proxy, so every multiplier is 1. Vectors still get no decay.",
            width,
        )
    odd = [d for d in scaled if d.decision.fan_in is not None and d.decision.fan_in % width]
    if odd:
        raise ValueError(
            f"param_groups: fan_in {odd[0].fan_in} of {odd[0]} is not a multiple of the width {width}, so "
            f"base_width={base_width} does not determine its width ratio. Pass the proxy model, for example built under "
            f'torch.device("meta"). Or pass this mapping, with the fan_in at the proxy filled in: '
            f"base_width={_mapping_for(base_width, width, scaled)}"
        )

    def ratio(found: Decided) -> tuple[float, str]:
        factor = (found.decision.fan_in or width) // width
        return width / base_width, f", base fan_in {factor * base_width}" if factor > 1 else ""

    return ratio


def _mapping_for(base_width: int, width: int, scaled: Sequence[Decided]) -> str:
    """Return the base_width mapping that says what an int base_width means, with a place to fill where it says nothing."""

    def base_fan_in(found: Decided) -> int | tuple[str, int]:
        factor, rest = divmod(found.fan_in, width)
        # Parameters of the same layer type but another fan_in need places of their own.
        return (_TO_FILL, found.fan_in) if rest or factor == 0 else factor * base_width

    patterns = separating({d.names: base_fan_in(d) for d in scaled}, unlisted=[base_width])
    patterns.setdefault("*", base_width)
    return as_mapping(patterns, lambda value: str(value) if isinstance(value, int) else value[0])


def _from_map(base: Mapping[str, int], parameters: Sequence[Decided], scaled: Sequence[Decided]) -> Ratio:
    for pattern, value in base.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(
                f"param_groups: base_width[{pattern!r}]={value!r} is not a positive fan_in. Give the fan_in that the matrix "
                "has at the proxy."
            )
        if not any(matches_any(pattern, found.names) for found in parameters):
            raise ValueError(
                f"param_groups: base_width pattern {pattern!r} matches no parameter. Correct the pattern or leave it out."
            )

    def ratio(found: Decided) -> tuple[float, str]:
        by_user = first_match(base, found.names)
        if by_user is not None:
            return found.fan_in / by_user[1], f", base fan_in {by_user[1]}"
        missing = {d.names: d.fan_in for d in scaled if first_match(base, d.names) is None}
        entries = as_mapping(separating(missing), lambda _: _TO_FILL)
        raise ValueError(
            f"param_groups: no base_width pattern matches {found}, fan_in {found.fan_in}. Add to the end of base_width: "
            f'{entries}. Or add "*" as the last pattern, with the fan_in of all remaining parameters at the proxy.'
        )

    return ratio


def _from_model(base: nn.Module, roles: Mapping[str, RoleSpec]) -> Ratio:
    fan_ins: dict[str, int] = {}
    by_type: dict[str, set[int]] = {}
    for p, places in sites(base):
        fan_in = _fan_in(p, decide(p, places, base, roles))
        for site in places:
            fan_ins[site.name] = fan_in
            by_type.setdefault(layer_type(site.name), set()).add(fan_in)

    def ratio(found: Decided) -> tuple[float, str]:
        differing: set[int] = set()
        for name in found.names:
            # A base model with fewer layers has no parameter of this name. Its layers of this type answer, if they agree.
            there = {fan_ins[name]} if name in fan_ins else by_type.get(layer_type(name), set())
            if len(there) == 1:
                (base_fan_in,) = there
                note = f", base fan_in {base_fan_in}" if found.decision.fan_in is not None else ""
                return found.fan_in / base_fan_in, note
            differing |= there
        if differing:
            raise ValueError(
                f"param_groups: the base model has no parameter {found.name!r}, and its parameters "
                f"{layer_type(found.name)!r} have the fan_ins {sorted(differing)}. Build the base model with as many layers "
                "as this model."
            )
        raise ValueError(
            f"param_groups: the base model has no parameter {found.name!r}. Build the base model with the model's own class "
            "and another width."
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
