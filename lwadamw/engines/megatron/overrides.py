"""config_overrides: a width rule as overrides of Megatron's parameter groups, the same on every process."""

from __future__ import annotations

import importlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final, NamedTuple

from torch import Tensor, nn

from ...state import keys
from ...width.groups import Evidence, param_groups
from ...width.patterns import matcher
from ...width.rules import Rule, get_rule
from ...width.specs import RoleSpec
from .agreement import from_all
from .alive import ALIVE

_WRAPPERS: Final = (
    "DistributedDataParallel",
    "Float16Module",
    "FullyShardedDataParallel",
    "TorchFullyShardedDataParallel",
)
# One lr_mult per group. Megatron does not multiply with it, and finds the groups of a checkpoint by it.
_SPACING: Final = 2.0**-10


# What `config_overrides` has decided about the parameters of each model, for `attach`.
_KNOWN: Final[weakref.WeakKeyDictionary[nn.Module, dict[str, Evidence]]] = weakref.WeakKeyDictionary()


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

    This is collective: every process calls it before `get_megatron_optimizer`. Afterwards it is refused, because Megatron has
    made its groups, and DistributedOptimizer has cut the parameters.

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
        ValueError: there is an optimizer for the model already, the model scales with muP already, `rule` scales the depth,
            `standard` has an `lr_mult`, a role is not decided, or a width ratio is not determined. The error is the same on
            every process.
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
    evidence: dict[nn.Module, dict[str, Evidence]] = {}
    try:
        _refuse_built(model_chunks)
        _refuse_mup(model_chunks)
        _refuse_depth(get_rule(rule))
        _refuse_lr_mult(standard)
        settings = _settings(model_chunks, base_width, get_rule(rule), dict(roles or {}), width, standard, evidence)
    except (ValueError, RuntimeError) as found:
        error = str(found)
    everything = from_all((error, sorted(set(settings.values())), _used(roles or {}, model_chunks)))
    first = next((one for one, _, _ in everything if one), "")
    unused = [pattern for pattern in roles or {} if not any(pattern in used for _, _, used in everything)]
    if not first and unused:
        first = (
            f"config_overrides: roles pattern {unused[0]!r} matches no parameter on any process. Correct it, or leave it "
            "out."
        )
    if first:
        raise ValueError(first)
    _KNOWN.update(evidence)
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
    evidence: dict[nn.Module, dict[str, Evidence]],
) -> dict[int, _Settings]:
    """Return the group keys of each parameter of this process, by id() of the parameter. Add what was decided to `evidence`."""
    out = {}
    for chunk in chunks:
        model = unwrapped(chunk)
        names = {id(p): name for name, p in chunk.named_parameters()}
        known = {pattern: role for pattern, role in roles.items() if pattern in _used(roles, [chunk])}
        size = width if width is not None else getattr(getattr(model, "config", None), "hidden_size", None)
        groups = param_groups(model, base_width, rule, known, width=size if isinstance(base_width, int) else None)
        evidence[model] = groups.evidence
        for group in groups:
            own = {key: value for key, value in group.items() if key not in ("params", keys.SEGMENTS.name)}
            for _, p in group["params"]:
                merged = dict(own)
                for key, override in standard.items():
                    if key.matches(p, names[id(p)]):
                        merged |= override
                out[id(p)] = _Settings(tuple(sorted(merged.items())))
    return out


def known_evidence(model: nn.Module) -> dict[str, Evidence] | None:
    """Return what the last call of `config_overrides` has decided about the parameters of a model, by name; None: no call.

    Args:
        model: the model inside Megatron's wrappers.
    """
    return _KNOWN.get(model)


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


def _refuse_built(chunks: Iterable[nn.Module]) -> None:
    """Raise a ValueError if an optimizer has the parameters of a model, or copies or shards that Megatron has made of them."""
    held = [p for made in list(ALIVE) for group in made.param_groups for p in group["params"]]
    tensors, memory = set(map(id, held)), {p.untyped_storage().data_ptr() for p in held} - {0}
    for chunk in chunks:
        for name, p in unwrapped(chunk).named_parameters():
            copied = id(p) in tensors or id(getattr(p, "main_param", None)) in tensors
            if copied or p.untyped_storage().data_ptr() in memory:
                raise ValueError(
                    f"config_overrides: there is an optimizer for {name!r} {tuple(p.shape)} already, and Megatron has made its "
                    "groups. Call config_overrides before get_megatron_optimizer, and give it config_overrides=overrides."
                )


def _refuse_mup(chunks: Iterable[nn.Module]) -> None:
    for chunk in chunks:
        if getattr(getattr(unwrapped(chunk), "config", None), "use_mup", False):
            raise ValueError(
                "config_overrides: the model's config has use_mup=True, so Megatron would scale learning rates with the width "
                "too. Set use_mup=False, and choose rule='mup' here for the scaling of muP."
            )


def _refuse_depth(rule: Rule) -> None:
    if rule.depth is not None or rule.block_vector is not None:
        raise ValueError(
            f"config_overrides: the rule {rule.name!r} scales residual blocks, and a pipeline stage cannot count those of the "
            "whole model. Only the width is scaled here: give a rule of lwadamw.RULES."
        )


def _refuse_lr_mult(standard: Mapping[Any, Mapping[str, Any]]) -> None:
    for key, override in standard.items():
        if "lr_mult" in override:
            raise ValueError(
                f"config_overrides: the override {key} has lr_mult={override['lr_mult']}, and every group of a width rule "
                "needs an lr_mult of its own, by which Megatron finds it in a checkpoint. Give max_lr and min_lr instead: "
                "Megatron multiplies nothing with lr_mult."
            )
