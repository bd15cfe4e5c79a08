"""Shards: which process groups hold the other parts of a parameter, and sums that are true over all of them.

A process often holds a part of a parameter only. A sum over its part becomes the sum over the whole parameter by adding it up
over the process groups among which the parameter is split, and over no others: a replicated dimension would count twice.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from .collectives import STEP, Call, add_over, device_of, gathered
from .members import Member, is_elsewhere, is_of_fsdp1, split_dimensions
from .names import is_named
from .transfer import moved

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
_WILD: Final = re.compile(r"[*?\[]")


class Shards:
    """What an optimizer knows about the processes that hold the other parts of its parameters.

    A DTensor tells by itself how it is split. Of a plain tensor, the user tells.

    Args:
        shard_group: the process group, or several, among which plain parameters are split; or a mapping from fnmatch patterns
            on parameter names to them, of which the first that matches counts. No group at all, as [] has none, says that a
            parameter is whole. None: plain parameters are whole, unless they are known to be shards, see `look`.

    Raises:
        TypeError: `shard_group` has another type.
    """

    def __init__(self, shard_group: ShardGroup | None = None) -> None:
        self._by_mesh: dict[tuple[Any, tuple[int, ...]], Split] = {}
        self._untold: str | None = None  # name of a parameter that is a shard, and nobody has told of what
        self._elsewhere: str | None = None  # name of a DTensor over a mesh that this process is not in
        self.tell(shard_group)

    def tell(self, shard_group: ShardGroup | None) -> None:
        """Replace what the user has told.

        Args:
            shard_group: as for the constructor.

        Raises:
            TypeError: `shard_group` has another type. Nothing has been replaced then.
        """
        given: Any = (
            shard_group if isinstance(shard_group, Mapping) else {} if shard_group is None else {"*": shard_group}
        )
        # Patterns of the same groups are one split, so that their sums are added up together.
        splits: dict[tuple[ProcessGroup, ...], Split] = {}
        patterns: dict[str, Split] = {}
        for pattern, one_or_more in given.items():
            groups = tuple(one_or_more) if isinstance(one_or_more, (list, tuple)) else (one_or_more,)
            for group in groups:
                if not hasattr(group, "rank") or not hasattr(group, "size"):
                    raise TypeError(
                        f"shard_group: {group!r} is not a process group. Give torch.distributed.group.WORLD, "
                        "mesh.get_group(), or a mapping from name patterns to such groups."
                    )
            split = Split(f"shard_group {len(splits)}", tuple(g for g in groups if g.size() > 1))
            patterns[pattern] = splits.setdefault(groups, split)
        self._declared = [split for split in splits.values() if split.groups]
        numbered = list(enumerate(patterns.items()))
        # An engine gives every name. So names are looked up, and only patterns are tried one after the other.
        self._names = {pattern: (i, split) for i, (pattern, split) in numbered if not _WILD.search(pattern)}
        self._globs = [(i, pattern, split) for i, (pattern, split) in numbered if _WILD.search(pattern)]

    @property
    def declared(self) -> list[Split]:
        """The splits that the user has told. Every process takes part in their sums, even if it holds no such parameter."""
        return self._declared

    def look(self, members: Iterable[Member]) -> None:
        """Look for parameters without which a sum would be wrong.

        One kind is DTensors over a mesh that this process is not in. The other is plain parameters that are certainly shards,
        of which nobody has told which processes hold the others.

        FullyShardedDataParallel marks its parameters. It keeps shards as vectors, and gives every other parameter its shape
        under NO_SHARD. So if all marked parameters are vectors, they are shards. Every process finds the same.

        Args:
            members: all parameters of the optimizer.
        """
        members = list(members)
        self._elsewhere = next((m.name for m in members if is_elsewhere(m.param)), None)
        marked = [m for m in members if is_of_fsdp1(m.param)]
        self._untold = None
        if marked and all(m.param.ndim == 1 for m in marked) and torch.distributed.is_initialized():
            untold = (m.name for m in marked if self._told(m) is None)
            self._untold = next(untold, None) if torch.distributed.get_world_size() > 1 else None

    @property
    def has_plain_shards(self) -> bool:
        """Whether some parameters are shards and no DTensors, as far as the user has told or `look` has found."""
        return bool(self._declared) or self._untold is not None

    def _told(self, member: Member) -> Split | None:
        """Return the split that the user has told of a plain parameter."""
        before, told = self._names.get(member.name, (len(self._names) + len(self._globs), None))
        matching = (s for i, glob, s in self._globs if i < before and fnmatch.fnmatchcase(member.name, glob))
        return next(matching, told)

    def check_told(self, call: Call) -> None:
        """Raise an error if `look` has found shards of which nothing is known.

        Args:
            call: what the user has called.

        Raises:
            RuntimeError: there are such shards.
        """
        if self._untold is not None:
            raise RuntimeError(
                f"lwadamw.AdamW: {call.name} would use the part of {self._untold!r} that this process holds as if it were the "
                "whole: it is a shard of FullyShardedDataParallel, which does not tell the optimizer who holds the others. "
                "Build the optimizer with shard_group=model.process_group. Under NO_SHARD give shard_group=[]. "
                f"{call.alone}"
            )

    def is_nameless(self, member: Member) -> bool:
        """Return whether nobody can tell which shards of other processes are of the same parameter.

        FullyShardedDataParallel gives every process all parameters, so their places are names.

        Args:
            member: the parameter.
        """
        return bool(self._told(member)) and not is_named(member.param, member.group) and not is_of_fsdp1(member.param)

    def split_of(self, member: Member) -> Split:
        """Return how a parameter is split.

        Args:
            member: the parameter.
        """
        p: Any = member.param
        if hasattr(p, "device_mesh"):
            dimensions = split_dimensions(p)
            if not dimensions or is_elsewhere(p):
                return WHOLE
            place = (p.device_mesh, dimensions)
            if place not in self._by_mesh:
                self._by_mesh[place] = self._split_over(*place)
            return self._by_mesh[place]
        told = self._told(member)
        return WHOLE if told is None or not told.groups else told

    def _split_over(self, mesh: Any, dimensions: tuple[int, ...]) -> Split:
        groups = tuple(map(mesh.get_group, dimensions))
        label = f"dimensions {dimensions} of a mesh {tuple(mesh.shape)}"
        alike = [split for split in self._by_mesh.values() if split.label.partition(" #")[0] == label]
        for split in alike:
            if split.groups == groups:
                return split
        # Another mesh of the same shape, such as the other dimension of a larger mesh. Processes meet meshes in one order.
        return Split(f"{label} #{len({split.label for split in alike})}", groups)

    def total(self, sums: Iterable[tuple[Split, Tensor]], splits: Iterable[Split], call: Call) -> Tensor | None:
        """Add up sums over this process's parts, so that the result is the same on every process.

        This is collective: one all-reduce for each process group.

        Args:
            sums: a sum of one element for each split, float64, on any device. A split may come several times.
            splits: how the optimizer's DTensors are split, on which all processes agree. A process takes part in the sums of
                parameters that have a gradient on another process only.
            call: what the user has called.

        Returns:
            float64[], on the device of the first sum; None if nothing is split.

        Raises:
            RuntimeError: another process did not make the call, or `look` has found shards of which nothing is known, or a
                DTensor over a mesh that this process is not in.
        """
        self.check_told(call)
        if self._elsewhere is not None:
            raise RuntimeError(
                f"lwadamw.AdamW: {call.name}, but this process is not in the device mesh of {self._elsewhere!r}. It does not "
                "know the norm of all gradients, and would scale its own by another factor than the processes of that mesh. "
                f"Distribute the parameter over a mesh of all processes, or use max_grad_norm=None. {call.alone}"
            )
        listed = list(sums)
        lines = {split.label: split for split in (*self.declared, *splits, *(split for split, _ in listed))}
        if not any(split.groups for split in lines.values()):
            return None
        device = listed[0][1].device if listed else device_of([g for split in lines.values() for g in split.groups])
        rows = {label: torch.zeros((), dtype=torch.float64, device=device) for label in sorted(lines)}
        for split, value in listed:
            rows[split.label] = rows[split.label] + moved(value, device).reshape(())
        table = torch.stack(list(rows.values()))
        add_up(table, [lines[label] for label in rows], call)
        return table.sum()

    def whole_rows(self, rows: Sequence[tuple[Member, str]], sums: Tensor, call: Call) -> tuple[list[str], Tensor]:
        """Return sums over whole parameters, from those over this process's parts.

        This is collective: one all-reduce for each process group. Where the user has told the groups, processes may hold
        different parameters, so they tell each other the names first.

        Args:
            rows: parameter and name of each row.
            sums: [len(rows), k]
            call: what the user has called.

        Returns:
            Names and sums of all parameters that any process holds, in the same order on every process of a group.

        Raises:
            RuntimeError: another process did not make the call, or `look` has found shards of which nothing is known, or
                plain shards have no names by which processes could tell them apart.
        """
        self.check_told(call)
        names, splits = [name for _, name in rows], [self.split_of(member) for member, _ in rows]
        if not self.declared and not any(split.groups for split in splits):
            return names, sums
        table = sums.clone()
        unnamed = {name for m, name in rows if self.is_nameless(m)}
        if not names and self.declared:
            table = table.to(device_of([group for split in self.declared for group in split.groups]))
        for split in self.declared:
            for group in split.groups:
                mine = [name for name, own in zip(names, splits, strict=True) if own == split]
                theirs = gathered((mine, any(name in unnamed for name in mine)), group, call)
                check_named(any(nameless for _, nameless in theirs), call)
                union = list(dict.fromkeys(name for some, _ in theirs for name in some))
                row_of = {name: i for i, name in enumerate(names)}
                others = [i for i, own in enumerate(splits) if own != split]
                shared = table.new_zeros(len(union), table.shape[1])
                here = [i for i, name in enumerate(union) if name in row_of]
                shared[here] = table[[row_of[union[i]] for i in here]]
                add_over(shared, group, call)
                names = [names[i] for i in others] + union
                splits = [splits[i] for i in others] + [split] * len(union)
                table = torch.cat([table[others], shared])
        told = {split.label for split in self.declared}
        add_up(table, [WHOLE if split.label in told else split for split in splits], call)
        return names, table


def check_named(nameless: bool, call: Call) -> None:
    """Raise an error if some process of a group has shards that no other process can recognise.

    Args:
        nameless: whether there are such shards on any process.
        call: what the user has called.

    Raises:
        RuntimeError: there are.
    """
    if nameless:
        raise RuntimeError(
            f"lwadamw.AdamW: {call.name} with shard_group, but parameters have no names, so nobody can tell which "
            "shards of different processes are of one parameter. Give (name, parameter) pairs, for instance "
            f"model.named_parameters(). {call.alone}"
        )


def add_up(table: Tensor, splits: Sequence[Split], call: Call = STEP) -> None:
    """Add the rows of a table over the processes among which their parameters are split, in place.

    This is collective: one all-reduce for each distinct process group, in an order on which all processes agree.

    Args:
        table: [n, ...]
        splits: how the parameter of each row is split, n.
        call: what the user has called.

    Raises:
        RuntimeError: another process did not make the call.
    """
    groups: dict[int, Any] = {}
    for split in sorted(set(splits), key=lambda split: split.label):
        groups |= {id(group): group for group in split.groups if id(group) not in groups}
    for group in groups.values():
        rows = [i for i, split in enumerate(splits) if group in split.groups]
        # A list as an index would be copied to the device, for which the host would wait.
        part = torch.stack([table[i] for i in rows])
        add_over(part, group, call)
        for i, row in zip(rows, part, strict=True):
            table[i] = row
