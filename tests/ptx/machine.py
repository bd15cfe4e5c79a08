"""A pretended GPU that executes PTX on the CPU, for all threads of a grid at once.

Every lane has its own place in the program. At each turn, some warps are chosen, and their lanes at the earliest place run to the
next branch, label or barrier. So lanes that parted at a branch meet again, as they do on a GPU. The choice of warps is random: a
kernel whose result depends on it has a race.

Registers and shared memory hold noise before they are written. Copies to shared memory (cp.async) arrive as late as the kernel
allows. What it does not see: memory ordering between threads of one warp, time, and what ptxas makes of the PTX.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from tests.ptx.arithmetic import Array, function_of, is_type, type_of
from tests.ptx.memory import WARP, AccessError, Global, Shared
from tests.ptx.program import Instruction, Program

RUNS, WAITS, DONE = range(3)
_ADDRESS = re.compile(r"\[\s*(\w+|%\w+)\s*(?:\+\s*(-?\w+))?\s*\]")
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


class Machine:
    """One launch of a kernel.

    Args:
        program: the kernel.
        n_programs: size of the grid.
        parameters: the values of the first parameters; the others are 0.
        memory: global memory.
        shared_bytes: bytes of shared memory of each program.
        seed: of the order in which warps run.
    """

    def __init__(
        self,
        program: Program,
        n_programs: int,
        parameters: Sequence[int],
        memory: Global,
        shared_bytes: int,
        seed: int = 0,
    ) -> None:
        self.program, self.memory = program, memory
        self.n_lanes = n_programs * program.threads
        lanes = np.arange(self.n_lanes)
        self.programs, self.threads, self.warps = lanes // program.threads, lanes % program.threads, lanes // WARP
        self.n_programs = n_programs
        self.shared = Shared(n_programs, shared_bytes)
        self.place = np.zeros(self.n_lanes, np.int64)
        self.state = np.full(self.n_lanes, RUNS)
        self.random = np.random.default_rng(seed)
        self.registers = {name: self._noise(bits) for name, bits in program.widths.items()}
        values = [*parameters, *[0] * (len(program.parameters) - len(parameters))]
        self._parameters = {f"{program.name}_param_{i}": value for i, value in enumerate(values)}
        self._committed = np.zeros(self.n_lanes, np.int64)  # groups of copies that each lane has ended
        self._copies: list[Copies] = []  # on their way
        self._starts = {*program.labels.values()}
        self._actions = [self._action(instruction) for instruction in program.instructions]

    def _noise(self, bits: int) -> Array:
        if bits == 1:
            return self.random.integers(0, 2, self.n_lanes).astype(bool)
        dtype = np.dtype(f"u{bits // 8}")
        return self.random.integers(0, np.iinfo(dtype).max, self.n_lanes, dtype)

    def run(self) -> None:
        """Execute the kernel.

        Raises:
            AccessError: an access is wrong, or copies are never waited for.
        """
        with np.errstate(all="ignore"):
            while (running := self.state == RUNS).any():
                warps = self.random.random(self.n_lanes // WARP) < 0.5
                chosen = running & warps[self.warps]
                if not chosen.any():
                    chosen = running
                first = self.place[chosen].min()
                self._run_block(int(first), np.flatnonzero(chosen & (self.place == first)))
        if self._copies:
            raise AccessError("The kernel ends before copies to shared memory are waited for.")

    def _run_block(self, place: int, lanes: Array) -> None:
        """Run the lanes from an instruction to the next branch, label or barrier."""
        while True:
            instruction, action = self.program.instructions[place], self._actions[place]
            active = lanes
            if instruction.guard:
                register, wanted = instruction.guard
                active = lanes[self.registers[register][lanes] == wanted]
            place += 1
            try:
                jumped = action(active) if len(active) or instruction.name[0] == "bra" else None
            except AccessError as error:
                raise AccessError(f"Line {instruction.line}: {instruction.text}\n{error}") from None
            if jumped is not None or place in self._starts or place == len(self._actions):
                break
        self.place[lanes] = place
        if jumped is not None:
            self.place[active] = jumped if jumped >= 0 else place

    def _action(self, i: Instruction) -> Callable[[Array], int | None]:
        """What an instruction does with the lanes that execute it. It returns where they jump, or -1 to stop the block."""
        base = i.name[0]
        if base == "bra":
            goal = self.program.labels[i.operands[0]]
            return lambda lanes: goal
        special = {"ret": self._ret, "bar": self._bar, "barrier": self._bar, "shfl": self._shfl, "redux": self._redux}
        special |= {"ld": self._ld, "st": self._st, "cp": self._cp, "ldmatrix": self._ldmatrix, "mov": self._mov}
        if base in special:
            return special[base](i)
        function, sources, result = function_of(tuple(i.name))
        read = [self._reader(text, type_of(t)) for text, t in zip(i.operands[1:], sources, strict=True)]
        write = self._writer(i.operands[0], type_of(result))

        def compute(lanes: Array) -> None:
            write(lanes, function(*(r(lanes) for r in read)))

        return compute

    def _reader(self, text: str, dtype: np.dtype[Any]) -> Callable[[Array], Array]:
        """A function from lanes to the values of an operand."""
        if text in self.registers:
            bits = np.dtype(f"u{dtype.itemsize}") if dtype != bool else dtype

            def read(lanes: Array) -> Array:
                return self.registers[text][lanes].astype(bits, copy=False).view(dtype)

            return read
        known = {"%tid.x": self.threads, "%ctaid.x": self.programs, "%laneid": self.threads % WARP}
        if text in known:
            return lambda lanes: known[text][lanes].astype(dtype)
        constant = self._constant(text, dtype)
        return lambda lanes: np.broadcast_to(constant, lanes.shape)

    def _constant(self, text: str, dtype: np.dtype[Any]) -> Any:
        if text in ("global_smem", "%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"):
            return dtype.type(0)
        if text == "%nctaid.x":
            return dtype.type(self.n_programs)
        if text in ("%ntid.x",):
            return dtype.type(self.program.threads)
        if text in ("true", "false"):
            return np.bool_(text == "true")
        digits = re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", text)
        if digits:
            width = 4 if digits.group(1) == "f" else 8
            value = np.array(int(digits.group(2), 16), f"u{width}")
            return value.view(dtype)[()] if width == dtype.itemsize else dtype.type(value.view(f"f{width}"))
        number = int(text.rstrip("U"), 0)
        unsigned = np.dtype(f"u{dtype.itemsize}")
        return np.array(number % (1 << 8 * dtype.itemsize), unsigned).view(dtype)[()]

    def _writer(self, text: str, dtype: np.dtype[Any]) -> Callable[[Array, Array], None]:
        """A function that writes values of a type to a register. A wider register gets the sign or zeros in front."""
        if text in ("_", "%_"):
            return lambda lanes, values: None
        if text not in self.registers:
            raise ValueError(f"{text} is not a register.")
        held = self.registers[text].dtype

        def write(lanes: Array, values: Array) -> None:
            if held != bool and values.dtype.kind == "f":
                values = values.view(f"u{values.itemsize}")
            self.registers[text][lanes] = values.astype(held)

        return write

    @staticmethod
    def _parts(text: str) -> list[str]:
        return [part.strip() for part in text.strip("{} ").split(",")]

    def _address(self, text: str, dtype: Any) -> Callable[[Array], Array]:
        base, offset = _ADDRESS.fullmatch(text).groups()
        read, add = self._reader(base, np.dtype(dtype)), np.dtype(dtype).type(int(offset or 0))
        return lambda lanes: read(lanes) + add

    def _mov(self, i: Instruction) -> Callable[[Array], None]:
        dtype = type_of(i.name[-1])
        to, source = i.operands
        if source.startswith("{"):
            parts = self._parts(source)
            piece = np.dtype(f"u{dtype.itemsize // len(parts)}")
            read, write = [self._reader(part, piece) for part in parts], self._writer(to, dtype)

            def pack(lanes: Array) -> None:
                write(lanes, np.stack([r(lanes) for r in read], -1).view(dtype)[:, 0])

            return pack
        if to.startswith("{"):
            parts = self._parts(to)
            piece = np.dtype(f"u{dtype.itemsize // len(parts)}")
            whole, writes = self._reader(source, dtype), [self._writer(part, piece) for part in parts]

            def unpack(lanes: Array) -> None:
                pieces = np.ascontiguousarray(whole(lanes))[:, None].view(piece)
                for k, write in enumerate(writes):
                    write(lanes, pieces[:, k])

            return unpack
        read_one, write_one = self._reader(source, dtype), self._writer(to, dtype)
        return lambda lanes: write_one(lanes, read_one(lanes))

    def _ret(self, i: Instruction) -> Callable[[Array], int]:
        def leave(lanes: Array) -> int:
            self.state[lanes] = DONE
            self._release(np.unique(self.programs[lanes]))
            return -1

        return leave

    def _bar(self, i: Instruction) -> Callable[[Array], int]:
        if i.name[1:] != ["sync"] or i.operands != ["0"]:
            raise ValueError(f"The barrier {i.text} is not known here.")

        def wait(lanes: Array) -> int:
            self.state[lanes] = WAITS
            self._release(np.unique(self.programs[lanes]))
            return -1

        return wait

    def _release(self, programs: Array) -> None:
        """Let the threads of each program go on if all of them wait or are done."""
        states = self.state.reshape(self.n_programs, -1)
        for program in programs:
            own = states[program]
            if (own == WAITS).any() and not (own == RUNS).any():
                own[own == WAITS] = RUNS
                self.shared.barrier(program)

    def _whole_warps(self, lanes: Array) -> Array:
        """The lanes as [warps, 32].

        Raises:
            AccessError: some lanes of a warp are elsewhere.
        """
        if len(lanes) % WARP or (lanes.reshape(-1, WARP) % WARP != np.arange(WARP)).any():
            raise AccessError("Some lanes of a warp are elsewhere, but the instruction needs all of them.")
        return lanes.reshape(-1, WARP)

    def _shfl(self, i: Instruction) -> Callable[[Array], None]:
        if i.name[1:] != ["sync", "bfly", "b32"] or [int(text, 0) for text in i.operands[3:]] != [31, -1]:
            raise ValueError(f"The shuffle {i.text} is not known here.")
        read, write = self._reader(i.operands[1], type_of("b32")), self._writer(i.operands[0], type_of("b32"))
        distance = int(i.operands[2], 0)

        def shuffle(lanes: Array) -> None:
            self._whole_warps(lanes)
            write(lanes, read(lanes ^ distance))

        return shuffle

    def _redux(self, i: Instruction) -> Callable[[Array], None]:
        function = {"max": np.maximum, "min": np.minimum, "add": np.add}[i.name[2]]
        dtype = type_of(i.name[3])
        read, write = self._reader(i.operands[1], dtype), self._writer(i.operands[0], dtype)

        def reduce(lanes: Array) -> None:
            whole = function.reduce(read(lanes).reshape(self._whole_warps(lanes).shape), axis=1, dtype=dtype)
            write(lanes, np.repeat(whole, WARP))

        return reduce

    def _space(self, i: Instruction) -> tuple[str, int, np.dtype[Any]]:
        """(space, length of the vector, type of an element) of a load or a store."""
        parts = [part for part in i.name[1:] if not _HINTS.fullmatch(part)]
        lengths = [int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)]
        spaces = [part for part in parts if part in ("global", "shared", "param")]
        if len(parts) != len(lengths) + len(spaces) + 1 or len(spaces) != 1 or not is_type(parts[-1]):
            raise ValueError(f"The access {i.text} is not known here.")
        return spaces[0], sum(lengths) or 1, type_of(parts[-1])

    def _ld(self, i: Instruction) -> Callable[[Array], None]:
        space, n, dtype = self._space(i)
        writes = [self._writer(part, dtype) for part in self._parts(i.operands[0])]
        if space == "param":
            name = i.operands[1].strip("[] ")
            value = self._constant(str(self._parameters[name]), dtype)
            return lambda lanes: writes[0](lanes, np.broadcast_to(value, lanes.shape))
        address = self._address(i.operands[1], "u8" if space == "global" else "u4")
        width = n * dtype.itemsize

        def load(lanes: Array) -> None:
            if space == "global":
                found = self.memory.load(address(lanes), width, self.programs[lanes])
            else:
                found = self.shared.load(address(lanes), width, self.programs[lanes], self.warps[lanes])
            for k, write in enumerate(writes):
                write(lanes, found.view(dtype)[:, k])

        return load

    def _st(self, i: Instruction) -> Callable[[Array], None]:
        space, _, dtype = self._space(i)
        reads = [self._reader(part, dtype) for part in self._parts(i.operands[1])]
        address = self._address(i.operands[0], "u8" if space == "global" else "u4")

        def store(lanes: Array) -> None:
            values = np.stack([read(lanes) for read in reads], -1).view(np.uint8)
            if space == "global":
                self.memory.store(address(lanes), values, self.programs[lanes])
            else:
                self.shared.store(address(lanes), values, self.programs[lanes], self.warps[lanes])

        return store

    def _cp(self, i: Instruction) -> Callable[[Array], None]:
        if i.name[2] == "commit_group":
            return self._commit
        if i.name[2] == "wait_group":
            return lambda lanes: self._arrive(lanes, int(i.operands[0]))
        to, source = self._address(i.operands[0], "u4"), self._address(i.operands[1], "u8")
        width = int(i.operands[2], 0)
        size = self._reader(i.operands[3] if len(i.operands) > 3 else str(width), type_of("u32"))

        def copy(lanes: Array) -> None:
            places = self.shared.places(to(lanes), width, self.programs[lanes], writes=True)
            self.shared.touch(places, width, self.warps[lanes], writes=True)
            sizes = size(lanes)
            if not np.isin(sizes, (0, width)).all():
                raise AccessError("A copy of a part of its width is not known here.")
            reads, values = sizes == width, np.zeros((len(lanes), width), np.uint8)
            sources = source(lanes)
            values[reads] = self.memory.load(sources[reads], width, self.programs[lanes[reads]])
            self._copies.append(Copies(lanes, self._committed[lanes], places, values, sources, reads))

        return copy

    def _commit(self, lanes: Array) -> None:
        self._committed[lanes] += 1

    def _arrive(self, lanes: Array, pending: int) -> None:
        """Let the copies of the lanes arrive, all but those of the last `pending` groups."""
        waits = np.zeros(self.n_lanes, bool)
        waits[lanes] = True
        on_their_way = []
        for copies in self._copies:
            now = waits[copies.lanes] & (copies.group < self._committed[copies.lanes] - pending)
            arrived, rest = copies.split(now)
            read = arrived.reads
            source = self.memory.load(arrived.sources[read], copies.values.shape[1], self.programs[arrived.lanes[read]])
            if (source != arrived.values[read]).any():
                raise AccessError("Global memory is written while it is copied to shared memory.")
            self.shared.put(arrived.places, arrived.values, self.warps[arrived.lanes])
            if len(rest.lanes):
                on_their_way.append(rest)
        self._copies = on_their_way

    def _ldmatrix(self, i: Instruction) -> Callable[[Array], None]:
        if i.name[1:] != ["sync", "aligned", "m8n8", "x1", "shared", "b16"]:
            raise ValueError(f"The access {i.text} is not known here.")
        address = self._address(i.operands[1], "u4")
        write = self._writer(self._parts(i.operands[0])[0], type_of("b32"))

        def load(lanes: Array) -> None:
            warps = self._whole_warps(lanes)
            rows = warps[:, :8].ravel()
            found = self.shared.load(address(rows), 16, self.programs[rows], self.warps[rows])
            write(lanes, found.view(np.uint32).ravel())

        return load
