"""Parameter groups of a model under a rule: role, width ratio and width multipliers of every parameter, decided by name."""

from __future__ import annotations

import difflib
import gc
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Final, Literal

from torch import Tensor, nn

from ..state import keys
from ..state.callers import caller_level
from ..state.names import layer_type
from . import remedies
from .applied import Applied, check_depth, outside
from .arguments import check_values
from .blocks import depth_ratios
from .evidence import Decision
from .kinds import check_kinds
from .modules import Kind, Module
from .patterns import first_match, matcher, separating
from .ratios import Ratio, ratios
from .roles import Decided, decide
from .rules import Multipliers, Role, Rule, Scale, get_rule, with_modules, with_output
from .specs import RoleSpec, check_spec

# For each width multiplier, the key of the base value that it multiplies.
_BASE_KEYS: Final = {"lr": "lr", "wd": "weight_decay", "eps": "eps"}


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was decided about one parameter, and why. `summary` prints it.

    Attributes:
        role: its role.
        fan_in: number of inputs of each output, from the global shape; None for a vector.
        m: width ratio; None where the multipliers do not depend on it.
        why: the evidence for the role, and the base fan_in where it is not the base width.
        frozen: whether the parameter is in no group because it does not require a gradient.
        logits: what the rule assumes that the forward pass does to the logits that this parameter gives; "" where it gives none
            or the rule does not follow the width.
        branch: the factor by which the model has to multiply the output of the residual branch of this parameter, relative to
            the proxy; None outside of the blocks, and where the depth is not scaled.
    """

    role: Role
    fan_in: int | None
    m: float | None
    why: str
    frozen: bool = False
    logits: str = ""
    branch: float | None = None


class Groups(list[dict[str, Any]]):
    """A list of parameter groups that also holds the evidence for each parameter.

    Args:
        groups: the parameter groups.
        evidence: for the name of every parameter, what was decided about it.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], evidence: Mapping[str, Evidence]) -> None:
        super().__init__(groups)
        self.evidence = dict(evidence)

    def __add__(self, other: Iterable[dict[str, Any]]) -> Groups:  # type: ignore[override]
        """Return the groups of both, with the evidence of both.

        Args:
            other: groups that follow these.
        """
        return Groups([*self, *other], {**self.evidence, **getattr(other, "evidence", {})})


