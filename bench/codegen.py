"""Compile every kernel variant that a plan launches and report the generated code. This command needs no GPU.

python -m bench.codegen            # a table for sm_80, sm_90, sm_100, gfx942: all variants for sm_90, fewer for the others
python -m bench.codegen --json results.json

    widths          accesses of the aligned loop per thread and block, as count x bytes: 7x16 is 7 accesses of 16 bytes
    bytes           bytes that the aligned loop loads and stores per element, counted in the compiled kernel
    regs, spills    registers per thread; instructions that spill registers to memory
    instr           instructions of the aligned loop per element; both sides of every branch count
    programs        programs that fit on a multiprocessor at once, by registers, threads and shared memory
    KB in flight    bytes that all these programs load before the first of them waits for a load
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import harness
from lwadamw import kernels
from lwadamw.kernels import layout
from lwadamw.state import decay
from lwadamw.state.combinations import COMBINATIONS
from lwadamw.state.storage import Storage
from lwadamw.tables.variants import launch_options, total_bits, update_constants

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
COMPLETE = "sm_90"  # every variant is compiled for this target
# The other targets get these combinations: one with 4 and one with 8 elements per thread, and one for each kind of rounding
# that needs more registers.
SAMPLE = ("fp32", "bf16, remainder, bf16 moments", "bf16, kahan", "bf16, stochastic", "bf16, stochastic, 8-bit moments")
# Registers, threads and bytes of shared memory of a multiprocessor, from NVIDIA's occupancy tables for 8.0, 9.0 and 10.0.
LIMITS = {"sm_80": (65536, 2048, 167936), "sm_90": (65536, 2048, 233472), "sm_100": (65536, 2048, 233472)}
RESERVED = 1024  # bytes of shared memory that the system reserves for every program
# Triton before 3.3 has another interface for ahead-of-time compilation.
SUPPORTED = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 3)
# Types of the pointer arguments of all kernels, by name. Every other run-time argument is int32.
POINTERS = {
    **dict.fromkeys(("chunk_row", "row_group", "segment_chunk", "row_chunk"), "*i32"),
    **dict.fromkeys(("chunk_span", "addresses", "gradients", "rounding", "words", "skipped"), "*i64"),
    **dict.fromkeys(("coefficients", "partials", "norms", "steps", "grad_norm", "absolutes"), "*fp32"),
    **dict.fromkeys(("total", "totals", "sums", "row_factor"), "*fp64"),
}


class Variant(NamedTuple):
    """A kernel and the constants that it is compiled with."""

    kernel: Any
    name: str
    constants: dict[str, Any]
    block: int = 0  # elements per iteration of the aligned loop; 0: the kernel has no such loop
    storage: Storage | None = None  # None for every kernel but the update kernel
    combination: str = ""  # key of COMBINATIONS; "" for every kernel but the update kernel


@dataclass
class Report:
    """Measures of the code of one variant for one target."""

    kernel: str
    variant: str
    target: str
    registers: int
    spills: int
    combination: str  # key of COMBINATIONS; "" for every kernel but the update kernel
    constants: dict[str, str]
    # Measures of the aligned loop, if the kernel has one:
    widths: dict[int, int] = field(default_factory=dict)  # bytes of an access -> accesses of a thread per block
    moved_bytes: float | None = None  # per element
    # Measures for NVIDIA targets only. `programs` is there without an aligned loop too.
    instructions: float | None = None  # of the aligned loop, per element
    bytes_in_flight: float | None = None  # of the aligned loop, per multiprocessor
    programs: int | None = None  # per multiprocessor
    # Of total_kernel, per loop: instructions of a thread per TOTAL_BLOCK norms, its accesses, and how many blocks are on their
    # way while one is added
    loops: list[dict[str, Any]] = field(default_factory=list)


def update_variant(
    combination: str, *, norms: bool = True, amsgrad: bool = False, strided: bool = False, huber: bool = False
) -> Variant:
    """The update kernel for a key of COMBINATIONS and the given options."""
    storage = COMBINATIONS[combination].storage
    constants = update_constants(storage, strided, amsgrad, huber)
    kinds = (("amsgrad", amsgrad), ("strided", strided), ("huber", huber), ("norms off", not norms))
    marks = [mark for mark, is_so in kinds if is_so]
    name = " / ".join([combination, *marks])
    return Variant(kernels.adamw_kernel, name, {**constants, "NORMS": norms}, constants["BLOCK"], storage, combination)


def variants(target: str) -> list[Variant]:
    """All variants for COMPLETE, and a sample of them for another target."""
    out = [update_variant(name) for name in (COMBINATIONS if target == COMPLETE else SAMPLE)]
    out += [update_variant("fp32", norms=False), update_variant("fp32", amsgrad=True)]
    drawing = [name for name in dict.fromkeys(v.combination for v in out) if COMBINATIONS[name].storage.draws]
    out += [update_variant(name, strided=True) for name in drawing]
    out += [update_variant(name, huber=True) for name in ("fp32", "bf16, remainder")]
    for split in (False, True):
        name = "split" if split else ""
        out.append(Variant(kernels.threshold_kernel, name, {"RATE": decay.RATE, "SPLIT": split}))
    out.append(Variant(kernels.absolute_kernel, "", {}))
    for name, dtype in (("fp32", tl.float32), ("bf16", tl.bfloat16)):
        out.append(Variant(kernels.grad_norm_kernel, name, {"GRAD": dtype}, layout.GRAD_BLOCK))
    out.append(Variant(kernels.total_kernel, "", {"BITS": total_bits(1)}))
    out += [Variant(kernels.coefficients_kernel, f"clip {clip}", {"CLIP": clip}) for clip in (False, True)]
    return [*out, Variant(kernels.norms_kernel, "", {})]


def compile_variant(variant: Variant, target: GPUTarget) -> Any:
    """Compile a variant ahead of time, with the options of its launch and 16-byte aligned tables."""
    names = list(variant.kernel.arg_names)
    signature = {n: "constexpr" if n in variant.constants else POINTERS.get(n, "i32") for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n in POINTERS}
    source = ASTSource(variant.kernel, signature, constexprs=variant.constants, attrs=aligned)
    options = launch_options(target.backend, variant.storage, variant.block if variant.storage else 0)
    return triton.compile(source, target=target, options=options)


def block_bytes(ttir: str, block: int) -> tuple[float, float]:
    """Bytes that one iteration of the first loop of a kernel loads and stores as blocks: (loaded, stored).

    Every thread accesses the scale of its own elements. Several threads share a scale, which counts once.
    """
    found = re.search(r"^( *)(?:%\S+ = )?scf\.for .*?^\1\}", ttir, re.MULTILINE | re.DOTALL)
    moved = {"load": 0.0, "store": 0.0}
    if found:
        pattern = r"\btt\.(load|store) .*: tensor<(\d+)x!tt\.ptr<[a-z]+(\d+)>"
        for operation, elements, bits in re.findall(pattern, found.group()):
            different = block // layout.QUANT if int(elements) == layout.THREADS else int(elements)
            moved[operation] += different * int(bits) / 8
    return moved["load"], moved["store"]


def _cuobjdump(cubin: bytes) -> str:
    """Resource usage and SASS of a compiled kernel."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as f:
        f.write(cubin)
    try:
        return subprocess.run(
            [str(tool), "-res-usage", "-sass", f.name], capture_output=True, text=True, check=True
        ).stdout
    finally:
        os.unlink(f.name)


