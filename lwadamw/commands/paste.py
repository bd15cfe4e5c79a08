"""What a user copies from `python -m lwadamw table` into a program: the mapping of fan_ins, the roles, and the call."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from ..state.names import layer_type
from ..width.patterns import matches_any, separating
from ..width.sites import sites
from ..width.specs import RoleSpec
from .pair import Pair

if TYPE_CHECKING:
    from torch import nn

    from ..width.groups import Evidence

# Stand for what only the user knows. They are not valid Python, so nobody can run the code without filling them in.
_ROLE: Final = "<role>"
_FAN_IN: Final = "<its fan_in at the proxy>"
# From this many layer types with equal fan_ins on, a part of the model has one pattern for them.
_LEAST_FOR_PART: Final = 3


@dataclass(frozen=True)
class Paste:
    """The arguments of `param_groups` for a model whose proxy was built.

    Attributes:
        base_width: patterns and the fan_in at the proxy, in the order in which they count; None where a role is missing.
        roles: patterns and roles; None where the user has to choose.
        remarks: for a pattern that needs a choice, the shapes of its parameters.
    """

    base_width: Mapping[str, int | None]
    roles: Mapping[str, RoleSpec | None]
    remarks: Mapping[str, str] = field(default_factory=dict)

    def code(
        self,
        rule: str,
        output: str,
        values: tuple[float, float] | None,
        base_depth: int | Mapping[str, int] | None = None,
    ) -> str:
        """Return Python source that makes the groups.

        Args:
            rule: name of a rule or recipe.
            output: the argument of `param_groups`.
            base_depth: the argument of `param_groups`.
            values: lr and weight decay at the proxy, for a line that makes the optimizer; None: no such line.
        """
        lines = ["groups = lwadamw.param_groups(", "    model,"]
        lines += self._entries(
            "base_width",
            {k: _FAN_IN if v is None else str(v) for k, v in self.base_width.items()},
            "; leave this line out for a vector",
        )
        lines += self._entries("roles", {k: _source(v) for k, v in self.roles.items()}, "")
        lines.append(f'    rule="{rule}",')
        if base_depth is not None:
            lines.append(f"    base_depth={base_depth if isinstance(base_depth, int) else json.dumps(base_depth)},")
        if output != "output":
            lines.append(f'    output="{output}",')
        lines.append(")")
        if values is not None:
            lines.append(f"optimizer = lwadamw.AdamW(groups, lr={values[0]!r}, weight_decay={values[1]!r})")
        return "\n".join(lines)

    def _entries(self, argument: str, entries: Mapping[str, str], more: str) -> list[str]:
        if not entries:
            return []
        shown = []
        for pattern, value in entries.items():
            remark = self.remarks.get(pattern)
            shown.append(f"        {json.dumps(pattern)}: {value}," + (f"  # {remark}{more}" if remark else ""))
        return [f"    {argument}={{", *shown, "    },"]

    def as_dict(self) -> dict[str, Any]:
        """Return both mappings for JSON. Roles are written as --role takes them; null stands for a choice."""
        return {"base_width": dict(self.base_width), "roles": {k: role_text(v) for k, v in self.roles.items()}}


def paste(
    pair: Pair,
    evidence: Mapping[str, Evidence],
    roles: Mapping[str, RoleSpec],
    undecided: Sequence[tuple[str, tuple[int, ...], str]] = (),
) -> Paste:
    """Return the arguments of `param_groups` that give each parameter of a model the ratio that its evidence has.

    Args:
        pair: the model and its proxy.
        evidence: what `param_groups` decided with the proxy model as base_width.
        roles: the roles that the user gave for it.
        undecided: name, shape and reason of each parameter whose role nothing decides. Its evidence does not count.
    """
    choices = {name: (layer_type(name), shape, why) for name, shape, why in undecided}
    open_names: dict[tuple[str, ...], Any] = {}
    ratios: dict[tuple[str, ...], Any] = {}
    for p, places in sites(pair.model):
        names = tuple(site.name for site in places)
        open_names[names] = choices.get(names[0])
        if names[0] in choices:
            ratios[names] = choices[names[0]]
        elif (m := evidence[names[0]].m) is not None:
            # A vector that the rule scales has its last dimension as fan_in.
            fan_in = evidence[names[0]].fan_in or (p.shape[-1] if p.ndim else 1)
            ratios[names] = _FanIns(fan_in, round(fan_in / m))
    open_patterns = separating(open_names, unlisted=[None]) if choices else {}
    base_width: dict[str, int | None] = dict.fromkeys(open_patterns)
    rest = _rest(ratios, pair)
    listed = separating(ratios, unlisted=[rest, *choices.values()])
    base_width |= {pattern: fan_ins.base for pattern, fan_ins in _with_parts(listed, ratios, rest).items()}
    base_width["*"] = rest.base
    remarks = {pattern: _remark(kind, pair.proxy) for pattern, kind in open_patterns.items()}
    return Paste(base_width, {**dict.fromkeys(open_patterns), **roles}, remarks)


class _FanIns(NamedTuple):
    """The fan_in of a parameter at the model and at the proxy. Parameters that share a pattern have both in common."""

    own: int
    base: int


def _rest(ratios: Mapping[tuple[str, ...], Any], pair: Pair) -> _FanIns:
    """Return the fan_ins that need no pattern but "*": those of the width, or else those of most layer types."""
    width = _FanIns(pair.width or 1, pair.base_width or 1)
    kinds = {(layer_type(names[0]), fan_ins) for names, fan_ins in ratios.items() if isinstance(fan_ins, _FanIns)}
    counts = Counter(fan_ins for _, fan_ins in kinds)
    # Where the rule scales nothing, the number does not count.
    return width if width in counts or not counts else counts.most_common(1)[0][0]


def _with_parts(
    listed: Mapping[str, _FanIns], ratios: Mapping[tuple[str, ...], Any], rest: _FanIns
) -> dict[str, _FanIns]:
    """Return patterns of which one stands for a whole part of the model, such as a vision tower, where it can.

    Such a pattern comes last, after those of the other parameters in this part.
    """
    inside: dict[str, set[tuple[str, ...]]] = {}
    for names in ratios:
        for name in names:
            *path, _ = name.split(".")
            depth = next((i for i, module in enumerate(path) if module.isdigit()), len(path))
            for end in range(1, depth + 1):
                inside.setdefault(".".join(path[:end]), set()).add(names)
    found, parts = dict(listed), dict[str, _FanIns]()
    for part in sorted(inside, key=len):
        members = inside[part]
        kinds = Counter(ratios[names] for names in {layer_type(names[0]): names for names in members}.values())
        (common, count), *_ = kinds.most_common(1)
        if (
            count < _LEAST_FOR_PART
            or not isinstance(common, _FanIns)
            or any(ratios[names] == rest for names in members)
            or any(part.startswith(f"{other}.") for other in parts)
        ):
            continue
        own = [p for p, fan_ins in found.items() if fan_ins == common]
        for pattern in own:
            if all(names in members for names in ratios if matches_any(pattern, names)):
                del found[pattern]
        parts[part] = common
    return found | {f"{part}.*": fan_ins for part, fan_ins in parts.items()}


def role_text(spec: RoleSpec | None) -> str | None:
    """Return a role as --role takes it, like 'matrix:-1'."""
    if spec is None or isinstance(spec, str):
        return spec
    dims = spec.fan_in if isinstance(spec.fan_in, tuple) else (spec.fan_in,)
    return f"{type(spec).__name__.lower()}:{','.join(map(str, dims))}"


def _source(spec: RoleSpec | None) -> str:
    if spec is None:
        return _ROLE
    return f'"{spec}"' if isinstance(spec, str) else f"lwadamw.{spec!r}"


def _remark(kind: tuple[str, tuple[int, ...], str], proxy: nn.Module) -> str:
    pattern, shape, _ = kind
    there = next((p for p, places in sites(proxy) if any(layer_type(site.name) == pattern for site in places)), None)
    return f"{shape}" + (f", {tuple(there.shape)} at the proxy" if there is not None else "")
