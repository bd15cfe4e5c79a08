"""Roles: what each parameter of a model is to a width rule, and the evidence for it.

These are asked in this order, and the first answer counts:

1. a pattern of the user,
2. a module class that the user has registered,
3. the shape: at most one dimension is a vector,
4. an embedding or a norm,
5. a head or a router,
6. another well-known module class.

If none has an answer, `param_groups` raises an error that names the parameter and the remedy. It does not guess, because
vectors have no weight decay: a matrix that is taken for a vector would silently lose its decay. A role never depends on the
width of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from .patterns import first_match
from .rules import Role
from .sites import Site
from .specs import Matrix, Output, RoleSpec, check_spec


@dataclass(frozen=True, slots=True)
class Decision:
    """The role of one parameter, and the evidence for it.

    Attributes:
        role: the role; None where nothing decided it.
        fan_in: number of inputs of each output, from the global shape; None for a vector and where nothing decided the role.
        why: the evidence in a few words, as `summary` prints it.
    """

    role: Role | None
    fan_in: int | None
    why: str


_HEAD_NAMES: Final = (
    "lm_head",
    "output",
    "head",
    "unembed",
    "unembedding",
    "embed_out",
    "output_layer",
    "classifier",
    "score",
)
_ROUTER_NAMES: Final = ("router", "gate")
# A convolution of at most this many input channels reads an image or a sound, so it embeds the input.
_MOST_INPUT_CHANNELS: Final = 4

_REGISTERED: dict[type[nn.Module], dict[str, RoleSpec]] = {}


def register_role(module: type[nn.Module], roles: Mapping[str, RoleSpec]) -> None:
    """Decide the roles of the parameters of a module class of your own, for every model that has this class.

    Args:
        module: the class. Its subclasses count too.
        roles: for the names of parameters within the module: "matrix", "vector", "output", `Matrix(fan_in=dim)` or
            `Output(fan_in=dim)`.

    Raises:
        TypeError: `module` is not a subclass of torch.nn.Module.
        ValueError: a role is none of those.

    Example:
        >>> import torch
        >>> class Experts(torch.nn.Module): ...
        >>> register_role(Experts, {"w1": Matrix(fan_in=-1), "w2": Matrix(fan_in=-1)})
    """
    if not (isinstance(module, type) and issubclass(module, nn.Module)):
        raise TypeError(f"register_role: {module!r} is not a subclass of torch.nn.Module.")
    for spec in roles.values():
        check_spec(spec)
    _REGISTERED[module] = dict(roles)


def decide(p: Tensor, places: list[Site], model: nn.Module, roles: Mapping[str, RoleSpec]) -> Decision:
    """Decide the role of one parameter.

    A tied parameter is a vector if one of its sites is an embedding. Its rows are looked up there, whatever else uses it.

    Args:
        p: the parameter.
        places: all its sites, as `sites` yields them.
        model: the whole model, in which heads are looked for.
        roles: patterns of the user and the role that each gives; the first pattern that matches one of the names counts.

    Returns:
        The decision; its role is None where nothing decided it.

    Raises:
        ValueError: a role of the user does not say which dimension is the fan_in, or names a dimension that does not exist.
        RuntimeError: the parameter is a flattened or partitioned shard.
    """
    by_user = first_match(roles, [site.name for site in places])
    if by_user is not None:
        pattern, spec = by_user
        return _apply(spec, p, f"roles[{pattern!r}]", places[0].name)
    decisions = [_from_evidence(p, site, model) for site in places]
    decided = [d for d in decisions if d.role is not None]
    best = next((d for d in decided if d.role == "vector"), decided[0] if decided else decisions[0])
    if len(places) > 1:
        others = [site.name for site, d in zip(places, decisions, strict=True) if d is not best]
        return Decision(best.role, best.fan_in, f"{best.why}; tied with {', '.join(others)}")
    return best


def _apply(spec: RoleSpec, p: Tensor, why: str, name: str) -> Decision:
    """Return the decision that follows from a role as a user gives it."""
    if spec == "vector":
        return Decision("vector", None, why)
    if p.ndim == 0:
        raise ValueError(
            f'param_groups: {why} gives {name!r} {spec}, but it is a single number without a fan_in. Give "vector".'
        )
    if isinstance(spec, str):
        if p.ndim != 2:
            raise ValueError(
                f"param_groups: {why} calls {name!r} {tuple(p.shape)} {spec!r}, but which of its {p.ndim} dimensions is the "
                f"fan_in? Give lwadamw.{spec.capitalize()}(fan_in=-1) if the inputs are the last dimension, else the number of "
                "their dimension."
            )
        spec = Matrix() if spec == "matrix" else Output()
    dims = spec.fan_in if isinstance(spec.fan_in, tuple) else (spec.fan_in,)
    if not all(-p.ndim <= dim < p.ndim for dim in dims):
        raise ValueError(
            f"param_groups: {why} gives dimension {spec.fan_in} of {name!r}, which has shape {tuple(p.shape)}. Give a "
            f"dimension from {-p.ndim} to {p.ndim - 1}."
        )
    fan_in = math.prod(p.shape[dim] for dim in dims)
    return Decision("matrix" if isinstance(spec, Matrix) else "output", fan_in, why)


def _from_evidence(p: Tensor, site: Site, model: nn.Module) -> Decision:
    """Return the decision from one site, without the patterns of the user."""
    module, kind = site.module, type(site.module).__name__
    for registered, specs in _REGISTERED.items():
        if isinstance(module, registered) and site.attribute in specs:
            return _apply(specs[site.attribute], p, f"register_role({registered.__name__})", site.name)
    if kind == "FlatParameter" or type(p).__name__ == "FlatParameter":
        _refuse_shard(p, site)
    if any(part.startswith("lora_") for part in site.name.split(".")):
        return Decision(None, None, "LoRA: no width rule is settled for it")
    if p.ndim <= 1:
        if site.attribute == "weight" and isinstance(module, (nn.Linear, nn.Embedding)):
            _refuse_shard(p, site)
        return Decision("vector", None, kind if "Norm" in kind else f"{p.ndim}-D")
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) or (
        kind.endswith("Embedding") and site.attribute == "weight"
    ):
        return Decision("vector", None, kind)
    if isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
        return Decision("vector", None, kind)
    if p.ndim == 2 and (found := _output_evidence(p, site, model)) is not None:
        return Decision("output", p.shape[-1], found)
    return _from_type(p, site, kind)


def _from_type(p: Tensor, site: Site, kind: str) -> Decision:
    """Return the decision from the class of the module that holds the parameter."""
    module, attribute = site.module, site.attribute
    if isinstance(module, nn.Linear) and attribute == "weight":
        return Decision("matrix", p.shape[-1], kind)
    if kind == "Conv1D" and attribute == "weight" and p.ndim == 2:  # of transformers' GPT-2, of shape (in, out)
        return Decision("matrix", p.shape[0], kind)
    if kind in ("ColumnParallelLinear", "RowParallelLinear") and attribute == "weight":
        return Decision("matrix", int(getattr(module, "input_size", p.shape[-1])), kind)
    if isinstance(module, nn.modules.conv._ConvNd) and attribute == "weight":
        if module.groups > 1 and module.groups == module.in_channels:
            return Decision("vector", None, f"depthwise {kind}")
        if module.in_channels <= _MOST_INPUT_CHANNELS:
            return Decision("vector", None, f"{kind} of {module.in_channels} input channels: embeds the input")
        taps = p[0, 0].numel()
        return Decision("matrix", module.in_channels // module.groups * taps, kind)
    if isinstance(module, nn.MultiheadAttention) and attribute.endswith("proj_weight"):
        return Decision("matrix", p.shape[-1], kind)
    if isinstance(module, nn.RNNBase) and attribute.startswith("weight_"):
        return Decision("matrix", p.shape[-1], kind)
    return Decision(None, None, f"{type(p).__name__} on {kind}, not a known module")


def _output_evidence(p: Tensor, site: Site, model: nn.Module) -> str | None:
    """Return why a 2-D weight is an untied head or a router; None where it is neither."""
    if site.attribute != "weight":
        return None
    find_head = getattr(model, "get_output_embeddings", None)
    if callable(find_head) and find_head() is site.module:
        return "head: get_output_embeddings()"
    *_, name = ["", *site.name.split(".")[:-1]]
    kind = type(site.module).__name__
    if "Router" in kind or name == "router":
        return f"router: {kind}"
    if name in _ROUTER_NAMES and hasattr(site.parent, "experts"):
        return f"router: {kind} beside experts"
    if isinstance(site.module, nn.Linear) and not site.in_stack:
        if name in _HEAD_NAMES:
            return f"head: named {name!r}"
        for module in model.modules():
            if isinstance(module, nn.Embedding) and tuple(module.weight.shape) == tuple(p.shape):
                return "head: shaped like the embedding"
    return None


def _refuse_shard(p: Tensor, site: Site) -> None:
    raise RuntimeError(
        f"param_groups: {site.name!r} of {type(site.module).__name__} has shape {tuple(p.shape)}. So it is a flattened or "
        "partitioned shard, and its fan_in is unknown. Call param_groups before the model is wrapped."
    )
