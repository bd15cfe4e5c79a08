"""Width ratios: m = fan_in / base fan_in of each parameter, from any of the three forms of base_width."""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor, nn

from ..state.names import layer_type
from . import remedies
from .evidence import fan_in_of
from .patterns import ALL, first_match, matches_any, separating
from .roles import Decided, decide
from .specs import RoleSpec
from .widths import model_width, width_at

_log = logging.getLogger("lwadamw")

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
        ValueError: `base_width` does not determine the ratio of every parameter in `scaled`. With a proxy model, the returned
            function raises it.
    """
    if isinstance(base_width, nn.Module):
        return _from_model(base_width, parameters, roles)
    if isinstance(base_width, Mapping):
        return _from_map(base_width, parameters, scaled)
    if isinstance(base_width, bool) or not isinstance(base_width, int):
        raise TypeError(
            f"param_groups: base_width is {type(base_width).__name__}. Give the proxy's width as an int, a mapping of name "
            "patterns to the fan_in at the proxy, or the proxy model."
        )
    width = _found_width(model, scaled) if width is None else width
    for name, value, whose in (("base_width", base_width, "the proxy"), ("width", width, "this model")):
        if value < 1:
            raise ValueError(f"param_groups: {name}={value} is not a positive width. Give the width of {whose}.")
    return _from_int(base_width, width, scaled)


def _found_width(model: nn.Module, scaled: Sequence[Decided]) -> int:
    """Return the width of a model, if its matrices have it as fan_in. The width of an embedding has to be the usual fan_in."""
    width, source = model_width(model)
    fan_ins = Counter(d.fan_in for d in scaled if d.role == "matrix" and d.fan_in is not None)
    usual = fan_ins.most_common(1)
    if usual and (width not in fan_ins or (source.startswith("the embedding") and fan_ins[width] < usual[0][1])):
        raise ValueError(
            f"param_groups: cannot tell the model's width. It is {width} by {source}, but most of its matrices have the fan_in "
            f"{usual[0][0]}. Pass width={usual[0][0]} or the width that is meant, or the proxy model as base_width."
        )
    _log.info("the width of the model is %d, by %s", width, source)
    return width


def _from_int(base_width: int, width: int, scaled: Sequence[Decided]) -> Ratio:
    if width == base_width:
        _log.info(
            "width == base_width == %d: this model is the proxy, so every multiplier is 1. Vectors still get no decay.",
            width,
        )
    widths: dict[int, int | None] = {}
    apart = {d.name: own for d in scaled if (own := width_at(d.site, widths)) not in (None, width)}
    odd = [d for d in scaled if d.name in apart or (d.fan_in is not None and d.fan_in % width)]
    follows = [] if width == base_width else _assumed([d for d in scaled if d.fan_in is not None])
    assumed = {d.name for d in follows}
    if odd:
        raise ValueError(remedies.for_int(base_width, width, scaled, odd, assumed, apart))
    if assumed:
        listed = separating({d.names: d.name in assumed for d in scaled}, unlisted=[False])
        _log.warning(
            "base_width=%d assumes that the inputs of these matrices follow the width: %s. If one has as many inputs at the "
            "proxy, give a mapping or the proxy model as base_width. If it projects data, it is a vector: give its role.",
            base_width,
            ", ".join(listed),
        )

    def ratio(found: Decided) -> tuple[float, str]:
        factor = (found.fan_in or width) // width
        remark = f", base fan_in {factor * base_width}" if factor > 1 or found.name in assumed else ""
        return width / base_width, remark + (" assumed" if found.name in assumed else "")

    return ratio


def _assumed(matrices: Sequence[Decided]) -> list[Decided]:
    """Return the matrices of which nothing tells that their inputs follow the width, though their fan_in is a multiple of it.

    In a model of numbered layers, the inputs of a linear layer inside them, and of the head after them, are the model's own.
    The channels of convolutions grow from stage to stage, and often not with the width, and a head after them reads channels.
    """
    convolutions = {d.name for d in matrices if len(d.decision.dims) > 1}
    own = {d.name for d in matrices if _is_in_a_layer(d)} - convolutions
    own |= {d.name for d in matrices if d.role == "output" and not convolutions}
    return [d for d in matrices if d.name not in own]


def _is_in_a_layer(found: Decided) -> bool:
    """Return whether a matrix is inside a module that has a number. A matrix that has the number itself is no layer."""
    return any(part.isdigit() for part in found.site.path[:-1])


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
    chosen = {d.name: first_match(base, d.names) for d in scaled}
    missing = [d for d in scaled if chosen[d.name] is None]
    if missing:
        raise ValueError(remedies.for_missing(missing, scaled))
    members: dict[str, list[Decided]] = {}
    for d in scaled:
        if (by_user := chosen[d.name]) is not None:
            members.setdefault(by_user[0], []).append(d)
    for pattern, matched in members.items():
        if not pattern.startswith(ALL) and len({d.inputs for d in matched}) > 1:
            raise ValueError(remedies.for_unlike(pattern, base[pattern], matched, scaled))

    def ratio(found: Decided) -> tuple[float, str]:
        by_user = chosen[found.name]
        base_fan_in = by_user[1] if by_user else found.inputs
        return found.inputs / base_fan_in, f", base fan_in {base_fan_in}"

    return ratio


def _from_model(base: nn.Module, parameters: Sequence[Decided], roles: Mapping[str, RoleSpec]) -> Ratio:
    there = {name: d for d in decide(base, roles) for name in d.names}
    by_type, here = _by_type(there.values()), _by_type(parameters)
    agree = functools.cache(lambda kind: len({d.inputs for d in here.get(kind, ())}) == 1)

    def ratio(found: Decided) -> tuple[float, str]:
        differing: dict[int, str] = {}
        for name in found.names:
            # A base model with fewer layers has no parameter of this name. Its other layers answer, if all of them agree, and
            # if those of this model agree too.
            kind = next((kind for kind in _depth_types(name) if kind in by_type), "")
            at_proxy = [there[name]] if name in there else by_type.get(kind, [])
            if not at_proxy:
                continue
            fan_ins = {_same_dimensions(found, d): d.name for d in at_proxy}
            alike = name in there or agree(kind)
            if len(fan_ins) == 1 and alike:
                (base_fan_in,) = fan_ins
                note = f", base fan_in {base_fan_in}" if found.fan_in is not None else ""
                return found.inputs / base_fan_in, note
            differing |= fan_ins if alike else {d.inputs: f"{d.name} of this model" for d in here[kind]}
        if differing:
            listed = ", ".join(f"{name!r} {fan_in}" for fan_in, name in sorted(differing.items()))
            raise ValueError(
                f"param_groups: the base model has no parameter {found.name!r}, and its parameters "
                f"{layer_type(found.name)!r} have different fan_ins: {listed}. Build the base model with as many layers as "
                "this model."
            )
        raise ValueError(
            f"param_groups: the base model has no parameter {found.name!r}. Build the base model with the model's own class "
            "and another width."
        )

    return ratio


def _by_type(parameters: Iterable[Decided]) -> dict[str, list[Decided]]:
    """Return parameters by their names with `*` in place of one layer number, or of all."""
    by_type: dict[str, list[Decided]] = {}
    for d in parameters:
        for name in d.names:
            for kind in _depth_types(name):
                by_type.setdefault(kind, []).append(d)
    return by_type


def _depth_types(name: str) -> Iterator[str]:
    """Yield a name with `*` in place of one number, from the innermost to the outermost number, and then of all numbers."""
    parts = name.split(".")
    numbers = [i for i, part in enumerate(parts) if part.isdigit()]
    for i in reversed(numbers):
        yield ".".join([*parts[:i], "*", *parts[i + 1 :]])
    if len(numbers) > 1:
        yield layer_type(name)


def _same_dimensions(found: Decided, at_proxy: Decided) -> int:
    """Return the fan_in at the proxy, from the dimensions that are the fan_in at this model.

    Raises:
        ValueError: the two parameters differ in more than their sizes.
    """
    p: Tensor = at_proxy.param
    if p.ndim != found.param.ndim:
        raise ValueError(
            f"param_groups: {found} has the shape {tuple(p.shape)} at the base model. Build the base model with the "
            "model's own class and another width."
        )
    here, proxy = found.decision, at_proxy.decision
    if here.role != proxy.role and proxy.role is not None and not (here.by_size or proxy.by_size):
        raise ValueError(
            f"param_groups: {found} is {here.role!r} ({here.why}), but {at_proxy} of the base model is {proxy.role!r} "
            f"({proxy.why}). Build the base model with the same options, or give "
            f'roles={{"{found.name}": <role>}} with the role that both have.'
        )
    return at_proxy.inputs if found.fan_in is None else fan_in_of(p, at_proxy.site, here)
