"""A pretended GPU that executes PTX on the CPU, for all threads of a grid at once.

Every lane has its own place in the program. At each turn, some warps are chosen, and their lanes at the earliest place run to
the next branch, label or barrier. So lanes that parted at a branch meet again, as they do on a GPU. The choice of warps is
random: a kernel whose result depends on it has a race.

Registers and shared memory hold noise before they are written. Copies to shared memory (cp.async) arrive as late as the kernel
allows. What it does not see: memory ordering between threads of one warp, time, and what ptxas makes of the PTX.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from tests.ptx.accesses import Accesses, Action
from tests.ptx.arithmetic import Array, function_of, type_of
from tests.ptx.memory import WARP, AccessError, Global, Shared
from tests.ptx.program import Instruction, Program

RUNS, WAITS, DONE = range(3)


class Machine(Accesses):
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
        super().__init__(memory, Shared(n_programs, shared_bytes), program, n_programs, parameters, seed)
        self.place = np.zeros(self.n_lanes, np.int64)
        self.state = np.full(self.n_lanes, RUNS)
        self._starts = {*program.labels.values()}
        self._actions = [self._action(instruction) for instruction in program.instructions]

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
        if self.copies:
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

    def _action(self, i: Instruction) -> Action:
        """What an instruction does with the lanes that execute it. It returns where they jump, or -1 to stop the block."""
        base = i.name[0]
        if base == "bra":
            goal = self.program.labels[i.operands[0]]
            return lambda lanes: goal
        special = {"ret": self._stop, "bar": self._stop, "shfl": self._shfl, "redux": self._redux}
        special |= {"ld": self.ld, "st": self.st, "cp": self.cp, "ldmatrix": self.ldmatrix, "mov": self.mov}
        if base == "createpolicy":
            return lambda lanes: None
        if base in special:
            return special[base](i)
        function, sources, result = function_of(i.name)
        read = [self.reader(text, type_of(t)) for text, t in zip(i.operands[1:], sources, strict=True)]
        write = self.writer(i.operands[0], type_of(result))

        def compute(lanes: Array) -> None:
            write(lanes, function(*(r(lanes) for r in read)))

        return compute

    def _stop(self, i: Instruction) -> Action:
        """The end of a thread, or a barrier."""
        if i.name[0] != "ret" and (i.name[1:] != ("sync",) or i.operands != ["0"]):
            raise ValueError(f"The barrier {i.text} is not known here.")
        state = DONE if i.name[0] == "ret" else WAITS

        def stop(lanes: Array) -> int:
            self.state[lanes] = state
            self._release(np.unique(self.programs[lanes]))
            return -1

        return stop

    def _release(self, programs: Array) -> None:
        """Let the threads of each program go on if all of them wait or are done."""
        states = self.state.reshape(self.n_programs, -1)
        for program in programs:
            own = states[program]
            if (own == WAITS).any() and not (own == RUNS).any():
                own[own == WAITS] = RUNS
                self.shared.barrier(program)

    def _shfl(self, i: Instruction) -> Action:
        if i.name[1:] != ("sync", "bfly", "b32") or [int(text, 0) for text in i.operands[3:]] != [31, -1]:
            raise ValueError(f"The shuffle {i.text} is not known here.")
        read, write = self.reader(i.operands[1], type_of("b32")), self.writer(i.operands[0], type_of("b32"))
        distance = int(i.operands[2], 0)

        def shuffle(lanes: Array) -> None:
            self.whole_warps(lanes)
            write(lanes, read(lanes ^ distance))

        return shuffle

    def _redux(self, i: Instruction) -> Action:
        function = {"max": np.maximum, "min": np.minimum, "add": np.add}[i.name[2]]
        dtype = type_of(i.name[3])
        read, write = self.reader(i.operands[1], dtype), self.writer(i.operands[0], dtype)

        def reduce(lanes: Array) -> None:
            whole = function.reduce(read(lanes).reshape(self.whole_warps(lanes).shape), axis=1, dtype=dtype)
            write(lanes, np.repeat(whole, WARP))

        return reduce
