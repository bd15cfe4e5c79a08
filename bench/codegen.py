"""What the compiler makes of each kernel variant that the plan launches. Needs no GPU.

python -m bench.codegen            # table for sm_80, sm_90, sm_100, gfx942: all variants for sm_90, fewer for the others
python -m bench.codegen --json results.json

    widths          of the aligned loop's accesses per thread and block: how many of 16, 8, 4 bytes
    bytes           that loop moves per element, counted in the compiled kernel: blocks loaded and stored
    instr           instructions of that loop per element, both sides of every branch in it
    programs        resident per multiprocessor, by registers, threads and shared memory
    KB in flight    per multiprocessor: what all resident programs load before they wait for any of it
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
COMPLETE = "sm_90"  # the target that every variant is compiled for
# For the others: one of 4 and of 8 elements per thread, and of each kind of rounding that costs registers.
SAMPLE = ("fp32", "bf16, remainder, bf16 moments", "bf16, kahan", "bf16, stochastic", "bf16, stochastic, 8-bit moments")
# Per multiprocessor: registers, threads, shared memory bytes. NVIDIA's occupancy tables for 8.0, 9.0, 10.0.
LIMITS = {"sm_80": (65536, 2048, 167936), "sm_90": (65536, 2048, 233472), "sm_100": (65536, 2048, 233472)}
RESERVED = 1024  # bytes of shared memory that every program takes besides its own
# Triton before 3.3 compiles ahead of time through another interface.
SUPPORTED = tuple(int(n) for n in triton.__version__.split(".")[:2]) >= (3, 3)
# Run-time arguments of all kernels by name; those that are not here are int32.
POINTERS = {
    **dict.fromkeys(("chunk_row", "row_group", "segment_chunk", "row_chunk"), "*i32"),
    **dict.fromkeys(("chunk_span", "addresses", "gradients", "rounding", "words", "skipped"), "*i64"),
    **dict.fromkeys(("coefficients", "partials", "steps", "grad_norm", "absolutes"), "*fp32"),
    **dict.fromkeys(("total", "totals", "sums", "row_factor"), "*fp64"),
}


class Variant(NamedTuple):
    kernel: Any
    name: str
    constants: dict[str, Any]
    block: int = 0  # elements per iteration of the aligned loop; 0: it has none
    storage: Storage | None = None  # of the update kernel
    combination: str = ""


@dataclass
class Report:
    kernel: str
    variant: str
    target: str
    registers: int
    spills: int
    combination: str  # a key of COMBINATIONS; "" for all but the update kernel
    constants: dict[str, str]
    # Of the aligned loop, if there is one:
    widths: dict[int, int] = field(default_factory=dict)  # how many accesses a thread makes per block, by their bytes
    moved_bytes: float | None = None  # per element
    instructions: float | None = None  # per element; this and what follows of NVIDIA targets only
    bytes_in_flight: float | None = None  # per multiprocessor
    programs: int | None = None  # per multiprocessor


def update_variant(
    combination: str, *, norms: bool = True, amsgrad: bool = False, strided: bool = False, huber: bool = False
) -> Variant:
    storage = COMBINATIONS[combination].storage
    constants = update_constants(storage, strided, amsgrad, huber)
    kinds = (("amsgrad", amsgrad), ("strided", strided), ("huber", huber), ("norms off", not norms))
    marks = [mark for mark, is_so in kinds if is_so]
    name = " / ".join([combination, *marks])
    return Variant(kernels.adamw_kernel, name, {**constants, "NORMS": norms}, constants["BLOCK"], storage, combination)


def variants(target: str) -> list[Variant]:
    """What is compiled for a target, out of all that plans launch."""
    out = [update_variant(name) for name in (COMBINATIONS if target == COMPLETE else SAMPLE)]
    out += [update_variant("fp32", norms=False), update_variant("fp32", amsgrad=True)]
    out.append(update_variant("bf16, stochastic", strided=True))
    out += [update_variant(name, huber=True) for name in ("fp32", "bf16, remainder")]
    out.append(Variant(kernels.threshold_kernel, "", {"RATE": decay.RATE}))
    for name, dtype in (("fp32", tl.float32), ("bf16", tl.bfloat16)):
        out.append(Variant(kernels.grad_norm_kernel, name, {"GRAD": dtype}, layout.GRAD_BLOCK))
    out.append(Variant(kernels.total_kernel, "", {"BITS": total_bits(1)}))
    out += [Variant(kernels.coefficients_kernel, f"clip {clip}", {"CLIP": clip}) for clip in (False, True)]
    return [*out, Variant(kernels.norms_kernel, "", {})]


def compile_variant(variant: Variant, target: GPUTarget) -> Any:
    names = list(variant.kernel.arg_names)
    signature = {n: "constexpr" if n in variant.constants else POINTERS.get(n, "i32") for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n in names if n in POINTERS}
    source = ASTSource(variant.kernel, signature, constexprs=variant.constants, attrs=aligned)
    strided = bool(variant.constants.get("STRIDED"))
    options = launch_options(target.backend, variant.storage, variant.block if variant.storage else 0, strided)
    return triton.compile(source, target=target, options=options)


def block_bytes(ttir: str) -> tuple[float, float]:
    """Bytes that one iteration of a kernel's first loop loads, and stores, in blocks."""
    found = re.search(r"^( *)(?:%\S+ = )?scf\.for .*?^\1\}", ttir, re.MULTILINE | re.DOTALL)
    moved = {"load": 0.0, "store": 0.0}
    if found:
        pattern = r"\btt\.(load|store) .*: tensor<(\d+)x!tt\.ptr<[a-z]+(\d+)>"
        for operation, elements, bits in re.findall(pattern, found.group()):
            moved[operation] += int(elements) * int(bits) / 8
    return moved["load"], moved["store"]


