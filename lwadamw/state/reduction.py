"""Reduction: sums over what each process holds become sums over whole parameters, for programs that reduce by themselves."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final

from torch import Tensor

from .collectives import Call
from .members import Member
from .shards import Shards

if TYPE_CHECKING:
    from .shards import ShardGroup

_CALL: Final = Call("reduce_sums()", "The sums that were given to it are those of this process alone.")


def reduce_sums(
    sums: Tensor,
    names: Sequence[str],
    params: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    *,
    shard_group: ShardGroup | None = None,
) -> tuple[list[str], Tensor]:
    """Add up sums over what each process holds of its parameters, so that they are sums over whole parameters.

    `AdamW.norms()` and `norm_sums()` do this by themselves. A framework that collects numbers first and reduces them later,
    or a loop that adds columns of its own, takes `norm_sums(local=True)` where it likes, and calls this on all processes.

    This call is collective if parameters are split over processes: all processes have to make it, with the same columns. It is
    one all-reduce for each process group. With `shard_group`, processes also tell each other their names. A process that calls
    alone gets an error when the timeout of the process group is over.

    Args:
        sums: [len(names), k], sums of anything over what this process holds, for instance `norm_sums(local=True)`.
        names: name of each row, for instance `norm_names()`. The name of a part of a parameter is `name[0]`, `name[1]`, ...
        params: all parameters by name, or pairs. DTensors tell how they are split.
        shard_group: as in `AdamW`: the groups among which plain parameters are split.

    Returns:
        The names of the rows, and their sums on the device of `sums`. Without `shard_group` the names are those that were
        given. With it they are those of all processes, in the same order on each of them.

    Raises:
        ValueError: `sums` does not have a row for each name, or there is no parameter of a name.
        TypeError: `shard_group` has another type.
        RuntimeError: another process did not make the call, or parameters are shards of FullyShardedDataParallel and
            `shard_group` does not tell their group.

    Examples:
        >>> import torch
        >>> names, whole = reduce_sums(torch.ones(1, 4), ["w"], {"w": torch.zeros(3)})
        >>> names, whole.tolist()
        (['w'], [[1.0, 1.0, 1.0, 1.0]])
    """
    if sums.ndim != 2 or sums.shape[0] != len(names):
        raise ValueError(
            f"reduce_sums: sums have shape {tuple(sums.shape)}, {len(names)} names need ({len(names)}, k). Give norm_sums("
            "local=True) and norm_names() of one optimizer."
        )
    held = dict(params.items() if isinstance(params, Mapping) else params)
    owners = [re.sub(r"\[\d+\]$", "", name) for name in names]
    if missing := [name for name in owners if name not in held]:
        raise ValueError(
            f"reduce_sums: params have no {missing[0]!r}. Give those of the optimizer: {{name: p for group in "
            "optimizer.param_groups for name, p in zip(group['param_names'], group['params'])}."
        )
    shards = Shards(shard_group)
    group = {"params": list(held.values()), "param_names": list(held)}
    members = {name: Member(p, name, group, 0, i, ()) for i, (name, p) in enumerate(held.items())}
    shards.look(members.values())
    return shards.whole_rows([(members[owner], name) for owner, name in zip(owners, names, strict=True)], sums, _CALL)
