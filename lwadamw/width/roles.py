"""Roles: what each parameter of a model is to a width rule, and the evidence for it.

These are asked in this order, and the first answer counts:

1. a pattern of the user,
2. a module class that the user has registered, then one that this package knows (`known.py`),
3. the shape and the name: at most one dimension, or a name such as `bias` or `pos_embed`, is a vector,
4. an embedding or a norm, and whatever the model itself takes out of the weight decay,
5. a router or a head (`heads.py`),
6. a projection of the input (`inputs.py`),
7. another well-known module class, such as a linear layer.

If none has an answer, `param_groups` raises an error that names the parameter and the remedy. It does not guess, because
vectors have no weight decay: a matrix that is taken for a vector would silently lose its decay. A role never depends on the
width of the model.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from .evidence import Decision, fan_in_of, from_evidence, transposes
from .patterns import ALL, first_match
from .registry import Registry
from .rules import Role
from .sites import Site, paths, sites, unwrapped
from .specs import Matrix, RoleSpec


@dataclass(frozen=True)
class Decided:
    """One distinct parameter of a model, and what was decided about its role.

    Attributes:
        param: the parameter.
        names: its name, then its aliases where it is tied.
        site: the site of its name.
        decision: its role and the evidence.
        evidence: what was decided without the patterns of the user.
        pattern: the pattern of the user that decided its role; None where there is none.
    """

    param: Tensor
    names: tuple[str, ...]
    site: Site
    decision: Decision
    evidence: Decision
    pattern: str | None

    @property
    def name(self) -> str:
        """The name that groups and norms use."""
        return self.names[0]

    @property
    def role(self) -> Role:
        """The role; `matrix` where nothing decided it, so that nothing loses its decay."""
        return self.decision.role or "matrix"

    @cached_property
    def fan_in(self) -> int | None:
        """Number of inputs of each output, from the global shape; None for a vector and where nothing decided the role."""
        known = self.decision.role in ("matrix", "output") and self.decision.dims
        return fan_in_of(self.param, self.site, self.decision) if known else None

    @property
    def inputs(self) -> int:
        """fan_in of any role. Rules may scale vectors too, and for a vector it is the last dimension, 1 for a single number."""
        return self.fan_in or (self.param.shape[-1] if self.param.ndim else 1)

    def __str__(self) -> str:
        return f"{self.name!r} {tuple(self.param.shape)}"


def decide(model: nn.Module, roles: Mapping[str, RoleSpec]) -> list[Decided]:
    """Decide the role of every distinct parameter of a model.

    A tied parameter is a vector if one of its sites is an embedding. Its rows are looked up there, whatever else uses it.

    Args:
        model: the model.
        roles: patterns of the user and the role that each gives; the first pattern that matches one of the names counts.

    Returns:
        The parameters in the order of the modules. The role is None where nothing decided it.

    Raises:
        ValueError: a role of the user does not say which dimension is the fan_in, or names a dimension that is none. Or a
            pattern gives one role to parameters whose evidence differs.
        TypeError: the model is no module.
        RuntimeError: a parameter is a flattened or partitioned shard.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"param_groups: the model is {type(model).__name__}. Give the torch.nn.Module itself.")
    registry, exempt, output_modules = Registry(), _exempt(unwrapped(model)), _output_modules(model)
    known = []
    for p, places in sites(model):
        names = tuple(site.name for site in places)
        evidence = _agreed([_at(p, site, registry, exempt, output_modules) for site in places], names)
        pattern, _ = first_match(roles, names) or (None, None)
        known.append(Decided(p, names, places[0], evidence, evidence, pattern))
    _check_patterns(known, roles)
    return [d if d.pattern is None else _decided_by_user(d, roles[d.pattern]) for d in known]


def _decided_by_user(known: Decided, spec: RoleSpec) -> Decided:
    evidence = known.evidence
    decision = _given(spec, known.param, f"roles[{known.pattern!r}]", known.name, evidence)
    head = decision.role == "output" and not evidence.why.startswith("router")
    return replace(known, decision=replace(decision, gives_logits=head or evidence.gives_logits))


def _at(
    p: Tensor, site: Site, registry: Registry, exempt: Callable[[str], object], output_modules: frozenset[int]
) -> Decision:
    """Return what is known about a parameter at one of its sites, without the patterns of the user."""
    evidence = from_evidence(p, site, exempt, output_modules)
    entry = registry.find(site)
    if entry is None or (not entry.by_user and p.ndim == 3 and transposes(site.module) is not None):
        return evidence
    return _given(entry.spec, p, entry.why, site.name, evidence)


