"""Sites: the places in a model at which each parameter sits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Final

from torch import Tensor, nn

# Class of a module that only wraps another module, and the attribute that holds the wrapped module. Names of parameters
# leave this attribute out, so that they are the same with and without the wrapper.
_WRAPPERS: Final = {
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "OffloadWrapper": "_checkpoint_wrapped_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}
# Attributes of modules whose child stands for the module that holds them.
_SUBSTITUTES: Final = frozenset({"modules_to_save", "parametrizations", "original_module", "base_layer"})


@dataclass(frozen=True, slots=True)
class Site:
    """One place at which a parameter sits. A tied parameter has several sites.

    Attributes:
        attribute: name of the parameter within its module.
        path: names of the modules from the model, which has no name itself, to the module that holds the parameter. They
            leave out the attributes of wrappers.
        trail: the modules from the model to the module that holds the parameter, one more than `path`.
    """

    attribute: str
    path: tuple[str, ...]
    trail: tuple[nn.Module, ...]

    @property
    def name(self) -> str:
        """Full name of the parameter, without the attributes of wrappers."""
        return ".".join((*self.path, self.attribute))

    @property
    def module(self) -> nn.Module:
        """The module that holds the parameter."""
        return self.trail[-1]


def class_name(module: nn.Module) -> str:
    """Return the name of a module's class, as it would be if torch had not put a class of its own in its place.

    `fully_shard` replaces the class `Linear` by a subclass `FSDPLinear` of a class of torch.distributed and of `Linear`. So
    do both forms of `replicate`.

    Args:
        module: any module.
    """
    cls = type(module)
    while len(cls.__bases__) == 2:
        added, former = cls.__bases__
        name = cls.__name__
        if not added.__module__.startswith("torch.distributed.") or not name.endswith(former.__name__):
            break
        cls = former
    return cls.__name__


def _wrapped_attribute(module: nn.Module) -> str:
    """Return the attribute in which a wrapper holds its module; "" for any other module."""
    return _WRAPPERS.get(class_name(module), "")


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model that a wrapper such as DistributedDataParallel holds; a model without a wrapper itself.

    Args:
        model: any module.
    """
    while (inner := model._modules.get(_wrapped_attribute(model))) is not None:
        model = inner
    return model


def children(module: nn.Module) -> dict[str, nn.Module]:
    """Return the modules that a module holds, by name, without their wrappers.

    Args:
        module: a module that is no wrapper.
    """
    return {name: unwrapped(child) for name, child in module._modules.items() if child is not None}


def paths(module: nn.Module, remove_duplicate: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield what `named_modules` yields, without the wrappers and their attributes.

    Args:
        module: any module. If it is a wrapper, the first module is the one that it holds.
        remove_duplicate: yield a module that stands in several places only once.
    """
    seen: set[int] = set()
    stack = [("", unwrapped(module))]
    while stack:
        path, inner = stack.pop()
        if remove_duplicate and id(inner) in seen:
            continue
        seen.add(id(inner))
        yield path, inner
        stack += [(f"{path}.{name}" if path else name, child) for name, child in reversed(children(inner).items())]


def sites(model: nn.Module) -> Iterator[tuple[Tensor, list[Site]]]:
    """Yield every distinct parameter of a model, with all its sites in the order of the modules.

    Args:
        model: any module.
    """
    places: dict[int, tuple[Tensor, list[Site]]] = {}
    for site, p in _walk(model):
        places.setdefault(id(p), (p, []))[1].append(site)
    yield from places.values()


def _walk(model: nn.Module) -> Iterator[tuple[Site, Tensor]]:
    stack: list[tuple[tuple[str, ...], tuple[nn.Module, ...]]] = [((), (model,))]
    while stack:
        path, trail = stack.pop()
        module = trail[-1]
        for attribute, p in module._parameters.items():
            if p is not None:
                yield Site(attribute, path, trail), p
        wrapped = _wrapped_attribute(module)
        for name, child in reversed(module._modules.items()):
            if child is not None:
                inside = (path, (*trail[:-1], child)) if name == wrapped else ((*path, name), (*trail, child))
                stack.append(inside)


def plain(site: Site) -> Site:
    """Return a site as it would be without PEFT and without parametrizations.

    A module in PEFT's `modules_to_save`, and the layer that a LoRA layer wraps, take the place of the wrapper. The tensors
    that weight norm, spectral norm and other parametrizations keep of a weight sit where the weight would be. The magnitude
    of weight norm gets the name `weight_g`, as torch's older form of weight norm calls it.

    Args:
        site: where a parameter sits.
    """
    attribute = "weight" if site.attribute in ("weight_v", "weight_orig") else site.attribute
    if _SUBSTITUTES.isdisjoint(site.path):
        return site if attribute == site.attribute else replace(site, attribute=attribute)
    path: list[str] = []
    trail = [site.trail[0]]
    steps = iter(zip(site.path, site.trail[1:], strict=True))
    for name, module in steps:
        inner = next(steps, None) if name in ("modules_to_save", "parametrizations") else None
        if inner is not None and name == "parametrizations":
            magnitude = attribute == "original0" and type(inner[1]._modules.get("0")).__name__ == "_WeightNorm"
            attribute = f"{inner[0]}_g" if magnitude else inner[0]
        elif inner is not None or name in ("original_module", "base_layer"):
            trail[-1] = inner[1] if inner else module
        else:
            path.append(name)
            trail.append(module)
    return Site(attribute, tuple(path), tuple(trail))
