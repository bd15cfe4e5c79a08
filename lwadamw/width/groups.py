"""Parameter groups of a model under a width rule: roles, width ratios and multipliers, decided once and by name."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from ..state import keys
from ..state.names import layer_type
from .ratios import ratios
from .roles import Decision, RoleSpec, check_spec, decide, matches, sites
from .rules import Multipliers, Role, Rule, Scale, get_rule, with_output


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was decided about one parameter, and why."""

    role: Role
    fan_in: int | None  # None for vectors
    m: float | None  # width ratio; None where the rule does not use it
    why: str
    frozen: bool = False


class Groups(list[dict[str, Any]]):
    """A list of group dicts that remembers the evidence for each parameter by name."""

    def __init__(self, groups: Iterable[dict[str, Any]], evidence: Mapping[str, Evidence]) -> None:
        super().__init__(groups)
        self.evidence = dict(evidence)


def param_groups(
    model: nn.Module,
    base_width: int | Mapping[str, int] | nn.Module,
    rule: str | Rule = "fan2025",
    roles: Mapping[str, RoleSpec] | None = None,
    strict: bool = True,
    *,
    width: int | None = None,
    output: Literal["output", "vector"] = "output",
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    segments: Mapping[str, int | Sequence[int]] | None = None,
    include_frozen: bool = False,
    fold: bool = False,
    lr: float | None = None,
    weight_decay: float | None = None,
    eps: float = 1e-8,
) -> Groups:
    """Parameter groups for `AdamW` in which every parameter has its role and width multipliers.

    Groups hold (name, parameter) pairs and are merged by equal multipliers, so there are few. Base values stay out of
    them: pass `lr` and `weight_decay` as tuned at the base width to the optimizer. Patterns are fnmatch globs on
    parameter names, or regular expressions after "re:"; the first match wins.

    Args:
        model: before any wrapping that flattens parameters. DTensors count with their global shape.
        base_width: the proxy's width in one of three forms.
            int: every matrix has the ratio m = width / base_width; each fan_in has to be a whole multiple of the width.
            mapping of patterns to the fan_in a matrix has at the proxy: {"*.down.weight": 1024, "*": 256}.
            model: the proxy itself, e.g. built under torch.device("meta"); its depth may differ.
        rule: a name from `lwadamw.RULES` or a `lwadamw.Rule`.
        roles: patterns to "matrix", "vector", "output", `Matrix(fan_in=dim)` or `Output(fan_in=dim)`.
        strict: an undecided parameter or a pattern without a match is an error. Otherwise a warning, and an undecided
            parameter is a matrix whose fan_in is its last dimension.
        width: this model's width for an int base_width; by default its config's hidden size, or the embedding's.
        output: "vector" for models that divide their logits by m themselves.
        overrides: patterns to group keys that win over everything, e.g. {"*.A_log": {"lr": 1e-4}}.
        segments: patterns to the rows of the first dimension that count as one matrix each in the norms: a number of
            equal parts (experts), or the sizes of unequal ones (q, k, v of a fused projection).
        include_frozen: also group parameters that do not require a gradient.
        fold: give ordinary groups for any other optimizer, with `lr` and `weight_decay` (and `eps` where the rule
            scales it) multiplied in. Only schedulers that multiply (LambdaLR, LinearLR) keep their ratios.
        lr, weight_decay, eps: base values, for `fold` only.

    Returns:
        Fresh group dicts in the model's order of first appearance; with `evidence` for `summary`.

    Raises:
        ValueError: undecided role, unmatched pattern, or a width ratio that is not determined.
        RuntimeError: parameters are flattened or partitioned shards.
    """
    resolved = with_output(get_rule(rule), output)
    roles, overrides, segments = dict(roles or {}), dict(overrides or {}), dict(segments or {})
    for spec in roles.values():
        check_spec(spec)
    if fold and (lr is None or weight_decay is None):
        raise ValueError("param_groups: fold=True multiplies base values, so it needs lr=... and weight_decay=...")

    found = list(sites(model))
    decisions = {places[0].name: decide(p, places, model, roles) for p, places in found}
    aliases = {places[0].name: [site.name for site in places] for _, places in found}
    frozen = {places[0].name for p, places in found if not p.requires_grad}
    skipped = set() if include_frozen else frozen
    _check_patterns(("roles", "overrides", "segments"), (roles, overrides, segments), aliases, strict)
    decisions = _settle_undecided(found, decisions, skipped, strict)
    ratio = ratios(model, base_width, width, aliases, roles)

    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    evidence: dict[str, Evidence] = {}
    for p, places in found:
        name = places[0].name
        decision = decisions[name]
        role = decision.role or "matrix"
        if name in skipped:
            evidence[name] = Evidence(role, decision.fan_in, None, decision.why, frozen=True)
            continue
        scale = resolved[role]
        m, note = (None, "") if _is_constant(scale) else ratio(name, p, decision)
        multipliers = scale.at(1.0 if m is None else m)
        own = next((o for pattern, o in overrides.items() if any(matches(pattern, a) for a in aliases[name])), {})
        evidence[name] = Evidence(role, decision.fan_in, m, decision.why + note)
        key = (role, multipliers, tuple(sorted(own.items(), key=lambda item: item[0])))
        group = groups.get(key)
        if group is None:
            group = groups[key] = {"params": [], keys.ROLE.name: role, keys.RULE.name: resolved.name}
            group |= dict(zip(keys.named(keys.WIDTH), multipliers, strict=True)) | dict(own)
        group["params"].append((name, p))
        parts = next((s for pattern, s in segments.items() if any(matches(pattern, a) for a in aliases[name])), None)
        if parts is not None:
            group.setdefault(keys.SEGMENTS.name, {})[name] = _rows(name, p, parts)
    if not groups:
        raise ValueError("param_groups: the model has no parameter that requires a gradient.")
    if fold:
        return Groups(
            [_folded(g, float(lr or 0.0), float(weight_decay or 0.0), eps) for g in groups.values()], evidence
        )
    return Groups(groups.values(), evidence)