def sass_loops(sass: str) -> list[list[str]]:
    """Instructions of the loops in SASS. A loop ends at a branch that jumps backwards."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/ +([A-Z@][^;]*);", sass)
    places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    loops = []
    for i, (_, text) in enumerate(lines):
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and places.get(int(branch.group(1), 16), i) < i:
            loops.append([text for _, text in lines[places[int(branch.group(1), 16)] : i + 1]])
    return loops


def amdgcn_loop(asm: str) -> list[str]:
    """Lines of the first loop in AMD's assembly. The loop may begin with its exit test and jump back from several places."""
    lines = [line.strip() for line in asm.splitlines()]
    places = {line.partition(":")[0]: i for i, line in enumerate(lines) if re.match(r"\.LBB\w+:", line)}
    found = ((i, re.match(r"s_c?branch\w* (\.LBB\w+)", line)) for i, line in enumerate(lines))
    branches = [(i, places[branch.group(1)]) for i, branch in found if branch]
    begin, end = next(((target, i) for i, target in branches if target < i), (0, 0))
    for i, target in branches:
        if i > end and begin <= target <= end:
            end = i
    return lines[begin : end + 1]


def access_width(instruction: str) -> int:
    """Bytes per thread of an instruction that accesses global memory. Any other instruction gives 0."""
    nvidia = re.search(r"\b(?:LDG|STG|LDGSTS)\.E(\S*)", instruction)
    if nvidia:
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", nvidia.group(1))
        return int(bits.group(1)) // 8 if bits else 4
    amd = re.match(r"(?:global|flat|buffer)_(?:load|store)_(?:[us]?(byte|short)|dword(?:x(\d))?)", instruction)
    return {"byte": 1, "short": 2}.get(amd.group(1), 4 * int(amd.group(2) or 1)) if amd else 0


