"""PTX: the text of a compiled kernel as a list of instructions."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass, field

_DECLARED = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>;")
_NAMED = re.compile(r"\.reg\s+\.(\w+)\s+(%?\w+);")
_GUARD = re.compile(r"@(!?)(%\w+)\s+")
_WIDTHS = {"pred": 1, "b16": 16, "b32": 32, "f32": 32, "b64": 64, "f64": 64}


@dataclass
class Instruction:
    """One instruction.

    Attributes:
        text: the instruction as it is written.
        line: its line in the PTX, from 1.
        name: its parts between dots, such as ("add", "rn", "f32").
        operands: registers, numbers, labels, "[address]" and "{a, b}".
        guard: (register, whether the register has to be true), or None.
    """

    text: str
    line: int
    name: tuple[str, ...]
    operands: list[str]
    guard: tuple[str, bool] | None


@dataclass
class Program:
    """A kernel.

    Attributes:
        name: the kernel's name.
        parameters: bytes of each parameter.
        instructions: all instructions, in order.
        labels: label -> index of the instruction that follows it.
        widths: register -> bits; 1 for a predicate.
        threads: threads of a program of the grid.
    """

    name: str
    parameters: list[int] = field(default_factory=list)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    widths: dict[str, int] = field(default_factory=dict)
    threads: int = 0


def _operands(text: str) -> list[str]:
    """Cut at the commas that are not inside of brackets."""
    return [part.strip() for part in re.split(r",(?![^\[{]*[\]}])", text)] if text else []


@functools.cache
def parse(ptx: str) -> Program:
    """The kernel in a PTX text. It has to be the only one.

    Raises:
        ValueError: the text has no kernel, or something that is not understood.
    """
    head = re.search(r"\.visible \.entry (\w+)\((.*?)\)(.*?)\{", ptx, re.DOTALL)
    if head is None:
        raise ValueError("The PTX has no kernel.")
    out = Program(head.group(1))
    out.parameters = [int(bits) // 8 for bits in re.findall(r"\.param \.[bus](\d+)", head.group(2))]
    out.threads = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", head.group(3)).group(1))
    depth = 0  # of blocks of inline assembly
    first = ptx.count("\n", 0, head.end()) + 1
    for number, line in enumerate(ptx[head.end() :].split("\n"), first):
        line = line.partition("//")[0].strip()
        if line in ("{", "}"):
            depth += 1 if line == "{" else -1
            if depth < 0:
                break
        # A block of inline assembly may stand on one line, with registers of its own.
        for text in filter(None, (part.strip() for part in re.split(r"(?<=;)|(?<=:)(?=\s|$)|^\{|\}$", line))):
            _add(out, text, number)
    return out


def _add(out: Program, text: str, line: int) -> None:
    if declared := _DECLARED.fullmatch(text):
        kind, stem, count = declared.groups()
        out.widths |= dict.fromkeys((f"{stem}{i}" for i in range(int(count))), _WIDTHS[kind])
    elif named := _NAMED.fullmatch(text):
        out.widths[named.group(2)] = _WIDTHS[named.group(1)]
    elif text.endswith(":"):
        out.labels[text[:-1]] = len(out.instructions)
    elif text.startswith((".loc", ".pragma")) or text in ("{", "}"):
        return
    elif text.endswith(";"):
        guard = _GUARD.match(text)
        name, _, rest = text[guard.end() if guard else 0 : -1].strip().partition(" ")
        name, _, tab = name.partition("\t")
        condition = (guard.group(2), not guard.group(1)) if guard else None
        rest = f"{tab} {rest}".strip()
        out.instructions.append(Instruction(text, line, tuple(name.split(".")), _operands(rest), condition))
    else:
        raise ValueError(f"Line {line} of the PTX is not understood: {text}")
