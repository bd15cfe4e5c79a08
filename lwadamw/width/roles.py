"""Roles: what each parameter of a model is to a width rule, and the evidence for it.

The evidence, in order: the user's patterns, registered modules, heads and routers, well-known module types, at most
one dimension. A parameter none of it decides is an error that names it and the remedy, because with weight decay 0
for vectors a wrong guess would silently cost a matrix its decay. A role never depends on the width the model has.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

from .rules import ROLES, Role


@dataclass(frozen=True, slots=True)
class Matrix:
    """Role `matrix` whose fan_in is the size of dimension `fan_in` of the tensor, e.g. -1 for (experts, out, in)."""

    fan_in: int = -1


@dataclass(frozen=True, slots=True)
class Output:
    """Role `output` (untied head, router) whose fan_in is the size of dimension `fan_in` of the tensor."""

    fan_in: int = -1


RoleSpec = Role | Matrix | Output


@dataclass(frozen=True, slots=True)
class Decision:
    """Role of one parameter; `fan_in` is None for vectors, `role` None where nothing decided it."""

    role: Role | None
    fan_in: int | None
    why: str


@dataclass(frozen=True, slots=True)
class Site:
    """Where a parameter sits: its clean name, the module that holds it, and that module's parent."""

    name: str
    attribute: str  # name within the module
    module: nn.Module
    parent: nn.Module | None
    in_stack: bool  # inside a ModuleList, Sequential or dict of numbered layers


# Modules that only wrap another one, and the attribute they hold it under, which then is no part of a name.
_WRAPPERS: Final = {"OptimizedModule": "_orig_mod", "FullyShardedDataParallel": "_fsdp_wrapped_module"} | {
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}
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
_MOST_INPUT_CHANNELS: Final = 4

_REGISTERED: dict[type[nn.Module], dict[str, RoleSpec]] = {}


def register_role(module: type[nn.Module], roles: Mapping[str, RoleSpec]) -> None:
    """Decide the parameters of a module class of your own, by their names within it.

    >>> import torch
    >>> class Experts(torch.nn.Module): ...
    >>> register_role(Experts, {"w1": Matrix(fan_in=-1), "w2": Matrix(fan_in=-1)})

    Raises:
        TypeError, ValueError: not a module class, or not a role.
    """
    if not (isinstance(module, type) and issubclass(module, nn.Module)):
        raise TypeError(f"register_role: {module!r} is not a subclass of torch.nn.Module.")
    for spec in roles.values():
        check_spec(spec)
    _REGISTERED[module] = dict(roles)


def check_spec(spec: object) -> None:
    if not isinstance(spec, (Matrix, Output)) and spec not in ROLES:
        raise ValueError(
            f"{spec!r} is not a role. Roles are {', '.join(ROLES)}, Matrix(fan_in=dim), Output(fan_in=dim)."
        )


def sites(model: nn.Module) -> Iterator[tuple[Tensor, list[Site]]]:
    """Every distinct parameter with all places it sits at, more than one where it is tied."""
    places: dict[int, tuple[Tensor, list[Site]]] = {}
    for site, p in _walk(model, [], None, False):
        places.setdefault(id(p), (p, []))[1].append(site)
    yield from places.values()


def _walk(
    module: nn.Module, path: list[str], parent: nn.Module | None, in_stack: bool
) -> Iterator[tuple[Site, Tensor]]:
    for attribute, p in module._parameters.items():
        if p is not None:
            yield Site(".".join([*path, attribute]), attribute, module, parent, in_stack), p
    wrapped = _WRAPPERS.get(type(module).__name__)
    for name, child in module._modules.items():
        if child is None:
            continue
        if name == wrapped:
            yield from _walk(child, path, parent, in_stack)
        else:
            yield from _walk(child, [*path, name], module, in_stack or name.isdigit())


def matches(pattern: str, name: str) -> bool:
    """fnmatch, or a regular expression searched for after `re:`."""
    return bool(re.search(pattern[3:], name)) if pattern.startswith("re:") else fnmatch.fnmatchcase(name, pattern)


def decide(p: Tensor, places: list[Site], model: nn.Module, roles: Mapping[str, RoleSpec]) -> Decision:
    """The role of a parameter; of a tied one that of its embedding, if it is one."""
    for pattern, spec in roles.items():
        if any(matches(pattern, site.name) for site in places):
            return _apply(spec, p, f"roles[{pattern!r}]", places[0].name)
    decisions = [_from_evidence(p, site, model) for site in places]
    decided = [d for d in decisions if d.role is not None]
    # An embedding tied to a head is looked up in like an embedding, whatever else is done with it.
    best = next((d for d in decided if d.role == "vector"), decided[0] if decided else decisions[0])
    if len(places) > 1:
        others = [site.name for site, d in zip(places, decisions, strict=True) if d is not best]
        return Decision(best.role, best.fan_in, f"{best.why}; tied with {', '.join(others)}")
    return best


def _apply(spec: RoleSpec, p: Tensor, why: str, name: str) -> Decision:
    if spec == "vector":
        return Decision("vector", None, why)
    if isinstance(spec, str):
        if p.ndim != 2:
            raise ValueError(
                f"param_groups: {why} calls {name!r} {tuple(p.shape)} {spec!r}, but which dimension is its fan_in? "
                f"Use lwadamw.{spec.capitalize()}(fan_in=-1) if its inputs come last, or another dimension."
            )
        spec = Matrix() if spec == "matrix" else Output()
    if not -p.ndim <= spec.fan_in < p.ndim:
        raise ValueError(
            f"param_groups: {why} gives dimension {spec.fan_in} of {name!r}, which has shape {tuple(p.shape)}."
        )
    return Decision("matrix" if isinstance(spec, Matrix) else "output", p.shape[spec.fan_in], why)


def _from_evidence(p: Tensor, site: Site, model: nn.Module) -> Decision:
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
    module, attribute = site.module, site.attribute
    if isinstance(module, nn.Linear) and attribute == "weight":
        return Decision("matrix", p.shape[-1], kind)
    if kind == "Conv1D" and attribute == "weight" and p.ndim == 2:  # transformers' GPT-2: (in, out)
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
    """Why a 2-D weight is an untied head or a router, or None."""
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
        f"param_groups: {site.name!r} of {type(site.module).__name__} has shape {tuple(p.shape)}, so it is a flattened or "
        "partitioned shard and its width is unknown. Call param_groups before the model is wrapped."
    )
