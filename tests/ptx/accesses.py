"""Instructions that move data: between registers, and between registers, shared memory and global memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from tests.ptx.arithmetic import Array, is_type, type_of
from tests.ptx.lanes import Lanes, parts
from tests.ptx.memory import AccessError, Global, Shared
from tests.ptx.program import Instruction

Action = Callable[[Array], "int | None"]  # what an instruction does with the lanes that execute it; see machine.py
# What an access may say about caches. It changes no value.
_HINTS = re.compile(r"L1::\w+|L2::\w+|ca|cg|cs|cv|lu|wb|wt|nc|volatile|relaxed|weak|gpu|sys")


class Copies(NamedTuple):
    """Copies of one cp.async: a row for each lane.

    Attributes:
        lanes: the lanes that copy, [n].
        group: the groups of copies that the lane had ended before, [n].
        places: where in shared memory, [n].
        values: what was in global memory when the copy began, or zeros, uint8[n, width].
        sources: addresses in global memory, [n].
        reads: whether the lane reads global memory, [n].
    """

    lanes: Array
    group: Array
    places: Array
    values: Array
    sources: Array
    reads: Array

    def split(self, which: Array) -> tuple[Copies, Copies]:
        """Those of the lanes for which `which` is true, and the others."""
        return Copies(*(column[which] for column in self)), Copies(*(column[~which] for column in self))


class Accesses(Lanes):
    """Lanes that access memory. Copies to shared memory (cp.async) arrive when they are waited for, and not before.

    Args:
        memory: global memory.
        shared: shared memory.
        lanes: the arguments of `Lanes`.
    """

    def __init__(self, memory: Global, shared: Shared, *lanes: Any) -> None:
        super().__init__(*lanes)
        self.memory, self.shared = memory, shared
        self.copies: list[Copies] = []  # on their way
        self._committed = np.zeros(self.n_lanes, np.int64)  # groups of copies that each lane has ended

    def mov(self, i: Instruction) -> Action:
        """From register to register, or between one register and its parts."""
        dtype = type_of(i.name[-1])
        to, source = i.operands
        if source.startswith("{"):
            sources = parts(source)
            piece = np.dtype(f"u{dtype.itemsize // len(sources)}")
            read, write = [self.reader(part, piece) for part in sources], self.writer(to, dtype)

            def pack(lanes: Array) -> None:
                write(lanes, np.stack([r(lanes) for r in read], -1).view(dtype)[:, 0])

            return pack
        if to.startswith("{"):
            goals = parts(to)
            piece = np.dtype(f"u{dtype.itemsize // len(goals)}")
            whole, writes = self.reader(source, dtype), [self.writer(part, piece) for part in goals]

            def unpack(lanes: Array) -> None:
                pieces = np.ascontiguousarray(whole(lanes))[:, None].view(piece)
                for k, write in enumerate(writes):
                    write(lanes, pieces[:, k])

            return unpack
        read_one, write_one = self.reader(source, dtype), self.writer(to, dtype)
        return lambda lanes: write_one(lanes, read_one(lanes))

    def _space(self, i: Instruction) -> tuple[str, int, np.dtype[Any]]:
        """(space, length of the vector, type of an element) of a load or a store."""
        said = [part for part in i.name[1:] if not _HINTS.fullmatch(part)]
        lengths = [int(part[1:]) for part in said if re.fullmatch(r"v\d", part)]
        spaces = [part for part in said if part in ("global", "shared", "param")]
        if len(said) != len(lengths) + len(spaces) + 1 or len(spaces) != 1 or not is_type(said[-1]):
            raise ValueError(f"The access {i.text} is not known here.")
        return spaces[0], sum(lengths) or 1, type_of(said[-1])

    def ld(self, i: Instruction) -> Action:
        """From memory to registers."""
        space, n, dtype = self._space(i)
        # An operand behind the address is a cache policy.
        writes = [self.writer(part, dtype) for part in parts(i.operands[0])]
        if space == "param":
            name = i.operands[1].strip("[] ")
            value = self.constant(name, dtype)
            return lambda lanes: writes[0](lanes, np.broadcast_to(value, lanes.shape))
        address = self.address(i.operands[1], "u8" if space == "global" else "u4")
        width = n * dtype.itemsize

        def load(lanes: Array) -> None:
            if space == "global":
                found = self.memory.load(address(lanes), width, self.programs[lanes])
            else:
                found = self.shared.load(address(lanes), width, self.programs[lanes], self.warps[lanes])
            for k, write in enumerate(writes):
                write(lanes, found.view(dtype)[:, k])

        return load

    def st(self, i: Instruction) -> Action:
        """From registers to memory."""
        space, _, dtype = self._space(i)
        reads = [self.reader(part, dtype) for part in parts(i.operands[1])]
        address = self.address(i.operands[0], "u8" if space == "global" else "u4")

        def store(lanes: Array) -> None:
            values = np.stack([read(lanes) for read in reads], -1).view(np.uint8)
            if space == "global":
                self.memory.store(address(lanes), values, self.programs[lanes])
            else:
                self.shared.store(address(lanes), values, self.programs[lanes], self.warps[lanes])

        return store

    def cp(self, i: Instruction) -> Action:
        """cp.async: from global to shared memory, in groups that can be waited for."""
        if i.name[2] == "commit_group":
            return self._commit
        if i.name[2] == "wait_group":
            return lambda lanes: self._arrive(lanes, int(i.operands[0], 0))
        to, source = self.address(i.operands[0], "u4"), self.address(i.operands[1], "u8")
        width = int(i.operands[2], 0)
        size = self.reader(i.operands[3] if len(i.operands) > 3 else str(width), type_of("u32"))

        def copy(lanes: Array) -> None:
            places = self.shared.places(to(lanes), width, self.programs[lanes], writes=True)
            self.shared.touch(places, width, self.warps[lanes], writes=True)
            sizes = size(lanes)
            if not np.isin(sizes, (0, width)).all():
                raise AccessError("A copy of a part of its width is not known here.")
            reads, values = sizes == width, np.zeros((len(lanes), width), np.uint8)
            sources = source(lanes)
            if (sources % np.uint64(width) != 0).any():  # PTX leaves open what happens then, even if nothing is read
                raise AccessError(f"A copy of {width} bytes to shared memory comes from an address that is misaligned.")
            values[reads] = self.memory.load(sources[reads], width, self.programs[lanes[reads]])
            self.copies.append(Copies(lanes, self._committed[lanes], places, values, sources, reads))

        return copy

    def _commit(self, lanes: Array) -> None:
        self._committed[lanes] += 1

    def _arrive(self, lanes: Array, pending: int) -> None:
        """Let the copies of the lanes arrive, all but those of the last `pending` groups."""
        waits = np.zeros(self.n_lanes, bool)
        waits[lanes] = True
        on_their_way = []
        for copies in self.copies:
            now = waits[copies.lanes] & (copies.group < self._committed[copies.lanes] - pending)
            arrived, rest = copies.split(now)
            read = arrived.reads
            source = self.memory.load(arrived.sources[read], copies.values.shape[1], self.programs[arrived.lanes[read]])
            if (source != arrived.values[read]).any():
                raise AccessError("Global memory is written while it is copied to shared memory.")
            self.shared.put(arrived.places, arrived.values, self.warps[arrived.lanes])
            if len(rest.lanes):
                on_their_way.append(rest)
        self.copies = on_their_way

    def ldmatrix(self, i: Instruction) -> Action:
        """Eight rows of 16 bytes, whose addresses the first lanes of a warp give. Each lane gets 4 bytes."""
        if i.name[1:] != ("sync", "aligned", "m8n8", "x1", "shared", "b16"):
            raise ValueError(f"The access {i.text} is not known here.")
        address = self.address(i.operands[1], "u4")
        write = self.writer(parts(i.operands[0])[0], type_of("b32"))

        def load(lanes: Array) -> None:
            warps = self.whole_warps(lanes)
            rows = warps[:, :8].ravel()
            found = self.shared.load(address(rows), 16, self.programs[rows], self.warps[rows])
            write(lanes, found.view(np.uint32).ravel())

        return load
