"""Hybrids: runs in which one optimizer takes the matrices and another one the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..state import keys
from .groups import Groups
from .rules import Role


def by_role(groups: Iterable[dict[str, Any]]) -> dict[Role, Groups]:
    """Split parameter groups by role, for a run with an optimizer for matrices and another one for the rest.

    Args:
        groups: what `param_groups` returned, with or without `fold`.

    Returns:
        The same group dicts by role, only of roles that occur. Each value has the evidence for the parameters of all roles.

    Raises:
        ValueError: a group has no role.

    Examples:
        >>> import torch
        >>> from lwadamw import param_groups
        >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 64, bias=False))
        >>> roles = by_role(param_groups(model, base_width=16, fold=True, lr=0.1, weight_decay=0.1))
        >>> [(role, group["lr"], group["param_names"]) for role, (group,) in roles.items()]
        [('vector', 0.1, ['0.weight']), ('matrix', 0.025, ['1.weight'])]
    """
    groups, evidence = list(groups), getattr(groups, "evidence", {})
    split: dict[Role, Groups] = {}
    for index, group in enumerate(groups):
        if keys.ROLE.name not in group:
            raise ValueError(
                f"by_role: group {index} with {len(group['params'])} parameters has no role. Give what "
                "lwadamw.param_groups returned."
            )
        split.setdefault(group[keys.ROLE.name], Groups((), evidence)).append(group)
    return split
