"""Parameters that share a name, for instance those of two models that one optimizer trains: places tell them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

StateDict = dict[str, Any]


def places_decide(saved: Sequence[StateDict], groups: Sequence[StateDict]) -> bool:
    """Return whether a checkpoint has to be matched by position although every group has names.

    Args:
        saved: the groups of the checkpoint.
        groups: the optimizer's `param_groups`.

    Raises:
        ValueError: several parameters share a name, and the checkpoint has other names, or in another order.
    """
    sides = (("the checkpoint", saved), ("this optimizer", groups))
    shared = [(where, name) for where, of in sides if (name := _shared_name(of)) is not None]
    if not shared:
        return False
    if [list(g["param_names"]) for g in saved] == [list(g["param_names"]) for g in groups]:
        return True
    where, name = shared[0]
    raise ValueError(
        f"load_state_dict: several parameters of {where} are called {name!r}, and the names of the checkpoint and of this "
        "optimizer are not the same in the same order. Give every parameter a name of its own, for instance "
        "[(f'encoder.{n}', p) for n, p in encoder.named_parameters()], or match by position:\n"
        "    for g in state_dict['param_groups']: g.pop('param_names', None)"
    )


def _shared_name(groups: Sequence[StateDict]) -> str | None:
    """Return the first name that several parameters have. A parameter that stands in the groups twice may have it twice."""
    owner: dict[str, int] = {}
    for group in groups:
        names: Sequence[str] = group["param_names"]
        for name, p in zip(names, group["params"], strict=False):
            key = p if isinstance(p, int) else id(p)
            if owner.setdefault(name, key) != key:
                return name
    return None
