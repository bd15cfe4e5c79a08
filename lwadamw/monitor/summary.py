"""The table that says what every parameter gets from the rule, and why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..state import keys
from ..state.decay import law_of
from ..state.groups import effective
from ..state.names import layer_type, names_of
from ..width.groups import Evidence, Groups
from ..width.steady_state import tau_of
from .text import aligned

_HEADER = ("parameter", "shape", "role", "fan_in", "m", "lr", "wd", "tau", "why")
_RIGHT = tuple(map(_HEADER.index, ("fan_in", "m", "lr", "wd", "tau")))
_IGNORED = (
    "{} does not read the width multipliers of these groups, so the rule has no effect. Make the groups with "
    "param_groups(..., fold=True, lr=..., weight_decay=...), or take lwadamw.AdamW."
)
_TWICE = (
    'The base lr of every group is a multiple of its width_lr_mult, so the step multiplies twice: group["lr"] holds the base '
    "value, the same in all groups."
)


@dataclass
class _Line:
    """Parameters that share a line of the table, and the cells of the line after the name."""

    label: str
    cells: tuple[str, ...]
    names: list[str] = field(default_factory=list)


@dataclass
class _Total:
    """How many parameters a role has, and how many elements they have together."""

    tensors: int = 0
    elements: int = 0


def summary(optimizer: Optimizer | Groups, *, steps: int | None = None, full: bool = False) -> str:
    """Return a table with one line per parameter: role, fan_in, width ratio m, effective lr and wd, tau, and the evidence.

    The column wd holds the weight decay that `lwadamw.effective` gives. So under every decay law, a step takes the share
    lr * wd from a weight at the present lr. The column tau holds 1/(lr * wd): the number of steps in which a matrix forgets a
    factor e of its initial weights. After about three tau the norms are steady. Parameters of equal layers with equal values
    share a line. Their layer numbers are replaced by `*`, and the line says how many they are.

    Args:
        optimizer: any optimizer. If it does not read width multipliers, as torch's do not, the columns lr and wd hold the
            values of the group, and a line says so. Or the groups that `param_groups` returned: then they hold the width
            multipliers.
        steps: length of the run in steps. If given, the table also shows tau as a share of the run.
        full: whether every parameter gets its own line.
    """
    groups: Sequence[dict[str, Any]]
    if isinstance(optimizer, Groups):
        groups, evidence = optimizer, optimizer.evidence
    else:
        groups, evidence = optimizer.param_groups, getattr(optimizer, "evidence", {})
    ignored = not isinstance(optimizer, Groups) and not _reads_multipliers(optimizer)
    ignored = ignored and any(key.of(group) != 1 for group in groups for key in keys.WIDTH)
    if ignored:
        groups = [{k: v for k, v in group.items() if k not in keys.named(keys.WIDTH)} for group in groups]
    lines: dict[tuple[str, tuple[str, ...]], _Line] = {}
    totals: dict[str, _Total] = {}
    for index, group in enumerate(groups):
        for name, p in _named(group, index):
            found = evidence.get(name)
            role = found.role if found else keys.ROLE.of(group)
            total = totals.setdefault(role, _Total())
            total.tensors += 1
            total.elements += p.numel()
            cells = _cells(p, role, found, group, steps)
            label = name if full else layer_type(name)
            lines.setdefault((label, cells), _Line(label, cells)).names.append(name)
    rows = [(_label(line), *line.cells) for line in lines.values()]
    return "\n".join(
        [
            _title(groups),
            *aligned([_HEADER, *rows], _RIGHT),
            _tail(totals, evidence),
            *_assumptions(evidence),
            *([_IGNORED.format(type(optimizer).__name__)] if ignored else []),
            *([_TWICE] if not ignored and _is_multiplied_twice(groups) else []),
        ]
    )


def _reads_multipliers(optimizer: Any) -> bool:
    """Return whether an optimizer, or the one that it wraps, is one of this package."""
    wrapped = (optimizer, getattr(optimizer, "optim", None), getattr(optimizer, "optimizer", None))
    return any(hasattr(inner, "effective") for inner in wrapped)


def _is_multiplied_twice(groups: Sequence[dict[str, Any]]) -> bool:
    """Return whether somebody has written lr * width_lr_mult into the groups of a rule."""
    pairs = [(float(group["lr"]), keys.WIDTH_LR_MULT.of(group)) for group in groups if "lr" in group]
    bases = {f"{lr / multiplier:.6g}" for lr, multiplier in pairs if multiplier}
    return len(bases) == 1 and len({multiplier for _, multiplier in pairs}) > 1 and next(iter(bases)) != "0"


def _named(group: dict[str, Any], index: int) -> list[tuple[str, Tensor]]:
    """Return the parameters of a group with their names. Groups that no optimizer has seen hold pairs already."""
    pairs = zip(names_of(group, index), group["params"], strict=True)
    return [p if isinstance(p, tuple) else (name, p) for name, p in pairs]


def _cells(p: Tensor, role: str, found: Evidence | None, group: dict[str, Any], steps: int | None) -> tuple[str, ...]:
    """Return the cells after the name, in the order of the header."""
    values = effective({"lr": 1.0, "weight_decay": 1.0, "eps": 0.0, "peak_lr": 1.0, **group})
    lr, wd = float(values.lr), float(values.weight_decay)
    tau = tau_of(lr, wd) if lr * wd > 0 and "lr" in group else None
    shown = "-" if tau is None else f"{tau:.0f}" + (f" = {tau / steps:.2g} run" if steps else "")
    return (
        "(" + ",".join(map(str, p.shape)) + ")",
        role,
        str(found.fan_in) if found and found.fan_in else "-",
        f"{found.m:.4g}" if found and found.m is not None else "-",
        f"{lr:.3g}",
        f"{wd:.4g}" if wd else "0",
        shown,
        found.why if found else "-",
    )


def _label(line: _Line) -> str:
    return line.names[0] if len(line.names) == 1 else f"{line.label} x{len(line.names)}"


def _title(groups: Sequence[dict[str, Any]]) -> str:
    """Return the first line: rule, base values, and the decay law if some group has another than 'coupled'."""
    rules = list(dict.fromkeys(g["rule"] for g in groups if "rule" in g)) or ["none"]

    def distinct(key: str) -> str:
        return ", ".join(dict.fromkeys(f"{float(g[key]):.3g}" for g in groups if key in g)) or "not set"

    laws = list(dict.fromkeys(map(law_of, groups)))
    decay = "" if laws == ["coupled"] else f"   decay {', '.join(laws)}"
    base = f"base lr {distinct('lr')}   base weight_decay {distinct('weight_decay')}"
    return f"rule {', '.join(rules)}   {base}{decay}   tau in steps"


def _tail(totals: Mapping[str, _Total], evidence: Mapping[str, Evidence]) -> str:
    """Return the last line: how many tensors and elements each role has, and how many parameters are frozen."""
    parts = [f"{role} {total.tensors} tensors {_human(total.elements)}" for role, total in sorted(totals.items())]
    frozen = sum(e.frozen for e in evidence.values())
    return "   ".join([*parts, f"frozen {frozen} (left out)"] if frozen else parts)


def _assumptions(evidence: Mapping[str, Evidence]) -> list[str]:
    """Return the line that says what the rule assumes of the forward pass: without it, values do not transfer."""
    logits = {name: found.logits for name, found in evidence.items() if found.logits}
    branches = sorted({found.branch for found in evidence.values() if found.branch is not None})
    if not branches and not any(found.m is not None for found in evidence.values()):
        return []
    assumed = [f"logits of {name} {how}" for name, how in logits.items()]
    if branches:
        factors = " or ".join(f"{factor:.4g}" for factor in branches)
        assumed.append(
            f"the output of every residual branch multiplied by {factors}, times the factor that the proxy has"
        )
    assumed.append(
        "attention scores divided by the size of a head, and not by its root, if this size follows the width"
    )
    return [f"the rule assumes of the forward pass: {'; '.join(assumed)}"]


def _human(n: int) -> str:
    """Return a count with three digits and its unit, for instance 6.14K."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)
