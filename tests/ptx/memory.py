"""Memory of the pretended GPU: global memory that belongs to tensors, and the shared memory of each program.

Every access is checked. An address outside of all tensors, an address that is not a multiple of the access's width, and an
access that races with another one are errors. Two accesses race if they touch the same byte, one of them writes, and nothing
orders them: in global memory, if they are of two programs of the grid; in shared memory, if they are of two warps and no
barrier is between them.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable

import numpy as np

from tests.ptx.arithmetic import Array

WARP = 32
NOBODY, SEVERAL = -1, -2


class AccessError(Exception):
    """An access that a GPU would refuse, or whose result is not defined."""


class Owners:
    """Who touched each byte, to see accesses that race.

    Args:
        n_bytes: number of bytes.
    """

    def __init__(self, n_bytes: int) -> None:
        self.writer, self.reader = np.full(n_bytes, NOBODY), np.full(n_bytes, NOBODY)

    def touch(self, places: Array, width: int, who: Array, writes: bool) -> str | None:
        """Note an access of `width` bytes at each place, and say with what it races, if with anything.

        Args:
            places: index of the first byte, [n].
            who: who accesses, [n].
        """
        bytes_ = (places[:, None] + np.arange(width)).ravel()
        who = np.repeat(who, width)
        wrote, read = self.writer[bytes_], self.reader[bytes_]
        if ((wrote != NOBODY) & (wrote != who)).any():
            return "write"
        if not writes:
            self.reader[bytes_] = np.where((read == NOBODY) | (read == who), who, SEVERAL)
            # Lanes of one instruction may be of several readers.
            self.reader[bytes_[self.reader[bytes_] != who]] = SEVERAL
            return None
        if ((read != NOBODY) & (read != who)).any():
            return "read"
        self.writer[bytes_] = who
        return None


class Global:
    """Global memory: the memory of CPU tensors.

    Args:
        spans: (address, bytes) of what a kernel may access.
        more: gives all spans, if an address is in none of `spans`; None: then the access is wrong.
    """

    def __init__(
        self, spans: Iterable[tuple[int, int]], more: Callable[[], Iterable[tuple[int, int]]] | None = None
    ) -> None:
        self._more = more
        self._map(spans)

    def _map(self, spans: Iterable[tuple[int, int]]) -> None:
        merged: list[list[int]] = []
        for begin, size in sorted({span for span in spans if span[0] and span[1]}):
            if merged and begin <= merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], begin + size)
            else:
                merged.append([begin, begin + size])
        self._begins, self._ends = np.array(merged, np.uint64).reshape(-1, 2).T
        self._bytes = [
            np.frombuffer((ctypes.c_uint8 * (end - begin)).from_address(begin), np.uint8) for begin, end in merged
        ]
        self._first = np.cumsum([0, *(end - begin for begin, end in merged)])
        self._owners = Owners(int(self._first[-1]))

    def _outside(self, addresses: Array, width: int) -> tuple[Array, Array]:
        """(index of the span of each address, whether the access leaves it)."""
        which = np.searchsorted(self._begins, addresses, "right") - 1
        end = addresses + np.uint64(width)
        ends = self._ends[which] if len(self._ends) else np.zeros_like(addresses)
        return which, (which < 0) | (end > ends) | (end < addresses)

    def _find(self, addresses: Array, width: int, programs: Array, writes: bool) -> list[tuple[int, Array, Array]]:
        """(index of a span, lanes, places within it) of the addresses."""
        which, outside = self._outside(addresses, width)
        if outside.any() and self._more is not None:
            self._map(self._more())
            self._more = None
            which, outside = self._outside(addresses, width)
        verb = "writes" if writes else "reads"
        misaligned = addresses % np.uint64(width) != 0
        for wrong, why in ((outside, "in no tensor"), (misaligned, "misaligned")):
            if wrong.any():
                lane = int(np.argmax(wrong))
                raise AccessError(
                    f"Program {programs[lane]} {verb} {width} bytes at {addresses[lane]:#x}, which is {why}."
                )
        within = (addresses - self._begins[which]).astype(np.int64)
        places = self._first[which] + within
        other = self._owners.touch(places, width, programs, writes)
        if writes and (self._owners.writer[places] != programs).any():
            other = "write"  # in the same instruction
        if other:
            raise AccessError(f"A program {verb} {width} bytes of global memory that another program {other}s.")
        return [(piece, which == piece, within) for piece in np.unique(which)]

    def load(self, addresses: Array, width: int, programs: Array) -> Array:
        """Bytes at the addresses, uint8[n, width]."""
        out = np.empty((len(addresses), width), np.uint8)
        for piece, lanes, within in self._find(addresses, width, programs, writes=False):
            out[lanes] = self._bytes[piece][within[lanes, None] + np.arange(width)]
        return out

    def store(self, addresses: Array, values: Array, programs: Array) -> None:
        """Write uint8[n, width] to the addresses."""
        width = values.shape[1]
        for piece, lanes, within in self._find(addresses, width, programs, writes=True):
            bytes_ = within[lanes, None] + np.arange(width)
            self._bytes[piece][bytes_] = values[lanes]
            if (self._bytes[piece][bytes_] != values[lanes]).any():
                raise AccessError("Several threads write different values to one place in global memory.")


class Shared:
    """Shared memory of all programs. Before a kernel writes to it, it holds noise.

    Args:
        n_programs: number of programs of the grid.
        n_bytes: bytes of each program.
    """

    def __init__(self, n_programs: int, n_bytes: int) -> None:
        self._size = n_bytes
        self._bytes = np.random.default_rng(1).integers(0, 256, n_programs * n_bytes, np.uint8)
        self._owners = Owners(n_programs * n_bytes)

    def barrier(self, program: int) -> None:
        """All threads of the program have arrived, so what they did before is ordered."""
        own = slice(program * self._size, (program + 1) * self._size)
        self._owners.writer[own] = NOBODY
        self._owners.reader[own] = NOBODY

    def places(self, addresses: Array, width: int, programs: Array, writes: bool) -> Array:
        """Where the addresses are in the memory of all programs.

        Raises:
            AccessError: one of them is outside or misaligned.
        """
        addresses = addresses.astype(np.int64)
        verb = "writes" if writes else "reads"
        if ((addresses < 0) | (addresses + width > self._size)).any():
            raise AccessError(f"A program {verb} beyond its {self._size} bytes of shared memory.")
        if (addresses % width).any():
            raise AccessError(f"A program {verb} {width} bytes of shared memory at an address that is misaligned.")
        return addresses + programs * self._size

    def touch(self, places: Array, width: int, warps: Array, writes: bool) -> None:
        """Note an access.

        Raises:
            AccessError: it races.
        """
        if other := self._owners.touch(places, width, warps, writes):
            verb = "writes" if writes else "reads"
            raise AccessError(f"A warp {verb} shared memory that another warp {other}s, with no barrier between them.")

    def put(self, places: Array, values: Array, warps: Array) -> None:
        """Write uint8[n, width] at what `places` returned. Several warps may write the same values."""
        bytes_ = places[:, None] + np.arange(values.shape[1])
        again = (self._bytes[bytes_] == values).all(1) & (self._owners.writer[places] != NOBODY)
        self.touch(places[~again], values.shape[1], warps[~again], True)
        self._bytes[bytes_] = values
        if (self._bytes[bytes_] != values).any():
            raise AccessError("Several threads write different values to one place in shared memory.")

    def load(self, addresses: Array, width: int, programs: Array, warps: Array) -> Array:
        """Bytes at the addresses, uint8[n, width]."""
        places = self.places(addresses, width, programs, writes=False)
        self.touch(places, width, warps, writes=False)
        return self._bytes[places[:, None] + np.arange(width)]

    def store(self, addresses: Array, values: Array, programs: Array, warps: Array) -> None:
        """Write uint8[n, width] to the addresses."""
        self.put(self.places(addresses, values.shape[1], programs, writes=True), values, warps)