def _cuobjdump(cubin: bytes) -> str:
    """Resource usage and SASS."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as f:
        f.write(cubin)
    try:
        return subprocess.run(
            [str(tool), "-res-usage", "-sass", f.name], capture_output=True, text=True, check=True
        ).stdout
    finally:
        os.unlink(f.name)


def sass_loop(sass: str) -> list[str]:
    """Instructions of the first loop: what the first branch backwards jumps over."""
    lines = re.findall(r"/\*([0-9a-f]{4,5})\*/ +([A-Z@][^;]*);", sass)
    places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    for i, (_, text) in enumerate(lines):
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if branch and places.get(int(branch.group(1), 16), i) < i:
            return [text for _, text in lines[places[int(branch.group(1), 16)] : i + 1]]
    return []


def amdgcn_loop(asm: str) -> list[str]:
    """The same of AMD's assembly, where a loop may begin with its end and jump back from several places."""
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
    """Bytes per thread of an access to global memory; 0 for any other instruction."""
    nvidia = re.search(r"\b(?:LDG|STG)\.E(\S*)", instruction)
    if nvidia:
        bits = re.search(r"\.[US]?(8|16|64|128|256)\b", nvidia.group(1))
        return int(bits.group(1)) // 8 if bits else 4
    amd = re.match(r"(?:global|flat|buffer)_(?:load|store)_(?:[us]?(byte|short)|dword(?:x(\d))?)", instruction)
    return {"byte": 1, "short": 2}.get(amd.group(1), 4 * int(amd.group(2) or 1)) if amd else 0


def loaded_early(loop: Sequence[str]) -> float:
    """Which part of the bytes that a SASS loop loads is under way when a loaded register is first used."""
    early = total = 0
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


def report(variant: Variant, target: str) -> Report:
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
        # Registers are handed out to a warp in units of 256, which is 8 for each of its threads.
        all_registers, all_threads, all_shared = LIMITS[target]
        out.programs = min(
            all_registers // (-(-registers // 8) * 8 * layout.THREADS),
            all_threads // layout.THREADS,
            all_shared // (compiled.metadata.shared + RESERVED),
        )
    if variant.block:
        loop = amdgcn_loop(asm) if on_amd else sass_loop(asm)
        loaded, stored = block_bytes(compiled.asm["ttir"])
        widths = Counter(filter(None, map(access_width, loop)))
        # How many blocks one iteration does, where the compiler has unrolled it. Scales count in every thread here.
        blocks = max(1, int(sum(widths.elements()) * layout.THREADS / (loaded + stored)))
        out.widths = {width: n // blocks for width, n in sorted(widths.items(), reverse=True)}
        out.moved_bytes = (loaded + stored) / variant.block
        if not on_amd:
            out.instructions = len(loop) * layout.THREADS / variant.block / blocks
            out.bytes_in_flight = out.programs * loaded * blocks * loaded_early(loop)
    return out


def reports(targets: Sequence[str]) -> list[Report]:
    return [report(variant, target) for target in targets for variant in variants(target)]


def table(rows: Sequence[Report]) -> str:
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
    parser.add_argument("--json", type=Path, help="write the reports there too")
    arguments = parser.parse_args()
    if not SUPPORTED:
        parser.error(f"needs Triton 3.3 or newer, whose ahead-of-time interface it uses; this is {triton.__version__}")
    rows = reports(arguments.targets)
    print(f"triton {triton.__version__}, block {layout.BLOCK}, tail {layout.TAIL}, threads {layout.THREADS}")
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(
            json.dumps({"triton": triton.__version__, "reports": [asdict(r) for r in rows]}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
