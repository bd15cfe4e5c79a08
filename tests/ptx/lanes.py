"""The lanes of a launch, which are its threads: their registers, and how instructions read and write them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from tests.ptx.arithmetic import Array
from tests.ptx.memory import WARP, AccessError
from tests.ptx.program import Program

_ADDRESS = re.compile(r"\[\s*(\w+|%\w+)\s*(?:\+\s*(-?\w+))?\s*\]")


def parts(text: str) -> list[str]:
    """The operands in "{a, b}"."""
    return [part.strip() for part in text.strip("{} ").split(",")]


class Lanes:
    """Registers, which hold noise before they are written.

    Args:
        program: the kernel.
        n_programs: size of the grid.
        parameters: the values of the first parameters; the others are 0.
        seed: of the noise.
    """

    def __init__(self, program: Program, n_programs: int, parameters: Sequence[int], seed: int) -> None:
        self.program, self.n_programs = program, n_programs
        self.n_lanes = n_programs * program.threads
        lanes = np.arange(self.n_lanes)
        self.programs, self.threads, self.warps = lanes // program.threads, lanes % program.threads, lanes // WARP
        self.random = np.random.default_rng(seed)
        self.registers = {name: self._noise(bits) for name, bits in program.widths.items()}
        values = [*parameters, *[0] * (len(program.parameters) - len(parameters))]
        self._constants = {f"{program.name}_param_{i}": value for i, value in enumerate(values)}
        self._constants |= dict.fromkeys(("global_smem", "%tid.y", "%tid.z", "%ctaid.y", "%ctaid.z"), 0)
        self._constants |= {"%nctaid.x": n_programs, "%ntid.x": program.threads, "true": 1, "false": 0}

    def _noise(self, bits: int) -> Array:
        if bits == 1:
            return self.random.random(self.n_lanes) < 0.5
        dtype = np.dtype(f"u{bits // 8}")
        return self.random.integers(0, np.iinfo(dtype).max, self.n_lanes, dtype)

    def reader(self, text: str, dtype: np.dtype[Any]) -> Callable[[Array], Array]:
        """A function from lanes to the values of an operand."""
        if text in self.registers:
            bits = np.dtype(f"u{dtype.itemsize}") if dtype.kind != "b" else dtype

            def read(lanes: Array) -> Array:
                return self.registers[text][lanes].astype(bits, copy=False).view(dtype)

            return read
        known = {"%tid.x": self.threads, "%ctaid.x": self.programs, "%laneid": self.threads % WARP}
        if text in known:
            return lambda lanes: known[text][lanes].astype(dtype)
        constant = self.constant(text, dtype)
        return lambda lanes: np.broadcast_to(constant, lanes.shape)

    def constant(self, text: str, dtype: np.dtype[Any]) -> Any:
        """The value of an operand that is the same for all lanes: a number, a kernel's parameter, or a size."""
        digits = re.fullmatch(r"0([fd])([0-9A-Fa-f]+)", text)
        if digits:
            width = 4 if digits.group(1) == "f" else 8
            value = np.array(int(digits.group(2), 16), f"u{width}")
            return value.view(dtype)[()] if width == dtype.itemsize else dtype.type(value.view(f"f{width}"))
        number = self._constants[text] if text in self._constants else int(text.rstrip("U"), 0)
        unsigned = np.dtype(f"u{dtype.itemsize}")
        return np.array(number % (1 << 8 * dtype.itemsize), unsigned).view(dtype)[()]

    def writer(self, text: str, dtype: np.dtype[Any]) -> Callable[[Array, Array], None]:
        """A function that writes values of a type to a register. A wider register gets the sign or zeros in front."""
        if text in ("_", "%_"):
            return lambda lanes, values: None
        if text not in self.registers:
            raise ValueError(f"{text} is not a register.")
        held = self.registers[text].dtype

        def write(lanes: Array, values: Array) -> None:
            if held.kind != "b" and values.dtype.kind == "f":
                values = values.view(f"u{values.itemsize}")
            self.registers[text][lanes] = values.astype(held)

        return write

    def address(self, text: str, dtype: Any) -> Callable[[Array], Array]:
        """A function from lanes to the addresses in "[register + number]"."""
        base, offset = _ADDRESS.fullmatch(text).groups()
        read, add = self.reader(base, np.dtype(dtype)), np.dtype(dtype).type(int(offset or 0))
        return lambda lanes: read(lanes) + add

    def whole_warps(self, lanes: Array) -> Array:
        """The lanes as [warps, 32].

        Raises:
            AccessError: some lanes of a warp are elsewhere.
        """
        if len(lanes) % WARP or (lanes.reshape(-1, WARP) % WARP != np.arange(WARP)).any():
            raise AccessError("Some lanes of a warp are elsewhere, but the instruction needs all of them.")
        return lanes.reshape(-1, WARP)