def _agreed(decisions: list[Decision], names: tuple[str, ...]) -> Decision:
    """Return the decision about a parameter from those about its sites."""
    if len(decisions) == 1:
        return decisions[0]
    decided = [d for d in decisions if d.role is not None]
    best = next((d for d in decided if d.role == "vector"), decided[0] if decided else decisions[0])
    others = dict.fromkeys(name for name in names if name != names[decisions.index(best)])
    tied = f"{best.why}; tied with {', '.join(others)}" if others else best.why
    return replace(best, why=tied, gives_logits=any(d.gives_logits for d in decisions))


def _given(spec: RoleSpec, p: Tensor, why: str, name: str, evidence: Decision) -> Decision:
    """Return the decision that follows from a role as a user or the registry gives it."""
    shape = tuple(p.shape)
    if spec == "vector":
        return Decision("vector", why)
    if p.ndim == 0:
        raise ValueError(
            f'param_groups: {why} gives {name!r} {spec}, but it is a single number without a fan_in. Give "vector".'
        )
    if isinstance(spec, str):
        if not evidence.dims and p.ndim != 2:
            raise ValueError(
                f"param_groups: {why} calls {name!r} {shape} {spec!r}, but which of its {p.ndim} dimensions is the fan_in? "
                f"Give lwadamw.{spec.capitalize()}(fan_in=-1) if the inputs are the last dimension, else the number of their "
                "dimension."
            )
        return Decision(spec, why, evidence.dims or (-1,))
    dims = spec.fan_in if isinstance(spec.fan_in, tuple) else (spec.fan_in,)
    if not all(-p.ndim <= dim < p.ndim for dim in dims):
        raise ValueError(
            f"param_groups: {why} gives dimension {spec.fan_in} of {name!r}, which has shape {shape}. Give a dimension from "
            f"{-p.ndim} to {p.ndim - 1}."
        )
    role: Role = "matrix" if isinstance(spec, Matrix) else "output"
    if len(evidence.dims) > 1 and all(dim % p.ndim in range(2, p.ndim) for dim in dims):
        raise ValueError(
            f"param_groups: {why} gives dimension {spec.fan_in} of {name!r} {shape} as fan_in, but this is the size of a "
            f'kernel. Give "{role}", which takes the inputs of a convolution: the dimensions {evidence.dims}.'
        )
    return Decision(role, why, dims, per=spec.per if isinstance(spec, Matrix) else None)


def _check_patterns(found: list[Decided], roles: Mapping[str, RoleSpec]) -> None:
    """Raise a ValueError if a pattern gives one role to parameters whose evidence differs, and so changes what is certain."""
    by_pattern: dict[str, list[Decided]] = {}
    for d in found:
        if d.pattern is not None and not d.pattern.startswith(ALL):
            by_pattern.setdefault(d.pattern, []).append(d)
    for pattern, matched in by_pattern.items():
        kinds = {d.evidence.role: d for d in reversed(matched)}
        spec = roles[pattern]
        role = spec if isinstance(spec, str) else "matrix" if isinstance(spec, Matrix) else "output"
        if len(kinds) == 1 or kinds.keys() <= {None, role}:
            continue
        listed = "".join(
            f"\n  {known or 'undecided'}: {d}, {d.evidence.why}; "
            f"{sum(other.evidence.role == known for other in matched)} in all"
            for known, d in kinds.items()
        )
        raise ValueError(
            f"param_groups: roles[{pattern!r}] gives the role {role!r} to parameters that are not alike:{listed}\nGive a "
            f"pattern that matches only those that you mean. If you mean all of them, write {ALL + pattern!r}."
        )


def _output_modules(model: nn.Module) -> frozenset[int]:
    """Return the ids of the modules that `get_output_embeddings` returns, of the model and of the models inside it."""
    found: list[object] = []
    for module in model.modules():
        if callable(getattr(type(module), "get_output_embeddings", None)):
            try:
                heads = module.get_output_embeddings()  # type: ignore[operator]
            except (AttributeError, NotImplementedError):  # What models without a head raise.
                continue
            found += heads if isinstance(heads, (nn.ModuleList, list, tuple)) else [heads]
    return frozenset(id(unwrapped(head)) for head in found if isinstance(head, nn.Module))


def _exempt(model: nn.Module) -> Callable[[str], object]:
    """Return the function that says whether the methods `no_weight_decay` of a model and of its parts list a name.

    The models of timm have this method. It gives names and patterns within the module that has it.
    """
    patterns = []
    for path, module in paths(model):
        if callable(getattr(type(module), "no_weight_decay", None)):
            patterns += [
                fnmatch.translate(f"{path}.{name}" if path else str(name))
                for name in module.no_weight_decay()  # type: ignore[operator]
            ]
    return re.compile("|".join(patterns) or r"(?!)").match