def param_groups(
    model: nn.Module,
    base_width: int | Mapping[str, int] | nn.Module,
    rule: str | Rule = "fan2025",
    roles: Mapping[str, RoleSpec] | None = None,
    strict: bool = True,
    *,
    width: int | None = None,
    base_depth: int | Mapping[str, int] | None = None,
    depth: int | None = None,
    output: Literal["output", "vector"] = "output",
    modules: Mapping[Kind, Module] | None = None,
    overrides: Mapping[str, Mapping[str, Any]] | None = None,
    segments: Mapping[str, int | Sequence[int]] | None = None,
    include_frozen: bool = False,
    fold: bool = False,
    lr: float | None = None,
    weight_decay: float | None = None,
    eps: float = 1e-8,
) -> Groups:
    """Make parameter groups for `AdamW` in which every parameter has its role and its width multipliers.

    Parameters with equal multipliers share a group, so there are few groups. Base values are not in the groups: give the
    optimizer the `lr` and the `weight_decay` that were tuned at the base width.

    Patterns are fnmatch globs on full parameter names, or regular expressions after "re:". If several patterns match, the
    first one counts.

    Args:
        model: the model, before any wrapper flattens its parameters. DTensors count with their global shape.
        base_width: the width of the proxy, in one of three forms.
            An int: every matrix has the width ratio m = width / base_width. Each fan_in has to be a multiple of the width.
            A mapping from patterns to the fan_in of a matrix at the proxy, for example `{"*.down.weight": 1024, "*": 256}`.
            A model: the proxy itself, for example built under torch.device("meta"). It may have fewer layers.
        rule: a name from `lwadamw.RULES` or `lwadamw.RECIPES`, or a `lwadamw.Rule`.
        roles: patterns to roles: "matrix", "vector", "output", `Matrix(fan_in=dim)` or `Output(fan_in=dim)`.
        strict: whether a parameter without a role, or a pattern that matches nothing, is an error. If False it is a warning,
            and a parameter without a role becomes a matrix whose fan_in is its last dimension.
        width: the width of this model, for an int `base_width`. None: the hidden size of the model's config, or else the
            width of its embedding.
        base_depth: the number of residual blocks of the proxy, for a rule with depth exponents. An int: the model has one list
            of numbered layers, and these are its blocks. A mapping from patterns to numbers: the parameters that are inside
            blocks, and the number of such blocks at the proxy. `summary` says what the model itself has to do.
        depth: the number of blocks of the whole model. None: counted. Needed where this process holds a part of the blocks.
        output: "vector" if the model divides its logits by m itself.
        modules: kinds of modules ("embedding", "head", "router", "norm", "bias", "expert") to a `Module` with factors, and
            exponents if they differ from those of the role. They are added to those of the rule.
        overrides: patterns to group keys that win over the rule, for example `{"*.A_log": {"lr": 1e-4}}`. A base value that is
            given here is the effective value: its width multiplier is 1.
        segments: patterns to the segments of a parameter, which have norms of their own. An int is a number of equal parts
            of the first dimension (experts). A sequence has the number of rows of each part (q, k, v of a fused projection).
        include_frozen: whether parameters that do not require a gradient are grouped too.
        fold: make groups for any other optimizer, with `lr`, `weight_decay` and, where the rule scales it, `eps` multiplied
            in. They keep the role and, in `param_names`, the names of their parameters. Only schedulers
            that multiply lr (LambdaLR, LinearLR) keep the width ratios of these groups.
        lr: base learning rate, for `fold` only.
        weight_decay: base weight decay, for `fold` only.
        eps: base epsilon, for `fold` only.

    Returns:
        New group dicts, in the order in which the model has their first parameters. The attribute `evidence` has an
        `Evidence` for the name of every parameter.

    Raises:
        ValueError: a role is not decided, a pattern matches nothing, or a width ratio or depth ratio is not determined.
        TypeError: `base_width` or `rule` has a wrong type.
        RuntimeError: parameters are flattened or partitioned shards.

    Examples:
        >>> model = nn.Sequential(nn.Embedding(100, 64), nn.Linear(64, 64, bias=False))
        >>> for group in param_groups(model, base_width=16):
        ...     print(group["role"], group["width_lr_mult"], group["width_wd_mult"])
        vector 1.0 0.0
        matrix 0.25 2.0
    """
    resolved = with_output(with_modules(get_rule(rule), modules), output)
    check_depth(resolved, base_depth, depth)
    roles, overrides, segments = dict(roles or {}), dict(overrides or {}), dict(segments or {})
    for spec in roles.values():
        check_spec(spec)
    if fold and (lr is None or weight_decay is None):
        raise ValueError(
            "param_groups: fold=True multiplies base values, so it needs lr and weight_decay. Give lr=... and weight_decay=...."
        )
    if not fold:
        check_values(lr, weight_decay, overrides)

    with _without_collection():
        found = decide(model, roles)
    _check_patterns({"roles": roles, "overrides": overrides, "segments": segments}, found, strict)
    check_kinds(modules or {}, found)
    left_out = {d.name for d in found if not (include_frozen or d.param.requires_grad)}
    found = _settle_undecided(found, left_out, strict)
    applied = Applied(resolved, outside if base_depth is None else depth_ratios(model, base_depth, depth, found))
    scaled = [d for d in found if d.name not in left_out and not _is_constant(applied.scale(d))]
    with _without_collection():
        ratio = ratios(model, base_width, width, found, scaled, roles)
        evidence = _evidence(found, left_out, {d.name for d in scaled}, ratio, applied)
    groups = _merged([d for d in found if d.name not in left_out], evidence, applied, overrides, segments)
    if fold:
        groups = [_folded(group, float(lr or 0.0), float(weight_decay or 0.0), eps) for group in groups]
    return Groups(groups, evidence)