def _is_constant(scale: Scale) -> bool:
    return scale.lr == 0 and scale.wd in (0, None) and scale.eps == 0


def _check_patterns(
    kinds: Sequence[str], given: Sequence[Mapping[str, Any]], aliases: Mapping[str, Sequence[str]], strict: bool
) -> None:
    names = [alias for group in aliases.values() for alias in group]
    for kind, patterns in zip(kinds, given, strict=True):
        for pattern in patterns:
            if any(matches(pattern, name) for name in names):
                continue
            close = difflib.get_close_matches(pattern, {layer_type(name) for name in names}, n=1, cutoff=0.3)
            hint = f" Closest: {close[0]!r}." if close else ""
            message = f"param_groups: {kind} pattern {pattern!r} matches no parameter.{hint}"
            if strict:
                raise ValueError(message)
            warnings.warn(message, stacklevel=4)


def _settle_undecided(
    found: Sequence[tuple[Tensor, Sequence[Any]]], decisions: dict[str, Decision], skipped: set[str], strict: bool
) -> dict[str, Decision]:
    shapes = {places[0].name: tuple(p.shape) for p, places in found}
    undecided = [name for name, d in decisions.items() if d.role is None and name not in skipped]
    if not undecided:
        return decisions
    listed = "".join(f"\n  {name!r} {shapes[name]}: {decisions[name].why}" for name in undecided[:8])
    more = f"\n  and {len(undecided) - 8} more" if len(undecided) > 8 else ""
    glob = layer_type(undecided[0])
    if strict:
        raise ValueError(
            f"param_groups: cannot decide a role for{listed}{more}\n"
            f'Decide it: roles={{"{glob}": "vector"}} for constant lr and no decay, "matrix" for the width rule with fan_in '
            "the last dimension, or lwadamw.Matrix(fan_in=dim); or lwadamw.register_role for the module class."
        )
    warnings.warn(f"param_groups: taken as matrices with fan_in their last dimension:{listed}{more}", stacklevel=3)
    guessed = {name: Decision("matrix", shapes[name][-1], f"guessed: {decisions[name].why}") for name in undecided}
    return decisions | guessed


def _rows(name: str, p: Tensor, parts: int | Sequence[int]) -> tuple[int, ...]:
    rows = p.shape[0] if p.ndim else 0
    if isinstance(parts, int):
        if parts < 1 or rows % parts:
            raise ValueError(
                f"param_groups: {name!r} {tuple(p.shape)} does not split into {parts} equal parts by rows."
            )
        return (rows // parts,) * parts
    if sum(parts) != rows or min(parts) < 1:
        raise ValueError(
            f"param_groups: segments {tuple(parts)} of {name!r} {tuple(p.shape)} do not add up to its {rows} rows."
        )
    return tuple(parts)


def _folded(group: dict[str, Any], lr: float, weight_decay: float, eps: float) -> dict[str, Any]:
    multipliers = Multipliers(*(key.of(group) for key in keys.WIDTH))
    out = {"params": [p for _, p in group["params"]], "lr": lr * multipliers.lr}
    out["weight_decay"] = weight_decay * multipliers.wd
    if multipliers.eps != 1:
        out["eps"] = eps * multipliers.eps
    taken = {"params", *keys.named((keys.ROLE, keys.RULE, keys.SEGMENTS, *keys.WIDTH))}
    return out | {k: v for k, v in group.items() if k not in taken}
