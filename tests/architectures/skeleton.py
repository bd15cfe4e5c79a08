"""Skeletons: modules with the class names, attributes, parameter names and shapes of a real model, and without its package."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from .table import ROOT, ModuleRow, Table, at

_PLACES = (
    nn,
    torch.nn.modules.linear,
    torch.nn.utils.parametrize,
    torch.nn.utils.parametrizations,
)


def build(table: Table, which: int) -> nn.Module:
    """Return the skeleton of an architecture on the meta device.

    Args:
        table: the recorded table.
        which: 0 for the first of its two widths, 1 for the second.
    """
    configs = _configs(table, which)
    modules: dict[str, nn.Module] = {}
    for row in table.modules:
        modules[row.path] = module = _module(row, which, configs, table.classes)
        if row.path != ROOT:
            parent, _, name = row.path.rpartition(".")
            modules[parent or ROOT].add_module(name, module)
    made: dict[str, nn.Parameter] = {}
    for p in table.parameters:
        path, _, name = p.name.rpartition(".")
        if p.tied is None:
            made[p.name] = nn.Parameter(torch.empty(p.shapes[which], device="meta"), requires_grad=not p.frozen)
            if p.exempt:
                made[p.name]._no_weight_decay = True  # type: ignore[attr-defined]
        modules[path or ROOT].register_parameter(name, made[p.tied or p.name])
    for module in modules.values():
        _set_sizes(module)
    for row in table.modules:
        if "output_embeddings" in row.attributes:
            modules[row.path].output_embeddings = (modules[row.attributes["output_embeddings"]],)
    return modules[ROOT]


@functools.cache
def torch_class(name: str) -> type[nn.Module]:
    """Return the module class of torch that has a name."""
    return next(getattr(place, name) for place in _PLACES if hasattr(place, name))


@functools.cache
def _class(bases: tuple[str, ...], paths: tuple[str, ...], with_head: bool, exempt: str | None) -> type[nn.Module]:
    cls = torch_class(bases[-1])
    for name, path in reversed([*zip(bases[:-1], paths, strict=True)]):
        cls = type(name, (cls,), {"__module__": path})
    methods: dict[str, Any] = {"__module__": cls.__module__}
    if with_head:
        methods["get_output_embeddings"] = lambda self: self.output_embeddings[0]
    if exempt is not None:
        methods["no_weight_decay"] = lambda self: set(exempt.split(","))
    return type(bases[0], (cls,), methods) if len(methods) > 1 else cls


def _module(row: ModuleRow, which: int, configs: dict[str, Any], paths: dict[str, str]) -> nn.Module:
    attributes = dict(row.attributes)
    with_head, exempt = "output_embeddings" in attributes, attributes.get("no_weight_decay")
    cls = _class(row.bases, tuple(paths[name] for name in row.bases[:-1]), with_head, exempt)
    for name in ("output_embeddings", "no_weight_decay"):
        attributes.pop(name, None)
    module = cls.__new__(cls)
    nn.Module.__init__(module)
    for name, text in attributes.items():
        value = at(text, which)
        module.__dict__[name] = configs[value] if value in configs else _value(value)
    return module


def _configs(table: Table, which: int) -> dict[str, Any]:
    configs: dict[str, Any] = {label: SimpleNamespace() for label in table.configs}
    for label, fields in table.configs.items():
        for name, text in fields.items():
            value = at(text, which)
            setattr(configs[label], name, configs[value] if value in configs else _value(value))
    return configs


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    parts = text.split(",")
    if all(part.isdigit() for part in parts):
        return tuple(map(int, parts)) if len(parts) > 1 else int(text)
    return text


def _set_sizes(module: nn.Module) -> None:
    """Set the sizes that torch's own modules keep beside their weight."""
    weight = getattr(module, "weight", None)
    if "parametrizations" in module._modules:
        weight = module.get_parameter("parametrizations.weight.original1")
    if weight is None:
        return
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, nn.modules.conv._ConvNd):
        transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
        module.transposed, module.kernel_size = transposed, tuple(weight.shape[2:])
        module.in_channels = weight.shape[0] if transposed else weight.shape[1] * module.groups
        module.out_channels = weight.shape[1] * module.groups if transposed else weight.shape[0]
    elif isinstance(module, nn.LayerNorm):
        module.normalized_shape = tuple(weight.shape)