@contextmanager
def _without_collection() -> Iterator[None]:
    """Pause Python's search for cycles. It would go through all modules of a large model again and again, and find none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _is_constant(scale: Scale) -> bool:
    return scale.lr == 0 and scale.wd in (0, None) and scale.eps == 0


def _check_patterns(given: Mapping[str, Mapping[str, Any]], found: Sequence[Decided], strict: bool) -> None:
    names = [name for d in found for name in d.names]
    unmatched = [
        (argument, pattern)
        for argument, patterns in given.items()
        for pattern in patterns
        if not any(map(matcher(pattern), names))
    ]
    if not unmatched:
        return
    # Where the glob of a layer type would match other parameters too, the hint is a pattern that does not.
    types = {kind: own for own, kind in separating({d.names: layer_type(d.name) for d in found}).items()}
    types |= {kind: kind for kind in map(layer_type, names) if kind not in types}
    taken = set(names)
    lines = []
    for argument, pattern in unmatched:
        close = difflib.get_close_matches(layer_type(pattern), types, n=1, cutoff=0.3)
        hint = (
            f"Closest: {_numbered(close[0], pattern, taken) or types[close[0]]!r}."
            if close
            else "Correct it or leave it out."
        )
        lines.append(f"{argument} pattern {pattern!r} matches no parameter. {hint}")
    if strict:
        raise ValueError("param_groups: " + "\n".join(lines))
    for line in lines:
        warnings.warn(f"param_groups: {line}", stacklevel=caller_level())


def _numbered(kind: str, pattern: str, names: set[str]) -> str | None:
    """Return the parameter of a layer type that has the layer numbers of a pattern; None where there is none."""
    numbers = [part for part in pattern.split(".") if part.isdigit()]
    if not numbers or len(numbers) != kind.count("*"):
        return None
    filled = iter(numbers)
    name = "".join(next(filled) if character == "*" else character for character in kind)
    return name if name in names else None


def _settle_undecided(found: Sequence[Decided], left_out: set[str], strict: bool) -> list[Decided]:
    """Return the parameters with a decision for each that is to be grouped."""
    undecided = [d for d in found if d.decision.role is None and d.name not in left_out]
    if not undecided:
        return list(found)
    if strict:
        raise ValueError(remedies.for_undecided(undecided, [d for d in found if d.name not in left_out]))
    listed = "".join(f"\n  {d}: {d.decision.why}" for d in undecided[:8])
    listed += f"\n  and {len(undecided) - 8} more" if len(undecided) > 8 else ""
    warnings.warn(
        f"param_groups: no role is decided, taken as matrices whose fan_in is the last dimension:{listed}",
        stacklevel=caller_level(),
    )
    guessed = {d.name: Decision("matrix", f"guessed: {d.decision.why}", d.evidence.dims or (-1,)) for d in undecided}
    return [replace(d, decision=guessed.get(d.name, d.decision)) for d in found]


def _evidence(
    found: Sequence[Decided], left_out: set[str], scaled: set[str], ratio: Ratio, applied: Applied
) -> dict[str, Evidence]:
    evidence = {}
    for d in found:
        m, remark = ratio(d) if d.name in scaled else (None, "")
        frozen, why = d.name in left_out, d.decision.why + remark + applied.remark(d)
        evidence[d.name] = Evidence(d.role, d.fan_in, m, why, frozen, _logits(d, applied), applied.branch(d))
    return evidence


def _logits(found: Decided, applied: Applied) -> str:
    """Return what a rule assumes of the logits that a parameter gives. In muP, either lr or logits of a head follow 1/m."""
    if not found.decision.gives_logits or _is_constant(applied.rule.matrix):
        return ""
    return "as they are" if applied.scale(found).lr else "divided by m"


def _merged(
    parameters: Sequence[Decided],
    evidence: dict[str, Evidence],
    applied: Applied,
    overrides: Mapping[str, Mapping[str, Any]],
    segments: Mapping[str, int | Sequence[int]],
) -> list[dict[str, Any]]:
    """Return groups of the parameters that have the same role, width multipliers and overrides."""
    groups: dict[tuple[Any, ...], dict[str, Any]] = {}
    for d in parameters:
        multipliers = applied.multipliers(d, evidence[d.name].m)
        pattern, own = first_match(overrides, d.names) or ("", {})
        if own:
            # The user's value is the effective value, so the rule has nothing to multiply.
            multipliers = multipliers._replace(**{of: 1.0 for of, key in _BASE_KEYS.items() if key in own})
            note = f"; overrides[{pattern!r}]: {', '.join(own)}"
            evidence[d.name] = replace(evidence[d.name], why=evidence[d.name].why + note)
        key = (d.role, multipliers, tuple(sorted(own.items(), key=lambda item: item[0])))
        group = groups.get(key)
        if group is None:
            group = groups[key] = {"params": [], keys.ROLE.name: d.role, keys.RULE.name: applied.rule.name}
            group |= dict(zip(keys.named(keys.WIDTH), multipliers, strict=True)) | dict(own)
        group["params"].append((d.name, d.param))
        parts = first_match(segments, d.names)
        if parts is not None:
            group.setdefault(keys.SEGMENTS.name, {})[d.name] = _rows(d.name, d.param, parts[1])
    if not groups:
        raise ValueError(
            "param_groups: the model has no parameter that requires a gradient. Give include_frozen=True to group frozen "
            "parameters."
        )
    return list(groups.values())


def _rows(name: str, p: Tensor, parts: int | Sequence[int]) -> tuple[int, ...]:
    """Return the number of rows of each segment of a parameter."""
    rows = p.shape[0] if p.ndim else 0
    if isinstance(parts, int):
        if parts < 1 or rows % parts:
            raise ValueError(
                f"param_groups: {name!r} {tuple(p.shape)} does not split into {parts} equal parts by rows. Give segments a "
                f"number that divides its {rows} rows, or the number of rows of each part."
            )
        return (rows // parts,) * parts
    if sum(parts) != rows or min(parts) < 1:
        raise ValueError(
            f"param_groups: segments {tuple(parts)} of {name!r} {tuple(p.shape)} do not add up to its {rows} rows. Give the "
            "number of rows of each part, all positive."
        )
    return tuple(parts)


def _folded(group: dict[str, Any], lr: float, weight_decay: float, eps: float) -> dict[str, Any]:
    """Return a group for any optimizer: base values times width multipliers, and of our group keys the role alone."""
    multipliers = Multipliers(*(key.of(group) for key in keys.WIDTH))
    # Optimizers outside of torch seldom know pairs. torch keeps names in this key.
    out: dict[str, Any] = {
        "params": [p for _, p in group["params"]],
        "param_names": [name for name, _ in group["params"]],
    }
    out |= {keys.ROLE.name: group[keys.ROLE.name], "lr": lr * multipliers.lr}
    out["weight_decay"] = weight_decay * multipliers.wd
    if multipliers.eps != 1:
        out["eps"] = eps * multipliers.eps
    taken = {"params", *keys.named((keys.ROLE, keys.RULE, keys.SEGMENTS, *keys.WIDTH))}
    return out | {k: v for k, v in group.items() if k not in taken}
