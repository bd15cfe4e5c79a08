"""Sites: the places in a model at which each parameter sits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from torch import Tensor, nn

# Class of a module that only wraps another module, and the attribute that holds the wrapped module. Names of parameters
# leave this attribute out, so that they are the same with and without the wrapper.
_WRAPPERS: Final = {
    "OptimizedModule": "_orig_mod",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
}


@dataclass(frozen=True, slots=True)
class Site:
    """One place at which a parameter sits. A tied parameter has several sites.

    Attributes:
        name: full name of the parameter, without the attributes of wrappers.
        attribute: name of the parameter within its module.
        module: the module that holds the parameter.
        parent: the module that holds `module`; None where `module` is the model itself.
        in_stack: whether the module is inside numbered layers, for example of a ModuleList or a Sequential.
    """

    name: str
    attribute: str
    module: nn.Module
    parent: nn.Module | None
    in_stack: bool


def sites(model: nn.Module) -> Iterator[tuple[Tensor, list[Site]]]:
    """Yield every distinct parameter of a model, with all its sites in the order of the modules.

    Args:
        model: any module.
    """
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
