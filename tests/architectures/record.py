"""Records the tables of architectures from the real models: `python -m tests.architectures.record [NAME...]`."""

from __future__ import annotations

import importlib.metadata
import math
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .builders import ARCHITECTURES
from .sizes import table_widths
from .skeleton import torch_class
from .table import ROOT, TABLES, ModuleRow, ParameterRow, Table, render
from .truth import truth, unused

_CONFIG_HOLDERS = ("config", "cfg", "model_args", "args", "params", "hparams")
_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim", "width", "embed_dim", "model_dim", "inner_dim", "num_features")
_PARTS = ("text_config", "vision_config", "audio_config")
_EXPERTS = ("num_experts", "num_local_experts", "moe_num_experts")
_EVIDENCE = ("is_transposed", "input_size", "output_size", *_EXPERTS, "groups", "stride")
# Names under which packages are installed, where these are not the names that are imported.
_PACKAGES = {
    "fla": "flash-linear-attention",
    "megatron": "megatron-core",
    "open_clip": "open_clip_torch",
    "tests": "torch",
    "x_transformers": "x-transformers",
}
# Base classes of transformers' models that say nothing about an architecture.
_UNTOLD = ("PreTrainedModel", "GradientCheckpointingLayer", "ModelMixin", "GenericForSequenceClassification")


def record(name: str) -> Table:
    """Return the table of an architecture from its real model at two widths.

    Args:
        name: name of the architecture.
    """
    widths = table_widths(name)
    models = [ARCHITECTURES[name](width) for width in widths]
    first, second = ([*model.named_parameters(remove_duplicate=False)] for model in models)
    if [n for n, _ in first] != [n for n, _ in second]:
        raise RuntimeError(
            f"{name}: the parameters have different names at the widths {widths}. Build equal layers at both."
        )
    if devices := {p.device.type for _, p in first} - {"meta"}:
        raise RuntimeError(f"{name}: parameters are on {devices}. Build the model on the meta device.")
    configs: list[dict[str, dict[str, str]]] = []
    modules = [list(_modules(model, configs)) for model in models]
    rows, seen = [], {}
    for (path, low), (_, high) in zip(first, second, strict=True):
        tied = seen.setdefault(id(low), path)
        role, dims, parts = truth(name, tied, models[0])
        fan_in = None if dims is None else (_size(low, dims) // parts, _size(high, dims) // parts)
        exempt = getattr(low, "_no_weight_decay", False)
        shapes = (tuple(low.shape), tuple(high.shape))
        rows.append(
            ParameterRow(path, shapes, role, fan_in, None if tied == path else tied, exempt, not low.requires_grad)
        )
    if left := unused(name, [row.name for row in rows]):
        raise RuntimeError(f"{name}: the patterns {left} of truth.py match no parameter. Delete them.")
    labels = dict.fromkeys((*configs[0], *configs[1]))
    return Table(
        _source(models[0]),
        widths,
        {label: _merged(configs[0][label], configs[1][label]) for label in labels},
        _classes(models[0]),
        [ModuleRow(a.path, a.bases, _merged(a.attributes, b.attributes)) for a, b in zip(*modules, strict=True)],
        rows,
    )


def _modules(model: nn.Module, configs: list[dict[str, dict[str, str]]]) -> Iterator[ModuleRow]:
    """Yield the modules on the paths of parameters, and add the fields of their configs to a list."""
    labels: dict[int, str] = {}
    fields: dict[str, dict[str, str]] = {}
    configs.append(fields)
    paths = {id(module): path or ROOT for path, module in model.named_modules()}
    for path, module in model.named_modules(remove_duplicate=False):
        parent = model.get_submodule(path.rpartition(".")[0])
        of_parametrization = type(parent).__name__ == "ParametrizationList"
        if not of_parametrization and next(module.parameters(), None) is None:
            continue
        attributes = {
            key: _text(value)
            for key in (*_EVIDENCE, *(_WIDTHS if not path else ()))
            if isinstance(value := getattr(module, key, None), (bool, int, tuple)) and _text(value)
        }
        if isinstance(module, nn.modules.conv._ConvNd):
            attributes = {k: v for k, v in attributes.items() if k in ("groups", "stride")}
        for holder in _CONFIG_HOLDERS:
            if label := _label(getattr(module, holder, None), labels, fields):
                attributes[holder] = label
        head = getattr(module, "get_output_embeddings", None)
        if callable(head) and (target := head()) is not None:
            attributes["output_embeddings"] = paths[id(target)]
        listed = getattr(module, "no_weight_decay", None)
        if callable(listed):
            attributes["no_weight_decay"] = ",".join(sorted(listed()))
        yield ModuleRow(path or ROOT, tuple(base.__name__ for base in _bases(type(module))), attributes)


def _bases(cls: type) -> tuple[type, ...]:
    """Return a class and the modules it derives from, down to the first class of torch."""
    bases: list[type] = []
    for base in cls.__mro__:
        if base.__module__.startswith("torch.nn") and _is_public(base):
            return (*bases, base)
        told = not any(base.__name__.endswith(untold) for untold in _UNTOLD)
        if not bases or (issubclass(base, nn.Module) and told):
            bases.append(base)
    raise RuntimeError(f"{cls} derives from no module of torch")


def _classes(model: nn.Module) -> dict[str, str]:
    """Return the module path of every class of a model, and of those it derives from, that is not of torch."""
    paths: dict[str, str] = {}
    for module in model.modules():
        if next(module.parameters(), None) is None:
            continue
        for base in _bases(type(module))[:-1]:
            if paths.setdefault(base.__name__, base.__module__) != base.__module__:
                raise RuntimeError(
                    f"two classes are named {base.__name__}: of {paths[base.__name__]}, {base.__module__}"
                )
    return dict(sorted(paths.items()))


def _is_public(cls: type) -> bool:
    try:
        return torch_class(cls.__name__) is cls
    except StopIteration:
        return False


def _label(config: Any, labels: dict[int, str], fields: dict[str, dict[str, str]]) -> str | None:
    """Return the label of a config whose fields are recorded; None for anything that is no config."""
    if (
        config is None
        or isinstance(config, (nn.Module, str, int, float, tuple, list, torch.Tensor))
        or callable(config)
    ):
        return None
    if id(config) in labels:
        return labels[id(config)]
    get = config.get if isinstance(config, Mapping) else lambda key, missing=None: getattr(config, key, missing)
    found = {k: str(v) for k in _WIDTHS if isinstance(v := get(k, None), int) and not isinstance(v, bool)}
    if not found and not any(get(part, None) is not None for part in _PARTS):
        return None
    labels[id(config)] = label = f"c{len(labels)}"
    fields[label] = found
    for part in _PARTS:
        if inner := _label(get(part, None), labels, fields):
            found[part] = inner
    return label


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _size(p: torch.Tensor, dims: tuple[int, ...]) -> int:
    return math.prod(p.shape[dim] for dim in dims)


def _merged(first: dict[str, str], second: dict[str, str]) -> dict[str, str]:
    return {key: value if value == second[key] else f"{value}|{second[key]}" for key, value in first.items()}


def _source(model: nn.Module) -> str:
    package = type(model).__module__.split(".")[0]
    package = _PACKAGES.get(package, package)
    version = importlib.metadata.version(package).partition("+")[0]
    return f"{package} {version} {type(model).__name__}"


if __name__ == "__main__":
    TABLES.mkdir(exist_ok=True)
    for name in sys.argv[1:] or ARCHITECTURES:
        (TABLES / f"{name}.txt").write_text(render(record(name)))
