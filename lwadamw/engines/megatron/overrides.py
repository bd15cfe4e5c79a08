"""config_overrides: a width rule as overrides of Megatron's parameter groups, the same on every process."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from ...state import keys
from ...width.groups import param_groups
from ...width.patterns import matcher
from ...width.rules import Rule, get_rule
from ...width.specs import RoleSpec

_WRAPPERS: Final = (
    "DistributedDataParallel",
    "Float16Module",
    "FullyShardedDataParallel",
    "TorchFullyShardedDataParallel",
)
# One lr_mult per group. Megatron does not multiply with it, and finds the groups of a checkpoint by it.
_SPACING: Final = 2.0**-10


class _Settings(NamedTuple):
    """The group keys of one parameter, as sorted pairs, without `lr_mult`."""

    items: tuple[tuple[str, Any], ...]


def config_overrides(
    config: Any,
    model_chunks: Sequence[nn.Module],
    base_width: int | Mapping[str, int],
    rule: str | Rule = "fan2025",
    roles: Mapping[str, RoleSpec] | None = None,
    *,
    width: int | None = None,
    standard: Mapping[Any, Mapping[str, Any]] | None = None,
) -> dict[Any, dict[str, Any]]:
    """Return overrides for `get_megatron_optimizer` that give every parameter its role and its width multipliers.

    Roles and width ratios are those of `lwadamw.param_groups`, from the shapes of whole parameters: a part of a
    tensor-parallel layer counts as the whole layer. Every group gets an `lr_mult` of its own, by which Megatron finds the
    groups of a checkpoint. Megatron multiplies nothing with it. The rule decides about the decay of every parameter:
    embeddings, biases, norms and heads have none, where Megatron by itself decays embeddings and heads.

    This is collective: every process calls it before `get_megatron_optimizer`.

    Args:
        config: the OptimizerConfig.
        model_chunks: the list of models that `get_megatron_optimizer` gets.
        base_width: the width of the proxy, an int or a mapping, as in `lwadamw.param_groups`.
        rule: as in `lwadamw.param_groups`.
        roles: as in `lwadamw.param_groups`. A pattern has to match a parameter on some process.
        width: the width of this model. None: its `hidden_size`.
        standard: overrides to merge. None: those of `get_standard_config_overrides(config)`.

    Returns:
        Overrides by ParamKey, with the group keys of `lwadamw.param_groups`.

    Raises:
        ValueError: the model scales with muP already, `standard` has an `lr_mult`, a role is not decided, or a width ratio is
            not determined. The error is the same on every process.
        TypeError: `model_chunks` is not a list of models.
    """
    optimizer = importlib.import_module("megatron.core.optimizer")
    keyed = importlib.import_module("megatron.core.optimizer.optimizer_config")
    if isinstance(model_chunks, nn.Module) or not all(isinstance(chunk, nn.Module) for chunk in model_chunks):
        raise TypeError(
            "config_overrides: model_chunks is not a list of models. Give what get_megatron_optimizer gets: [model]."
        )
    if standard is None:
        standard = optimizer.get_standard_config_overrides(config)
    error, settings = "", {}
    try:
        _refuse_mup(model_chunks)
        _refuse_lr_mult(standard)
        settings = _settings(model_chunks, base_width, get_rule(rule), dict(roles or {}), width, standard)
    except (ValueError, RuntimeError) as found:
        error = str(found)
    everything = _gathered((error, sorted(set(settings.values())), _used(roles or {}, model_chunks)))
    first = next((one for one, _, _ in everything if one), "")
    unused = [pattern for pattern in roles or {} if not any(pattern in used for _, _, used in everything)]
    if not first and unused:
        first = (
            f"config_overrides: roles pattern {unused[0]!r} matches no parameter on any process. Correct it, or leave it "
            "out."
        )
    if first:
        raise ValueError(first)
    union = sorted({one for _, some, _ in everything for one in some})
    overrides: dict[Any, dict[str, Any]] = {}
    for index, one in enumerate(union):
        mine = {place for place, own in settings.items() if own == one}

        def here(p: Tensor, name: str, mine: set[int] = mine) -> bool:
            return id(p) in mine

        predicate = keyed.ParamWithNamePredicate(name=f"lwadamw {index}", fn=here)
        key = keyed.ParamKey(with_name_predicate=predicate)
        overrides[key] = {**dict(one.items), "lr_mult": 1 + (index + 1) * _SPACING}
    return overrides


def _settings(
    chunks: Iterable[nn.Module],
    base_width: int | Mapping[str, int],
    rule: Rule,
    roles: dict[str, RoleSpec],
    width: int | None,
    standard: Mapping[Any, Mapping[str, Any]],
) -> dict[int, _Settings]:
    """Return the group keys of each parameter of this process, by id() of the parameter."""
    out = {}
    for chunk in chunks:
        model = unwrapped(chunk)
        names = {id(p): name for name, p in chunk.named_parameters()}
        known = {pattern: role for pattern, role in roles.items() if pattern in _used(roles, [chunk])}
        size = width if width is not None else getattr(getattr(model, "config", None), "hidden_size", None)
        for group in param_groups(model, base_width, rule, known, width=size if isinstance(base_width, int) else None):
            own = {key: value for key, value in group.items() if key not in ("params", keys.SEGMENTS.name)}
            for _, p in group["params"]:
                merged = dict(own)
                for key, override in standard.items():
                    if key.matches(p, names[id(p)]):
                        merged |= override
                out[id(p)] = _Settings(tuple(sorted(merged.items())))
    return out


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside Megatron's wrappers.

    Args:
        model: a model chunk.
    """
    while type(model).__name__ in _WRAPPERS and isinstance(getattr(model, "module", None), nn.Module):
        model = model.module  # type: ignore[assignment]
    return model


def _used(patterns: Iterable[str], chunks: Iterable[nn.Module]) -> list[str]:
    """Return the patterns that match a parameter of this process."""
    names = [name for chunk in chunks for name in _names(unwrapped(chunk))]
    return [pattern for pattern in patterns if any(map(matcher(pattern), names))]


def _names(model: nn.Module) -> Iterator[str]:
    return (name for name, _ in model.named_parameters(remove_duplicate=False))


def _refuse_mup(chunks: Iterable[nn.Module]) -> None:
    for chunk in chunks:
        if getattr(getattr(unwrapped(chunk), "config", None), "use_mup", False):
            raise ValueError(
                "config_overrides: the model's config has use_mup=True, so Megatron would scale learning rates with the width "
                "too. Set use_mup=False, and choose rule='mup' here for the scaling of muP."
            )


def _refuse_lr_mult(standard: Mapping[Any, Mapping[str, Any]]) -> None:
    for key, override in standard.items():
        if "lr_mult" in override:
            raise ValueError(
                f"config_overrides: the override {key} has lr_mult={override['lr_mult']}, and every group of a width rule "
                "needs an lr_mult of its own, by which Megatron finds it in a checkpoint. Give max_lr and min_lr instead: "
                "Megatron multiplies nothing with lr_mult."
            )


def _gathered(mine: Any) -> list[Any]:
    """Return the values of all processes."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return [mine]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, mine)
    return values