def loaded_early(loop: Sequence[str]) -> float:
    """Fraction of the bytes of a SASS loop whose loads are issued before the loop first uses a loaded register.

    The loop issues all copies to shared memory before it waits for one of them, so they are early wherever they stand.
    """
    copies = sum(access_width(instruction) for instruction in loop if "LDGSTS" in instruction)
    early = total = copies
    waiting: set[int] = set()
    waited = False
    for instruction in loop:
        load = re.search(r"\bLDG\S* R(\d+), (.*)", instruction)
        used = {int(register) for register in re.findall(r"\bR(\d+)", load.group(2) if load else instruction)}
        waited = waited or bool(used & waiting)
        if load:
            width, first = access_width(instruction), int(load.group(1))
            waiting |= set(range(first, first + max(width // 4, 1)))
            total += width
            early += 0 if waited else width
    return early / total if total else 0.0


def blocks_ahead(loop: Sequence[str]) -> float:
    """Blocks whose copies to shared memory stay on their way while a SASS loop computes a block."""
    groups = sum(instruction.startswith("LDGDEPBAR") for instruction in loop)
    pending = [int(n, 16) for n in re.findall(r"\bDEPBAR\.LE SB0, 0x([0-9a-f]+)", "\n".join(loop))]
    return min(pending) / groups if pending and groups else 0.0


def report(variant: Variant, target: str) -> Report:
    """Compile a variant for a target and measure its code.

    Args:
        variant: what to compile
        target: a key of TARGETS
    """
    compiled = compile_variant(variant, TARGETS[target])
    on_amd = TARGETS[target].backend == "hip"
    loop: list[str] = []
    if on_amd:
        asm = compiled.asm["amdgcn"]
        registers, spills = (
            int(re.search(rf"\.{count}:\s+(\d+)", asm).group(1)) for count in ("vgpr_count", "vgpr_spill_count")
        )
    else:
        asm = _cuobjdump(compiled.asm["cubin"])
        registers, spills = int(re.search(r"REG:(\d+)", asm).group(1)), len(re.findall(r"\b(?:LDL|STL)\b", asm))
    out = Report(
        variant.kernel.__name__,
        variant.name,
        target,
        registers,
        spills,
        variant.combination,
        {k: str(v) for k, v in variant.constants.items()},
    )
    if not on_amd:
        # A warp gets registers in units of 256, which is 8 per thread.
        all_registers, all_threads, all_shared = LIMITS[target]
        out.programs = min(
            all_registers // (-(-registers // 8) * 8 * layout.THREADS),
            all_threads // layout.THREADS,
            all_shared // (compiled.metadata.shared + RESERVED),
        )
    if variant.kernel is kernels.total_kernel and not on_amd:
        out.loops = [
            {
                "instructions": len(loop),
                "widths": dict(Counter(filter(None, map(access_width, loop)))),
                "ahead": blocks_ahead(loop),
            }
            for loop in sass_loops(asm)
        ]
    if variant.block:
        loop = amdgcn_loop(asm) if on_amd else next(iter(sass_loops(asm)), [])
        loaded, stored = block_bytes(compiled.asm["ttir"], variant.block)
        widths = Counter(filter(None, map(access_width, loop)))
        # The compiler may have unrolled the loop, so one iteration may update several blocks. Every thread accesses scales,
        # so the accesses here are more than the bytes that are moved: the quotient is rounded down.
        blocks = max(1, int(sum(widths.elements()) * layout.THREADS / (loaded + stored)))
        out.widths = {width: n // blocks for width, n in sorted(widths.items(), reverse=True)}
        out.moved_bytes = (loaded + stored) / variant.block
        if not on_amd:
            out.instructions = len(loop) * layout.THREADS / variant.block / blocks
            out.bytes_in_flight = out.programs * loaded * blocks * loaded_early(loop)
    return out


def reports(targets: Sequence[str]) -> list[Report]:
    """Reports of all variants of all given targets."""
    return [report(variant, target) for target in targets for variant in variants(target)]


def table(rows: Sequence[Report]) -> str:
    """The reports as a table, one line per variant and target."""
    cells = []
    for r in rows:
        widths = " ".join(f"{n}x{width}" for width, n in r.widths.items())
        row = [
            r.target,
            r.kernel,
            r.variant,
            widths,
            f"{r.moved_bytes:g}" if r.moved_bytes else "",
            r.registers,
            r.spills,
        ]
        row += ["" if r.instructions is None else f"{r.instructions:.1f}", r.programs or ""]
        cells.append([*row, f"{r.bytes_in_flight / 1024:.1f}" if r.bytes_in_flight else ""])
    header = ["target", "kernel", "variant", "widths", "bytes", "regs", "spills", "instr", "programs", "KB in flight"]
    return harness.table(header, cells, left=4)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--json", type=Path, help="also write the reports to this file")
    arguments = parser.parse_args()
    if not SUPPORTED:
        parser.error(
            f"This command needs the ahead-of-time interface of Triton 3.3 or newer, but Triton {triton.__version__} is "
            "installed. Install a newer Triton: pip install 'triton>=3.3'."
        )
    rows = reports(arguments.targets)
    print(f"triton {triton.__version__}, block {layout.BLOCK}, tail {layout.TAIL}, threads {layout.THREADS}")
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"triton": triton.__version__, "reports": [asdict(r) for r in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
