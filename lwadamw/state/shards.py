"""Shards: which process groups hold the other parts of a parameter, and sums that are true over all of them.

A process often holds a part of a parameter only. A sum over its part becomes the sum over the whole parameter by adding it up
over the process groups among which the parameter is split, and over no others: a replicated dimension would count twice.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .members import Member, split_dimensions

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    ShardGroups = ProcessGroup | Sequence[ProcessGroup]
    ShardGroup = ShardGroups | Mapping[str, ShardGroups]


class Split(NamedTuple):
    """How a parameter is split.

    Attributes:
        label: the same text on every process for the same split. It gives sums an order on which all processes agree.
        groups: the process groups over which sums have to be added; none for a parameter that every process holds whole.
    """

    label: str
    groups: tuple[ProcessGroup, ...]


WHOLE = Split("", ())


class Shards:
    """What an optimizer knows about the processes that hold the other parts of its parameters.

    A DTensor tells by itself how it is split. Of a plain tensor, the user tells.

    Args:
        shard_group: the process group, or several, among which plain parameters are split; or a mapping from fnmatch patterns
            on parameter names to them, of which the first that matches counts. None: plain parameters are whole.

    Raises:
        TypeError: `shard_group` has another type.
    """

    def __init__(self, shard_group: ShardGroup | None = None) -> None:
        given: Any = (
            shard_group if isinstance(shard_group, Mapping) else {} if shard_group is None else {"*": shard_group}
        )
        self._patterns: dict[str, Split] = {}
        self._by_mesh: dict[tuple[Any, tuple[int, ...]], Split] = {}
        for i, (pattern, one_or_more) in enumerate(given.items()):
            groups = tuple(one_or_more) if isinstance(one_or_more, (list, tuple)) else (one_or_more,)
            for group in groups:
                if not hasattr(group, "rank") or not hasattr(group, "size"):
                    raise TypeError(
                        f"shard_group: {group!r} is not a process group. Give torch.distributed.group.WORLD, "
                        "mesh.get_group(), or a mapping from name patterns to such groups."
                    )
            self._patterns[pattern] = Split(f"shard_group {i}", tuple(g for g in groups if g.size() > 1))

    @property
    def declared(self) -> list[Split]:
        """The splits that the user has told. Every process takes part in their sums, even if it holds no such parameter."""
        return [split for split in self._patterns.values() if split.groups]

    def split_of(self, member: Member) -> Split:
        """Return how a parameter is split.

        Args:
            member: the parameter.
        """
        p: Any = member.param
        if hasattr(p, "device_mesh"):
            dimensions = split_dimensions(p)
            if not dimensions:
                return WHOLE
            place = (p.device_mesh, dimensions)
            if place not in self._by_mesh:
                self._by_mesh[place] = self._split_over(*place)
            return self._by_mesh[place]
        for pattern, split in self._patterns.items():
            if fnmatch.fnmatchcase(member.name, pattern):
                return split if split.groups else WHOLE
        return WHOLE

    def _split_over(self, mesh: Any, dimensions: tuple[int, ...]) -> Split:
        groups = tuple(map(mesh.get_group, dimensions))
        label = f"dimensions {dimensions} of a mesh {tuple(mesh.shape)}"
        alike = [split for split in self._by_mesh.values() if split.label.partition(" #")[0] == label]
        for split in alike:
            if split.groups == groups:
                return split
        # Another mesh of the same shape, such as the other dimension of a larger mesh. Processes meet meshes in one order.
        return Split(f"{label} #{len({split.label for split in alike})}", groups)

    def total(self, sums: Iterable[tuple[Split, Tensor]]) -> Tensor | None:
        """Add up sums over this process's parts, so that the result is the same on every process.

        This is collective: one all-reduce for each process group.

        Args:
            sums: a sum of one element for each split, float64, on any device. A split may come several times.

        Returns:
            float64[], on the device of the first sum; None if nothing is split.
        """
        listed = list(sums)
        splits = {split.label: split for split in (*self.declared, *(split for split, _ in listed))}
        if not any(split.groups for split in splits.values()):
            return None
        device = listed[0][1].device if listed else torch.device("cpu")
        rows = {label: torch.zeros((), dtype=torch.float64, device=device) for label in sorted(splits)}
        for split, value in listed:
            rows[split.label] = rows[split.label] + value.to(device, non_blocking=True).reshape(())
        table = torch.stack(list(rows.values()))
        add_up(table, [splits[label] for label in rows])
        return table.sum()

    def whole_rows(self, names: Sequence[str], splits: Sequence[Split], sums: Tensor) -> tuple[list[str], Tensor]:
        """Return sums over whole parameters, from those over this process's parts.

        This is collective: one all-reduce for each process group. Where the user has told the groups, processes may hold
        different parameters, so they tell each other the names first.

        Args:
            names: name of each row.
            splits: how the parameter of each row is split.
            sums: [len(names), k]

        Returns:
            Names and sums of all parameters that any process holds, in the same order on every process of a group.
        """
        names, splits, table = list(names), list(splits), sums.clone()
        for split in self.declared:
            for group in split.groups:
                mine = [name for name, own in zip(names, splits, strict=True) if own == split]
                theirs: list[Any] = [None] * group.size()
                torch.distributed.all_gather_object(theirs, mine, group=group)
                union = list(dict.fromkeys(name for some in theirs for name in some))
                row_of = {name: i for i, name in enumerate(names)}
                others = [i for i, own in enumerate(splits) if own != split]
                shared = table.new_zeros(len(union), table.shape[1])
                here = [i for i, name in enumerate(union) if name in row_of]
                shared[here] = table[[row_of[union[i]] for i in here]]
                torch.distributed.all_reduce(shared, group=group)
                names = [names[i] for i in others] + union
                splits = [splits[i] for i in others] + [split] * len(union)
                table = torch.cat([table[others], shared])
        told = {split.label for split in self.declared}
        add_up(table, [WHOLE if split.label in told else split for split in splits])
        return names, table


def add_up(table: Tensor, splits: Sequence[Split]) -> None:
    """Add the rows of a table over the processes among which their parameters are split, in place.

    This is collective: one all-reduce for each distinct process group, in an order on which all processes agree.

    Args:
        table: [n, ...]
        splits: how the parameter of each row is split, n.
    """
    groups: dict[int, Any] = {}
    for split in sorted(set(splits), key=lambda split: split.label):
        groups |= {id(group): group for group in split.groups if id(group) not in groups}
    for group in groups.values():
        rows = [i for i, split in enumerate(splits) if group in split.groups]
        # A list as an index would be copied to the device, for which the host would wait.
        part = torch.stack([table[i] for i in rows])
        torch.distributed.all_reduce(part, group=group)
        for i, row in zip(rows, part, strict=True):
            table[i] = row
