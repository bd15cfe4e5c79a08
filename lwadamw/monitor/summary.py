"""The table that says what every parameter gets, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..state import keys
from ..state.decay import law_of
from ..state.groups import effective
from ..state.names import layer_type, names_of
from ..width.groups import Evidence, Groups
from .text import aligned

_HEADER = ("parameter", "shape", "role", "fan_in", "m", "lr", "wd", "tau", "why")
_RIGHT = tuple(map(_HEADER.index, ("fan_in", "m", "lr", "wd", "tau")))


@dataclass
class _Row:
    names: list[str]
    cells: tuple[str, ...]  # everything but the name
    indices: list[set[int]] = field(default_factory=list)


def summary(optimizer: Optimizer | Groups, *, steps: int | None = None, full: bool = False) -> str:
    """One line per parameter: role, fan_in, width ratio m, effective lr and weight decay, tau, and the evidence.

    wd is as `lwadamw.effective` gives it: under any decay law, lr wd is what a step takes from a weight at the present lr.
    tau = 1/(lr wd) is the number of steps a matrix needs to forget where it started: about three of them until norms
    are steady. Layers that agree share a line, their numbers replaced by `*` and counted.

    Args:
        optimizer: any optimizer; or the groups of `param_groups`, for which lr and wd are the multipliers.
        steps: length of the run, to print tau as a part of it too.
        full: one line for every parameter.
    """
    groups: Sequence[dict[str, Any]]
    if isinstance(optimizer, Groups):
        groups, evidence = optimizer, optimizer.evidence
    else:
        groups, evidence = optimizer.param_groups, getattr(optimizer, "evidence", {})

    rows: dict[tuple[str, tuple[str, ...]], _Row] = {}
    totals: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        for name, p in _named(group, index):
            found = evidence.get(name)
            role = found.role if found else keys.ROLE.of(group)
            count = totals.setdefault(role, [0, 0])
            count[0] += 1
            count[1] += p.numel()
            cells = _cells(p, role, found, group, steps)
            key = (name if full else layer_type(name), cells)
            rows.setdefault(key, _Row([], cells)).names.append(name)
    lines = [(_label(key, row.names), *row.cells) for (key, _), row in rows.items()]
    n_frozen = sum(e.frozen for e in evidence.values())
    tail = [f"{role} {n} tensors {_human(size)}" for role, (n, size) in sorted(totals.items())]
    tail += [f"frozen {n_frozen} (left out)"] if n_frozen else []
    return "\n".join([_title(groups), *aligned([_HEADER, *lines], _RIGHT), "   ".join(tail)])


def _named(group: dict[str, Any], index: int) -> list[tuple[str, Tensor]]:
    pairs = zip(names_of(group, index), group["params"], strict=True)
    return [p if isinstance(p, tuple) else (name, p) for name, p in pairs]


def _cells(p: Tensor, role: str, found: Evidence | None, group: dict[str, Any], steps: int | None) -> tuple[str, ...]:
    values = effective({"lr": 1.0, "weight_decay": 1.0, "eps": 0.0, "peak_lr": 1.0, **group})
    lr, wd = float(values.lr), float(values.weight_decay)
    tau = 1 / (lr * wd) if lr * wd > 0 and "lr" in group else None
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


def _label(pattern: str, names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{pattern} x{len(names)}"


def _title(groups: Sequence[dict[str, Any]]) -> str:
    rules = list(dict.fromkeys(g["rule"] for g in groups if "rule" in g)) or ["none"]

    def distinct(key: str) -> str:
        return ", ".join(dict.fromkeys(f"{float(g[key]):.3g}" for g in groups if key in g)) or "not set"

    laws = list(dict.fromkeys(map(law_of, groups)))
    decay = "" if laws == ["coupled"] else f"   decay {', '.join(laws)}"
    base = f"base lr {distinct('lr')}   base weight_decay {distinct('weight_decay')}"
    return f"rule {', '.join(rules)}   {base}{decay}   tau in steps"


def _human(n: int) -> str:
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if n >= size:
            return f"{n / size:.3g}{unit}"
    return str(n)
